"""Analysis of several trials: effects, verdicts and a page from runs read back. Pure functions of the trials."""
