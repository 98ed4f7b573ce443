"""Compare two sweeps or trials."""
