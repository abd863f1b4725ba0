"""Overlays with legends, training curves."""
