"""Hugging Face Hub: publishing, model cards, conversion of published checkpoints, ONNX export."""
