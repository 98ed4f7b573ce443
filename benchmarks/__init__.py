"""What is timed on a real card, and the stored results."""
