"""The embedded checkpoint, and its pre-training and evaluation."""
