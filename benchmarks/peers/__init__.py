"""Fine-tuning stacks timed against each other on one GPU, in turns: python -m benchmarks.peers OUT."""
