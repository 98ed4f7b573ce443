"""The code for all that outlives the process: records, folders, the outbox and MLflow."""
