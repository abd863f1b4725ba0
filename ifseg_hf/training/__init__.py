"""Settings, set-up, loop, checkpoints, pseudo-labels."""
