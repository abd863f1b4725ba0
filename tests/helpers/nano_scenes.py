"""Scenes, names and sizes for pre-training in miniature."""

import numpy as np

from ifseg_hf.nano import scenes

NAMES = ["cat", "ice cream", "go-kart", "road"]
SMALL = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "image_bucket_size": 8,
    "image_size": 64,
    "max_position_embeddings": 64,
    "trunk_embedding_size": 4,
    "trunk_hidden_sizes": (8, 8, 8),
    "trunk_depths": (1, 1, 1),
}


def make_scenes() -> scenes.SceneMaker:
    """Twelve images of the first three names, each in its own range of brightness, and one street image of road."""
    labels = np.arange(12) % 3
    pixels = (labels * 80)[:, None, None, None] + np.random.default_rng(0).integers(0, 60, (12, 64, 64, 3))
    mask = np.full((1, 120, 160), 0, np.uint8)
    streets = scenes.Streets(np.full((1, 120, 160, 3), 99, np.uint8), mask, ["road"], 11)
    return scenes.SceneMaker(scenes.NamedImages(pixels.astype(np.uint8), labels, NAMES[:3]), streets)
