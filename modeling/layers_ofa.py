"""Layers of OFA's encoder and decoder."""

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention_ofa import OFAAttention
from .blockwise_bias_ofa import BlockwiseBias
from .configuration_ofa import OFAConfig


def dropout(hidden_states: torch.Tensor, rate: float, training: bool) -> torch.Tensor:
    """Dropout, as of `torch.nn.functional`, which takes most of its time for random numbers on a CPU.

    Each element takes only 16 random bits there, so `rate` is rounded to a multiple of 2^-16.
    """
    dropped = round(rate * 2**16)
    if not training or dropped in (0, 2**16) or hidden_states.device.type != "cpu" or torch.compiler.is_compiling():
        return nn.functional.dropout(hidden_states, p=rate, training=training)
    size = hidden_states.numel()
    bits = torch.empty(-(-size // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    scale = torch.empty_like(hidden_states, requires_grad=False)
    torch.ge(bits[:size].view(hidden_states.shape), dropped - 2**15, out=scale)
    return hidden_states * scale.mul_(2**16 / (2**16 - dropped))


def drop_path(hidden_states: torch.Tensor, rate: float, training: bool) -> torch.Tensor:
    """Stochastic depth: zeroes the branch of a sample with probability `rate` and rescales the others."""
    if rate == 0.0 or not training:
        return hidden_states
    keep = torch.rand(len(hidden_states), *[1] * (hidden_states.ndim - 1), device=hidden_states.device) >= rate
    return hidden_states * (keep.to(hidden_states.dtype) / (1 - rate))


class OFALayerNorm(nn.LayerNorm):
    """A layer norm in the dtype of its input under autocast too, which would cast input and output to float32.

    The statistics are float32 in any case. It suits inputs and outputs of linear layers, which are of low precision.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not torch.is_autocast_enabled(input.device.type):
            return super().forward(input)
        weight, bias = self.weight.to(input.dtype), self.bias.to(input.dtype)
        with torch.autocast(input.device.type, enabled=False):
            return nn.functional.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class OFALayer(GradientCheckpointingLayer):
    """Base of encoder and decoder layers: the residual branches and the feed-forward block."""

    def __init__(self, config: OFAConfig, ffn_dim: int, drop_path_rate: float):
        super().__init__()
        self.config = config
        self.drop_path_rate = drop_path_rate
        self.activation_fn = ACT2FN[config.activation_function]
        self.fc1 = nn.Linear(config.d_model, ffn_dim)
        self.fc2 = nn.Linear(ffn_dim, config.d_model)
        self.ffn_layer_norm = OFALayerNorm(ffn_dim, eps=config.layer_norm_eps)
        self.final_layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)

    def _add(self, hidden_states: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
        branch = dropout(branch, self.config.dropout, self.training)
        return hidden_states + drop_path(branch, self.drop_path_rate, self.training)

    def _feed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        branch = self.activation_fn(self.fc1(self.final_layer_norm(hidden_states)))
        branch = dropout(branch, self.config.activation_dropout, self.training)
        return self._add(hidden_states, self.fc2(self.ffn_layer_norm(branch)))


class OFAEncoderLayer(OFALayer):
    def __init__(self, config: OFAConfig, layer_idx: int, drop_path_rate: float):
        super().__init__(config, config.encoder_ffn_dim, drop_path_rate)
        self.self_attn = OFAAttention(config, config.encoder_attention_heads, layer_idx)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.self_attn_mid_layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)

    def forward(
        self, hidden_states: torch.Tensor, attention_bias: torch.Tensor | BlockwiseBias, **kwargs
    ) -> torch.Tensor:
        branch, _ = self.self_attn(self.self_attn_layer_norm(hidden_states), attention_bias, **kwargs)
        hidden_states = self._add(hidden_states, self.self_attn_mid_layer_norm(branch))
        return self._feed_forward(hidden_states)


class OFADecoderLayer(OFALayer):
    def __init__(self, config: OFAConfig, layer_idx: int, drop_path_rate: float):
        super().__init__(config, config.decoder_ffn_dim, drop_path_rate)
        self.self_attn = OFAAttention(config, config.decoder_attention_heads, layer_idx)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.self_attn_mid_layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.cross_attn = OFAAttention(config, config.decoder_attention_heads, layer_idx)
        self.cross_attn_layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.cross_attn_mid_layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_bias: torch.Tensor | BlockwiseBias,
        encoder_hidden_states: torch.Tensor | None,
        cross_attention_bias: torch.Tensor | None,
        past_key_values: Cache | None = None,
        causal: bool = False,
        **kwargs,
    ) -> torch.Tensor:
        branch, _ = self.self_attn(
            self.self_attn_layer_norm(hidden_states),
            attention_bias,
            past_key_values=past_key_values,
            causal=causal,
            **kwargs,
        )
        hidden_states = self._add(hidden_states, self.self_attn_mid_layer_norm(branch))
        if encoder_hidden_states is not None:
            branch, _ = self.cross_attn(
                self.cross_attn_layer_norm(hidden_states),
                cross_attention_bias,
                key_value_states=encoder_hidden_states,
                past_key_values=past_key_values,
                **kwargs,
            )
            hidden_states = self._add(hidden_states, self.cross_attn_mid_layer_norm(branch))
        return self._feed_forward(hidden_states)


__all__ = ["OFADecoderLayer", "OFAEncoderLayer", "dropout"]
