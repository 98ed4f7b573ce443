"""Rows of text: found, read, checked and split before any tokenizer is loaded."""
