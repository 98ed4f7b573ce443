"""Fine-tuning stacks timed beside each other on one GPU, in turns: python -m benchmarks.peers OUT."""
