"""From yaml and command line to a TrialConfig, or to a refusal in plain words."""
