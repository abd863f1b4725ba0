"""Weights with which an OFA begins as a look-up: each patch is compared with the words, and nothing else happens yet.

The decoder's output for a patch sees the patch by cross-attention alone, at the next position in reading order. From
random weights, learning to look there takes longer than everything else. So positions begin as waves, of which a
shift is a rotation, and values pass unchanged.
"""

import math

import torch
from torch import nn

from ifseg_hf.modeling.modeling_ofa import OFAModel

HIGHEST_FREQUENCY = 0.6 * math.pi  # radians per patch; higher ones do not survive a resize of the positions
# Attention logits at the right position, relative to distant ones.
CROSS_PEAK, LOCAL_PEAK = 12.0, 3.0
# Scales of the branches beside a patch itself, which passes through cross-attention.
CROSS_SCALE, SELF_SCALE, FEED_FORWARD_SCALE, INPUT_SCALE = 1.5, 0.2, 0.3, 0.3


def wave_positions(rows: torch.Tensor, columns: torch.Tensor, d_model: int, heads: int) -> torch.Tensor:
    """
    Positions as waves, (positions, d_model).

    Each head has pairs of cosine and sine of rows, then of columns, at evenly spaced frequencies.

    Args:
        rows, columns: float (positions).
    """
    head_dim = d_model // heads
    pairs = head_dim // 4
    features = torch.zeros(len(rows), heads, head_dim)
    for head in range(heads):
        frequencies = HIGHEST_FREQUENCY * (torch.arange(pairs) + (head + 0.5) / heads) / pairs
        for start, coordinate in ((0, rows), (2 * pairs, columns)):
            angles = coordinate[:, None] * frequencies
            features[:, head, start : start + 2 * pairs : 2] = angles.cos()
            features[:, head, start + 1 : start + 2 * pairs : 2] = angles.sin()
    return features.flatten(1)


def column_shift(d_model: int, heads: int) -> torch.Tensor:
    """The matrix (d_model, d_model) that maps [`wave_positions`] of column x to those of column x + 1."""
    head_dim = d_model // heads
    pairs = head_dim // 4
    matrix = torch.eye(d_model)
    for head in range(heads):
        frequencies = HIGHEST_FREQUENCY * (torch.arange(pairs) + (head + 0.5) / heads) / pairs
        for pair, angle in enumerate(frequencies.tolist()):
            i = head * head_dim + 2 * pairs + 2 * pair
            cos, sin = math.cos(angle), math.sin(angle)
            matrix[i : i + 2, i : i + 2] = torch.tensor([[cos, -sin], [sin, cos]])
    return matrix


@torch.no_grad()
def begin_as_lookup(model: OFAModel) -> None:
    """Initialises encoder and decoder as a look-up. The logits are then about 14 times the cosine similarity."""
    config, encoder, decoder = model.config, model.encoder, model.decoder
    d_model, heads = config.d_model, config.encoder_attention_heads
    side = config.image_bucket_size
    grid = torch.arange(side, dtype=torch.float32)
    # `<s>` comes before the first patch
    rows = torch.cat([torch.zeros(1), grid.repeat_interleave(side)])
    columns = torch.cat([-torch.ones(1), grid.repeat(side)])
    encoder.embed_image_positions.weight.copy_(wave_positions(rows, columns, d_model, heads))
    largest = (d_model / heads / config.attn_scale_factor) ** 0.5  # product of equal positions, scaled
    identity, shift = torch.eye(d_model), column_shift(d_model, heads)
    for linear, matrix, peak in (
        (encoder.pos_q_linear, identity, LOCAL_PEAK),
        (encoder.pos_k_linear, identity, LOCAL_PEAK),
        (decoder.self_pos_q_linear, identity, LOCAL_PEAK),
        (decoder.self_pos_k_linear, identity, LOCAL_PEAK),
        (decoder.cross_pos_q_linear, shift, CROSS_PEAK),
        (decoder.cross_pos_k_linear, identity, CROSS_PEAK),
    ):
        linear.weight.copy_(matrix * (peak / largest) ** 0.5)
        linear.bias.zero_()
    for stack in (encoder, decoder):
        for tables in (stack.token_rel_pos_table_list, stack.image_rel_pos_table_list):
            for table in tables:
                nn.init.zeros_(table.weight)
        for layer in stack.layers:
            _pass_values(layer.self_attn)
            layer.self_attn_mid_layer_norm.weight.fill_(SELF_SCALE)
            layer.fc2.weight.mul_(FEED_FORWARD_SCALE)
    decoder.layernorm_embedding.weight.fill_(INPUT_SCALE)
    for layer in decoder.layers:
        _pass_values(layer.cross_attn)
        layer.cross_attn_mid_layer_norm.weight.fill_(CROSS_SCALE)


def _pass_values(attention: nn.Module) -> None:
    for linear in (attention.v_proj, attention.out_proj):
        nn.init.eye_(linear.weight)
        nn.init.zeros_(linear.bias)
