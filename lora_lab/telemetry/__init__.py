"""Figures of a trial from its events and samples: pure functions, except for the modules that read sensors."""
