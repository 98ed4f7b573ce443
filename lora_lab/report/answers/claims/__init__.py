"""What a paper claims, and how the trials at hand judge it."""
