"""Attention of OFA: kernels for logits with an additive bias, and the multi-head attention module."""

from collections.abc import Iterator

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.cache_utils import EncoderDecoderCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .blockwise_bias_ofa import BlockwiseBias, on_gpu
from .configuration_ofa import OFAConfig


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention in float32 over (batch, heads, length, head_dim); `attention_mask` is added to the logits."""
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask.to(weights.dtype)
    weights = weights.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


# Number of queries in a block of causal self-attention; a block has the keys up to its last query.
CAUSAL_BLOCK = 256
# Size of a block of [`BlockwiseAttention`]: logits, as many as fit into the caches, and images times heads.
LOGITS_IN_BLOCK = 2**20
PRODUCTS_IN_BLOCK = 8
# Up to this many attention weights are kept for the backward pass. More would take much memory, and are computed again.
KEPT_WEIGHTS = 2**25


class BlockwiseAttention(torch.autograd.Function):
    """
    Softmax attention with a trained bias on a CPU, computed for a block of heads and queries at a time.

    A block stays in the cache for all operations on it. torch's fused kernel for CPUs has no gradient for a bias;
    without a fused kernel, every step of the softmax reads all logits from main memory. Under autocast the computation
    is in float32: bfloat16 is slower without AMX, and not measured with it.

    Args:
        query, key, value: (batch, heads, length, head_dim); bias: (1 or batch, heads, queries, keys).
        causal: the bias masks all keys after a query; there are as many queries as keys.

    Returns (batch, heads, queries, head_dim).
    """

    @staticmethod
    def heads(query: torch.Tensor) -> Iterator[slice]:
        """The heads of each block, of all images."""
        size = max(1, PRODUCTS_IN_BLOCK // query.shape[0])
        return (slice(first, first + size) for first in range(0, query.shape[1], size))

    @staticmethod
    def rows(query: torch.Tensor, key: torch.Tensor, causal: bool) -> Iterator[tuple[slice, slice]]:
        """The queries of each block and their keys, of query and key (products, length, head_dim)."""
        size = max(1, LOGITS_IN_BLOCK // (len(key) * key.shape[1]))
        for start in range(0, query.shape[1], size):
            yield slice(start, start + size), slice(start + size if causal else key.shape[1])

    @staticmethod
    def weights(query: torch.Tensor, transposed_key: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Attention weights of a block, (products, queries, keys)."""
        logits = torch.bmm(query, transposed_key)
        logits.unflatten(0, (-1, bias.shape[1])).add_(bias)
        return torch.softmax(logits, -1, out=logits)

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx, query, key, value, bias, scaling: float, causal: bool) -> torch.Tensor:
        query = query * scaling
        output, kept = torch.empty_like(query), []
        keep = any(ctx.needs_input_grad) and len(query) * bias[0].numel() <= KEPT_WEIGHTS
        for heads in BlockwiseAttention.heads(query):
            q, k, v = (x[:, heads].flatten(0, 1) for x in (query, key, value))
            k = k.mT.contiguous()  # products with few columns of transposed keys are faster
            for rows, columns in BlockwiseAttention.rows(q, v, causal):
                weights = BlockwiseAttention.weights(q[:, rows], k[:, :, columns], bias[:, heads, rows, columns])
                output[:, heads, rows] = torch.bmm(weights, v[:, columns]).unflatten(0, (len(query), -1))
                if keep:
                    kept.append(weights)
        ctx.save_for_backward(query, key, value, bias, *kept)
        ctx.scaling, ctx.causal = scaling, causal
        return output

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output: torch.Tensor):
        query, key, value, bias, *kept = ctx.saved_tensors
        kept_blocks = iter(kept)  # not freed one by one, which would return their memory to the system each time
        grad_query, grad_key, grad_value = (torch.empty_like(x) for x in (query, key, value))
        grad_bias = torch.empty_like(bias)
        softmax_backward = torch.ops.aten._softmax_backward_data.out  # in place: another block would not fit the cache
        for heads in BlockwiseAttention.heads(query):
            q, k, v, grad = (x[:, heads].flatten(0, 1) for x in (query, key, value, grad_output))
            transposed_k, transposed_v = k.mT if kept else k.mT.contiguous(), v.mT.contiguous()
            grad_q, (grad_k, grad_v) = torch.empty_like(q), k.new_zeros(2, *transposed_v.shape)
            for rows, columns in BlockwiseAttention.rows(q, k, ctx.causal):
                if kept:
                    weights = next(kept_blocks)
                else:
                    block = q[:, rows], transposed_k[:, :, columns], bias[:, heads, rows, columns]
                    weights = BlockwiseAttention.weights(*block)
                grad_v[:, :, columns].baddbmm_(grad[:, rows].mT, weights)
                grad_weights = torch.bmm(grad[:, rows], transposed_v[:, :, columns])
                grad_logits = softmax_backward(grad_weights, weights, -1, weights.dtype, grad_input=grad_weights)
                grad_q[:, rows] = torch.bmm(grad_logits, k[:, columns])
                grad_k[:, :, columns].baddbmm_(q[:, rows].mT, grad_logits)
                _sum_to(grad_bias[:, heads, rows, columns], grad_logits)
                grad_bias[:, heads, rows, columns.stop :] = 0
            images = len(query), -1
            grad_query[:, heads] = grad_q.mul_(ctx.scaling).unflatten(0, images)
            grad_key[:, heads], grad_value[:, heads] = grad_k.mT.unflatten(0, images), grad_v.mT.unflatten(0, images)
        return grad_query, grad_key, grad_value, grad_bias, None, None


