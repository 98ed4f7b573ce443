"""Two sweeps or trials beside each other."""
