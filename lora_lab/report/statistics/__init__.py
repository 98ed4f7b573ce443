"""What made a difference: pairs, the factorial model, a split between two points, each with how sure."""
