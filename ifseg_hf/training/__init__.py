"""Training: settings, set-up, loop, checkpoints and pseudo-labels."""
