"""Many trials: a grid planned, checked, run in blocks and resumed."""
