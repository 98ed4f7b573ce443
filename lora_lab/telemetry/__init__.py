"""From what the worker said and the card showed to figures: pure functions, but for the sensors."""
