"""All code that imports torch. It runs in processes of its own, one per trial and card."""
