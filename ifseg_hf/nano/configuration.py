"""Configuration of the nano OFA."""

from ifseg_hf.modeling.configuration_ofa import OFAConfig

# Sizes of images in pixels, and neighbours and iterations of smoothing, chosen on development images. An image has at
# most 40 x 30 patches, for which the positions of 28 x 28 patches are resized. More neighbours and fewer iterations
# than the paper's 3 and 25 name things better, and keep thin ones.
SHORT_SIDE, LONG_SIDE = 480, 640
NEIGHBORS, ITERATIONS = 12, 4

# Settings of tuning on words, chosen on development images. Pre-training has already
# named patches by the words of a prompt, and has positions for them: more or larger steps lead away from
# what images have taught.
RECIPE = {
    "steps": 20,
    "batch_size": 2,
    "learning_rate": 1e-5,
    "warmup_steps": 5,
    "weight_decay": 0.01,
    "dropout": 0.0,
    "drop_path": 0.0,
    "max_cells": 8,
    "mixed_precision": "bf16",
}


def nano_config(vocab_size: int = 1000, **kwargs) -> OFAConfig:
    """The configuration of a small OFA on EfficientNet-Lite2, for word maps of 28 x 28 patches.

    Keyword arguments replace single attributes.
    """
    sizes = {
        "vocab_size": vocab_size,
        "d_model": 192,
        "encoder_layers": 3,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 576,
        "decoder_ffn_dim": 576,
        "max_position_embeddings": 512,
        "token_bucket_size": 64,
        "image_bucket_size": 42,
        "image_size": 448,
        "trunk_type": "efficientnet_lite",
        "trunk_embedding_size": 32,
        "trunk_hidden_sizes": (16, 24, 48, 88, 120, 208, 352),
        "trunk_depths": (1, 3, 3, 4, 4, 5, 1),
        "decoder_positions": "image",  # those of pre-training: tuning has no new parameters to learn
        "dropout": 0.0,
        "drop_path_rate": 0.0,
        "tuning": RECIPE,
    }
    return OFAConfig(**{**sizes, **kwargs})
