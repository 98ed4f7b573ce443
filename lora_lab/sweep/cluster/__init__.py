"""The trials of a sweep on the machines of a cluster."""
