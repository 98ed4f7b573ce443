"""Hydra finds plugins in this namespace only, and registers a class where it is defined."""

from lora_lab.sweep.sweeper import Grid


class GridSweeper(Grid):
    """conf/config.yaml's sweeper: see lora_lab/sweep/sweeper.py."""
