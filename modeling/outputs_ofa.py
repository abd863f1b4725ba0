"""Outputs of OFA's encoder, and the name of the key-value cache in those of its decoder."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

# The field of the outputs with keys and values of earlier tokens: its name since transformers 5.24, or the earlier one.
CACHE = "cache" if "cache" in Seq2SeqLMOutput.__dataclass_fields__ else "past_key_values"


@dataclass
class OFAEncoderOutput(BaseModelOutput):
    """
    Output of the encoder, the input of cross-attention: `L` patches, then `T` text tokens.

    Args:
        last_hidden_state: (batch, L + T, d_model).
        image_features: (batch, channels, h, w), the trunk's output; `None` without an image.
        patch_mask: bool (batch, h, w), the patches of each image; `None` without an image or image tokens.
        attention_mask: bool (1 or batch, L + T), the positions that are not padding; `None` where all are.
        position_embeddings: (1 or batch, L + T, d_model), normalised; batch is 1 where all images share a grid.
    """

    image_features: torch.Tensor | None = None
    patch_mask: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    position_embeddings: torch.Tensor | None = None


__all__ = ["CACHE", "OFAEncoderOutput"]
