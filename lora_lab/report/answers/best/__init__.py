"""One configuration out of what was measured."""
