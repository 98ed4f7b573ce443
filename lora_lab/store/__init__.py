"""What outlives the process: records, folders, the outbox and MLflow."""
