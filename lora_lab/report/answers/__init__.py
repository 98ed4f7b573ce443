"""Answers to a user's question: what fits, which to use, what is better, whether a paper's claim holds."""
