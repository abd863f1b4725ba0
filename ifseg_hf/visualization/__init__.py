"""Colours of words, overlays with labels and legends, training curves, reports."""
