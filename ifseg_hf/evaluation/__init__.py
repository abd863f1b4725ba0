"""Segmenter protocol, metrics, evaluation, baselines."""