def _sum_to(result: torch.Tensor, products: torch.Tensor) -> None:
    """Writes a block (products, queries, keys) to (1 or batch, heads, queries, keys), the sum over images if 1."""
    first, *others = products.unflatten(0, (len(result), -1, result.shape[1])).unbind(1)
    total = first
    for other in others:
        total = torch.add(total, other, out=result)
    if not others:
        result.copy_(first)


def _trains_large_bias_on_cpu(query: torch.Tensor, bias: torch.Tensor) -> bool:
    """Whether to use [`BlockwiseAttention`]: not for logits that fit into one block, which stay in the cache anyway."""
    trained = torch.is_grad_enabled() and bias.requires_grad and not torch.compiler.is_compiling()
    exact = query.dtype in (torch.float32, torch.float64) or torch.is_autocast_enabled("cpu")
    large = len(query) * bias[0].numel() > LOGITS_IN_BLOCK
    return trained and query.device.type == "cpu" and exact and large


def biased_sdpa_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
    causal: bool = False,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    transformers' `sdpa` attention for logits with an additive bias (`attention_mask`).

    A large bias that is trained on a CPU runs in [`BlockwiseAttention`]. With `causal`, the bias masks all keys after a
    query, and on a CPU queries run in blocks, each with the keys up to its last query.
    """
    if dropout == 0 and _trains_large_bias_on_cpu(query, attention_mask):
        output = BlockwiseAttention.apply(query, key, value, attention_mask, scaling, causal)
        return output.transpose(1, 2), None
    bias = attention_mask.to(query.dtype)
    if not causal or on_gpu(query):
        return sdpa_attention_forward(module, query, key, value, bias, dropout=dropout, scaling=scaling, **kwargs)
    outputs = []
    # a last block of few queries would take about as long as a full one, so the block before it gets them
    starts = range(0, max(1, query.shape[2] - CAUSAL_BLOCK // 2), CAUSAL_BLOCK)
    for start, stop in zip(starts, [*starts[1:], query.shape[2]], strict=True):
        rows, seen = slice(start, stop), slice(stop)
        output, _ = sdpa_attention_forward(
            module,
            query[:, :, rows],
            key[:, :, seen],
            value[:, :, seen],
            bias[:, :, rows, seen],
            dropout=dropout,
            scaling=scaling,
            **kwargs,
        )
        outputs.append(output)
    return torch.cat(outputs, dim=1), None


# transformers' attention functions with another `sdpa`. It is not registered globally, so other models keep theirs.
ATTENTION_FUNCTIONS = AttentionInterface()
ATTENTION_FUNCTIONS["sdpa"] = biased_sdpa_attention_forward


class OFAAttention(nn.Module):
    """Multi-head attention whose heads are scaled by a learnt factor (`c_attn`) before the output projection."""

    is_causal = False  # the bias carries the causal mask

    def __init__(self, config: OFAConfig, heads: int, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.d_model // heads
        self.scaling = (config.attn_scale_factor * self.head_dim) ** -0.5
        self.q_proj = nn.Linear(config.d_model, config.d_model)
        self.k_proj = nn.Linear(config.d_model, config.d_model)
        self.v_proj = nn.Linear(config.d_model, config.d_model)
        self.out_proj = nn.Linear(config.d_model, config.d_model)
        self.c_attn = nn.Parameter(torch.ones(heads))

    @staticmethod
    def _cast(hidden_states: torch.Tensor) -> torch.Tensor:
        """The input of several projections in the dtype of autocast, which would cast it for each of them."""
        device = hidden_states.device.type
        if hidden_states.dtype != torch.float32 or not torch.is_autocast_enabled(device):
            return hidden_states
        return hidden_states.to(torch.get_autocast_dtype(device))

    def _heads(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _scale_heads(self, output: torch.Tensor) -> torch.Tensor:
        """Joins the scaled heads (batch, length, heads, head_dim) to (batch, length, d_model)."""
        return (output * self.c_attn[:, None].to(output.dtype)).flatten(2)

    def _keys_and_values(self, hidden_states, key_value_states, past_key_values):
        """Keys and values, (batch, heads, length, head_dim), read from and added to the cache, if there is one."""
        is_cross_attention = key_value_states is not None
        source = key_value_states if is_cross_attention else hidden_states
        if past_key_values is None:
            return self._heads(self.k_proj(source)), self._heads(self.v_proj(source))
        if not is_cross_attention:
            cache = past_key_values.self_attention_cache
            return cache.update(self._heads(self.k_proj(source)), self._heads(self.v_proj(source)), self.layer_idx)
        cache = past_key_values.cross_attention_cache
        if not past_key_values.is_updated.get(self.layer_idx):
            past_key_values.is_updated[self.layer_idx] = True
            return cache.update(self._heads(self.k_proj(source)), self._heads(self.v_proj(source)), self.layer_idx)
        return cache.layers[self.layer_idx].keys, cache.layers[self.layer_idx].values

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_bias: torch.Tensor | BlockwiseBias,
        key_value_states: torch.Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        causal: bool = False,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            attention_bias: (1 or batch, heads, queries, keys), added to the logits.
            causal: the bias masks all keys after a query, so those logits need not be computed.
        """
        hidden_states = self._cast(hidden_states)
        key_value_states = None if key_value_states is None else self._cast(key_value_states)
        query = self._heads(self.q_proj(hidden_states))
        key, value = self._keys_and_values(hidden_states, key_value_states, past_key_values)
        dropout = self.config.attention_dropout if self.training else 0.0
        if isinstance(attention_bias, BlockwiseBias):
            output = attention_bias.attention(query, key, value, self.scaling, dropout)
            return self.out_proj(self._scale_heads(output)), None
        attention = ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_bias,
            scaling=self.scaling,
            dropout=dropout,
            causal=causal,
            **kwargs,
        )
        return self.out_proj(self._scale_heads(output)), weights


__all__ = ["ATTENTION_FUNCTIONS", "BlockwiseAttention", "OFAAttention", "eager_attention_forward"]
