"""How a training step is calculated: engine.py chooses, the others each hold one technique."""
