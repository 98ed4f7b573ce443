"""Everything that imports torch. Runs in a process of its own, one a trial."""
