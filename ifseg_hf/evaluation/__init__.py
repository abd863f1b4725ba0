"""Segmenters, metrics, evaluation, baselines."""
