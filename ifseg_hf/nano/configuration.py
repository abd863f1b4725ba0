"""Configuration of the nano OFA."""

from ifseg_hf.modeling.configuration_ofa import OFAConfig


def nano_config(vocab_size: int = 1000, **kwargs) -> OFAConfig:
    """The configuration of an OFA with fewer than 6 million parameters, for images of 256 x 256.

    Keyword arguments replace single attributes.
    """
    sizes = {
        "vocab_size": vocab_size,
        "d_model": 192,
        "encoder_layers": 3,
        "decoder_layers": 3,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 768,
        "decoder_ffn_dim": 768,
        "max_position_embeddings": 512,
        "token_bucket_size": 64,
        "image_bucket_size": 32,
        "image_size": 256,
        "trunk_embedding_size": 32,
        "trunk_hidden_sizes": (128, 256, 640),
        "trunk_depths": (1, 2, 3),
    }
    return OFAConfig(**{**sizes, **kwargs})
