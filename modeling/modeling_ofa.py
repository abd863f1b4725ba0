"""OFA: a ResNet trunk, a transformer encoder over [image ; text] and a transformer decoder over text.

Positions are never added to tokens: they enter as biases of the attention logits, an absolute one shared by all layers
and a relative one per layer. What IFSeg adds to turn this into a segmentation model is in `modeling_ifseg.py`.
"""

import inspect
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_ifseg import IFSegConfig


@dataclass
class IFSegEncoderOutput(BaseModelOutput):
    """What the encoder hands to a decoder: `L` patches first, then `T` text tokens.

    Args:
        last_hidden_state: (batch, L + T, d_model).
        image_features: (batch, channels, h, w), the trunk's output; `None` without a photo.
        patch_mask: bool (batch, h, w), which patches belong to the photo; `None` without an image.
        attention_mask: bool (1 or batch, L + T), which positions are real; `None` where all are.
        position_embeddings: (1 or batch, L + T, d_model), normalised; batch is 1 where all photos share a grid.
    """

    image_features: torch.Tensor | None = None
    patch_mask: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    position_embeddings: torch.Tensor | None = None


# Photos of several sizes in one batch ---------------------------------------------------------------------------------


def photo_sizes(pixel_mask: torch.Tensor) -> list[tuple[int, int]]:
    """The (height, width) of each photo of a padded batch. pixel_mask: (batch, H, W), non-zero inside the photo."""
    inside = pixel_mask.bool()
    return list(zip(inside.any(2).sum(1).tolist(), inside.any(1).sum(1).tolist(), strict=True))


def _join(parts: list, rows: list[int]):
    """Outputs of groups of photos as one output: zero-padded to the largest, photos back in their order (`rows`).

    Each part is `None`, a tensor whose first dimension is the group, or a tuple of such.
    """
    if any(part is None for part in parts):
        return None
    if isinstance(parts[0], tuple):
        return tuple(_join(list(column), rows) for column in zip(*parts, strict=True))
    shape = [max(part.shape[axis] for part in parts) for axis in range(1, parts[0].ndim)]
    padded = []
    for part in parts:
        missing = [(0, size - n) for size, n in zip(shape, part.shape[1:], strict=True)]
        padded.append(nn.functional.pad(part, [n for pair in reversed(missing) for n in pair]))
    return torch.cat(padded)[torch.tensor(rows, device=parts[0].device).argsort()]


def one_photo_size_at_a_time(forward):
    """Lets a forward pass that takes photos of one size take a padded batch of several.

    Photos of equal size run together, cropped to it, so that each gets exactly what it would get alone; the outputs
    are padded with zeros. A batch without `pixel_mask`, or whose photos all have one size, costs one pass.
    """
    names = tuple(inspect.signature(forward).parameters)[1:]

    @wraps(forward)
    def wrapper(self, *args, **kwargs):
        kwargs.update(zip(names, args, strict=False))
        pixel_mask = kwargs.pop("pixel_mask", None)
        pixel_values = kwargs.get("pixel_values")
        if pixel_mask is None or pixel_values is None:
            return forward(self, **kwargs)
        if pixel_mask.shape != (len(pixel_values), *pixel_values.shape[2:]):
            raise ValueError(
                f"pixel_mask has shape {tuple(pixel_mask.shape)} where pixel_values, {tuple(pixel_values.shape)}, "
                f"needs {(len(pixel_values), *pixel_values.shape[2:])}."
            )
        sizes = photo_sizes(pixel_mask)
        if len(set(sizes)) == 1:
            return forward(self, **_photos(kwargs, slice(None), sizes[0]))

        return_dict = kwargs.pop("return_dict", None)
        groups = {size: [i for i, other in enumerate(sizes) if other == size] for size in sorted(set(sizes))}
        outputs = [
            forward(self, **_photos(kwargs, rows, size), pixel_mask=pixel_mask[rows], return_dict=True)
            for size, rows in groups.items()
        ]
        order = [row for rows in groups.values() for row in rows]
        joined = {name: _join([output[name] for output in outputs], order) for name in outputs[0] if name != "loss"}
        if outputs[0].get("loss") is not None:
            # the mean over all labelled pixels, whichever group they are in
            counts = [(kwargs["labels"][rows] != -100).sum() for rows in groups.values()]
            total = sum(output["loss"] * count for output, count in zip(outputs, counts, strict=True))
            joined["loss"] = total / sum(counts)
        output = type(outputs[0])(**joined)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    return wrapper


def _photos(inputs: dict, rows, size: tuple[int, int]) -> dict:
    """The inputs of some photos of a batch; what leads with another dimension than the batch is shared by all."""
    batch = len(inputs["pixel_values"])
    height, width = size
    chosen = {
        name: value[rows] if isinstance(value, torch.Tensor) and value.ndim and len(value) == batch else value
        for name, value in inputs.items()
    }
    chosen["pixel_values"] = chosen["pixel_values"][:, :, :height, :width]
    if chosen.get("labels") is not None and chosen["labels"].ndim == 3:
        chosen["labels"] = chosen["labels"][:, :height, :width]
    return chosen


# Image trunk ----------------------------------------------------------------------------------------------------------


class IFSegFrozenBatchNorm2d(nn.Module):
    """Batch norm that always uses its stored statistics, in training too (as OFA fine-tuning does).

    It is then a part of the convolution before it (see [`convolve`]).
    """

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of x is `x * scale + shift`; returns both, (channels), in float32 at least."""
        tensors = (self.weight, self.bias, self.running_mean, self.running_var)
        weight, bias, mean, var = (x if x.dtype == torch.float64 else x.float() for x in tensors)
        scale = weight * (var + 1e-5).rsqrt()
        return scale, bias - mean * scale


class IFSegConv2d(nn.Conv2d):
    """A convolution without bias, or with the scale and the shift (output channels) of a norm behind it."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)

    def forward(self, hidden_states: torch.Tensor, scale=None, shift=None) -> torch.Tensor:
        if scale is None:
            return super().forward(hidden_states)
        weight = (self.weight * scale[:, None, None, None]).to(hidden_states.dtype)
        return self._conv_forward(hidden_states, weight, shift.to(hidden_states.dtype))


def convolve(conv: IFSegConv2d, norm: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """`norm(conv(hidden_states))`: in one pass over the image where the norm is frozen, in two where it is learnt."""
    if isinstance(norm, IFSegFrozenBatchNorm2d):
        return conv(hidden_states, *norm())
    return norm(conv(hidden_states))


class IFSegTrunkBlock(nn.Module):
    """A ResNet v1.5 bottleneck: 1x1, 3x3 (which carries the stride), 1x1, each with batch norm, plus a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        width = out_channels // 4
        self.conv1 = IFSegConv2d(in_channels, width, 1)
        self.bn1 = IFSegFrozenBatchNorm2d(width)
        self.conv2 = IFSegConv2d(width, width, 3, stride)
        self.bn2 = IFSegFrozenBatchNorm2d(width)
        self.conv3 = IFSegConv2d(width, out_channels, 1)
        self.bn3 = IFSegFrozenBatchNorm2d(out_channels)
        self.downsample = None
        if stride > 1 or in_channels != out_channels:
            self.downsample = nn.ModuleList(
                [IFSegConv2d(in_channels, out_channels, 1, stride), IFSegFrozenBatchNorm2d(out_channels)]
            )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        shortcut = hidden_states
        if self.downsample is not None:
            conv, norm = self.downsample
            shortcut = convolve(conv, norm, hidden_states)
        hidden_states = convolve(self.conv1, self.bn1, hidden_states).relu_()
        hidden_states = convolve(self.conv2, self.bn2, hidden_states).relu_()
        return convolve(self.conv3, self.bn3, hidden_states).add_(shortcut).relu_()


class IFSegTrunk(nn.Module):
    """A ResNet without its last stage, (batch, 3, H, W) -> (batch, channels, ceil(H / 16), ceil(W / 16))."""

    def __init__(self, config: IFSegConfig):
        super().__init__()
        channels = config.trunk_embedding_size
        self.conv1 = IFSegConv2d(3, channels, 7, stride=2)
        self.bn1 = IFSegFrozenBatchNorm2d(channels)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        for i, (out_channels, depth) in enumerate(zip(config.trunk_hidden_sizes, config.trunk_depths, strict=True)):
            blocks = [IFSegTrunkBlock(channels, out_channels, stride=1 if i == 0 else 2)]
            blocks += [IFSegTrunkBlock(out_channels, out_channels, stride=1) for _ in range(depth - 1)]
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
            channels = out_channels
        self.stages = len(config.trunk_depths)
        # Convolutions are fastest with the channels last in memory. But with 8 channels, as only small test models
        # have, the backward pass on AVX-512 (torch 2.13) then corrupts memory; its vectors hold 16.
        widths = (config.trunk_embedding_size, *(width // 4 for width in config.trunk_hidden_sizes))
        whole = all(width % 16 == 0 for width in widths)
        self.memory_format = torch.channels_last if whole else torch.contiguous_format

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
            raise ValueError(f"pixel_values must be (batch, 3, H, W), not {tuple(pixel_values.shape)}.")
        pixel_values = pixel_values.to(self.conv1.weight.dtype, memory_format=self.memory_format)
        hidden_states = self.maxpool(convolve(self.conv1, self.bn1, pixel_values).relu_())
        for i in range(self.stages):
            hidden_states = getattr(self, f"layer{i + 1}")(hidden_states)
        return hidden_states


# Positions as attention biases ----------------------------------------------------------------------------------------


class IFSegTable(nn.Embedding):
    """A table that is read as a whole, by a call: offloaded weights are brought by hooks, which `.weight` passes by."""

    def forward(self) -> torch.Tensor:
        return self.weight


def resize_grid(grid: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Bilinear resizing (align_corners false) of the last two dimensions of `grid` (..., h, w)."""
    if grid.shape[-2:] == (height, width):
        return grid
    planes = grid.reshape(-1, 1, *grid.shape[-2:])
    planes = nn.functional.interpolate(planes, size=(height, width), mode="bilinear", align_corners=False)
    return planes.view(*grid.shape[:-2], height, width)


def grid_relative_bias(table: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Biases between the patches of a grid, (heads, height * width, height * width), from a relative table.

    Args:
        table: ((2g - 1)^2, heads); the row of query (y, x) and key (y', x') is
            (y - y' + g - 1) * (2g - 1) + (x - x' + g - 1), for grids of at most g x g.
    """
    side = math.isqrt(len(table))
    centre = side // 2
    window = table.view(side, side, -1).permute(2, 0, 1)
    window = window[:, centre - height + 1 : centre + height, centre - width + 1 : centre + width]
    # (heads, x, y' - y, x'), where the rows' distance y' - y rises; one query row's keys are then a slice of it
    lines = window.unfold(2, width, 1).transpose(1, 2).flip(2, 3)
    bias = torch.stack([lines[:, :, height - 1 - y : 2 * height - 1 - y] for y in range(height)], dim=1)
    return bias.view(-1, height * width, height * width)


def resized_grid_relative_bias(table: torch.Tensor, side: int, height: int, width: int) -> torch.Tensor:
    """Biases of the side x side grid resized bilinearly to height x width, over keys and over queries.

    Returns (heads, height * width, height * width); `table` is as for [`grid_relative_bias`].
    """
    if (height, width) == (side, side):
        return grid_relative_bias(table, side, side)
    window = table if table.dtype == torch.float64 else table.float()
    diagonals = math.isqrt(len(window))
    window = window.view(diagonals, diagonals, -1).permute(2, 0, 1)
    crop = slice(diagonals // 2 - side + 1, diagonals // 2 + side)
    one_hot = torch.eye(2 * side - 1, dtype=window.dtype, device=window.device)
    # Bilinear resizing treats rows and columns apart. Rows first: (heads, x - x', y, y'), still small. Then each of the
    # 2 * side - 1 distances x - x' goes where it counts, in one product.
    rows = _resized_differences(window[:, crop, crop].transpose(1, 2), side, height)
    columns = _resized_differences(one_hot, side, width)
    bias = rows.permute(0, 2, 3, 1) @ columns.flatten(1)
    bias = bias.unflatten(3, (width, width)).transpose(2, 3)
    return bias.reshape(-1, height * width, height * width).to(table.dtype)


def _resized_differences(values: torch.Tensor, side: int, size: int) -> torch.Tensor:
    """Values of the differences i - j of two axes of length `side`, on two axes resized linearly to `size`.

    values: (..., 2 * side - 1), the difference 0 in the middle. Returns (..., size, size).
    """
    basis = torch.eye(side, dtype=values.dtype, device=values.device)
    resize = nn.functional.interpolate(basis[None], size=size, mode="linear", align_corners=False)[0]
    return resize.T @ values.unfold(-1, side, 1).flip(-1) @ resize


def text_relative_bias(table: torch.Tensor, query_start: int, key_length: int) -> torch.Tensor:
    """Biases between text tokens, (heads, key_length - query_start, key_length).

    Queries are the positions from `query_start` on, keys all `key_length`. Distances r = i - j of at most
    mid = bucket_size / 2 have a row of their own, longer ones share logarithmic buckets up to 1023.

    Args:
        table: (2 * bucket_size - 1, heads); distance 0 is the middle row.
    """
    bucket_size = (len(table) + 1) // 2
    mid = bucket_size // 2
    positions = torch.arange(key_length, device=table.device)
    distance = positions[query_start:, None] - positions
    far = torch.log(distance.abs().clamp(min=mid) / mid) / math.log(1023 / mid) * (mid - 1)
    bucket = torch.where(distance.abs() <= mid, distance, distance.sign() * (far.ceil().long() + mid))
    return table[bucket + bucket_size - 1].permute(2, 0, 1)


class _AddBlocks(torch.autograd.Function):
    """[`add_blocks`], whose gradients are views; those of additions in place are copies of everything, each time."""

    @staticmethod
    def forward(bias: torch.Tensor, places: list[tuple[slice, slice]], *blocks: torch.Tensor) -> torch.Tensor:
        bias = bias.clone()
        for place, block in zip(places, blocks, strict=True):
            bias[(..., *place)] += block
        return bias

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.places, *blocks = inputs
        ctx.shapes = [block.shape for block in blocks]

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        shared = grad[0] if len(grad) == 1 else grad.sum(0)
        parts = zip(ctx.places, ctx.shapes, strict=True)
        return grad, None, *(shared[(slice(None), *place)].sum_to_size(shape) for place, shape in parts)


# Where to add biases to some queries and keys: rows, columns and what to add, (heads, rows, columns) or of size 1.
BiasBlock = tuple[slice, slice, torch.Tensor]


def add_blocks(bias: torch.Tensor, blocks: list[BiasBlock]) -> torch.Tensor:
    """`bias` (1 or batch, heads, queries, keys) with blocks of it, which do not overlap, added to."""
    places = [(rows, columns) for rows, columns, _ in blocks]
    # the compiler finds the gradients by itself, and cannot read a function of any number of tensors
    add = _AddBlocks.forward if torch.compiler.is_compiling() else _AddBlocks.apply
    return add(bias, places, *(block.to(bias.device) for _, _, block in blocks))


def project_positions(
    query_linear: nn.Linear, key_linear: nn.Linear, queries: torch.Tensor, keys: torch.Tensor, heads: int, factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """W_q p_i * s and W_k p_j per head, each (batch, heads, length, head_dim), s = (factor * head_dim)^-0.5.

    queries, keys: normalised positions, (batch, length, d_model); a batch of 1 is shared by all photos. The absolute
    bias is the product of the two over head_dim.
    """
    scale = (factor * query_linear.out_features / heads) ** -0.5
    q = (query_linear(queries) * scale).unflatten(-1, (heads, -1)).transpose(1, 2)
    k = key_linear(keys).unflatten(-1, (heads, -1)).transpose(1, 2)
    return q, k.to(q.device)


class IFSegBiasMemory:
    """Attention biases of the grids seen last, for as long as what they are made of stays the same.

    They are made of a few small tensors (projected positions, relative tables, a mask), which are computed anew by
    every forward pass and compared by value: however a weight was changed, no old bias is used with it. What needs a
    gradient is not kept, nor is anything saved or copied with the model.
    """

    limit = 2**30  # bytes

    def __init__(self):
        self.clear()

    def clear(self):
        # key -> (copies of what the biases are made of, the biases by layer)
        self.entries: OrderedDict[Hashable, tuple[list[torch.Tensor], dict[Hashable, torch.Tensor]]] = OrderedDict()

    def __deepcopy__(self, memo) -> "IFSegBiasMemory":
        return type(self)()

    def __reduce__(self):
        return type(self), ()

    def __call__(
        self, key: Hashable, sources: list[torch.Tensor], compute: Callable[[Any], torch.Tensor], layers: int
    ) -> Callable[[Any], torch.Tensor]:
        """`compute`, which makes the bias of a layer from `sources`, or its results for equal sources before.

        key: whatever else the biases depend on; layers: how many of them a forward pass asks for.
        """
        plain = all(type(x) in (torch.Tensor, nn.Parameter) for x in sources)  # not torch's fakes
        trained = torch.is_grad_enabled() and any(x.requires_grad for x in sources)
        if trained or not plain or torch.compiler.is_compiling():
            return compute
        first = sources[0]
        key = (key, first.dtype, first.device, torch.is_inference_mode_enabled())
        seen, biases = self.entries.pop(key, ([], {}))
        if len(seen) != len(sources) or not all(map(torch.equal, seen, sources)):
            seen, biases = [x.detach().clone() for x in sources], {}

        def remember(layer: Hashable) -> torch.Tensor:
            if layer in biases:
                return biases[layer]
            bias = compute(layer)
            if bias.nbytes * layers <= self.limit:
                biases[layer] = bias
                self.entries[key] = seen, biases
                while sum(b.nbytes for _, kept in self.entries.values() for b in kept.values()) > self.limit:
                    self.entries.popitem(last=False)
            return bias

        if biases:
            self.entries[key] = seen, biases
        return remember


def cat_sequences(parts: list[torch.Tensor]) -> torch.Tensor:
    """Joins (batch, length, ...) tensors along their lengths, on the device of the first."""
    return torch.cat([part.to(parts[0].device) for part in parts], dim=1)


def masked_bias(bias: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
    """`bias` (batch, heads, queries, keys) with the dtype's minimum wherever `allowed` (broadcastable) is false."""
    return bias if allowed is None else bias.masked_fill(~allowed.to(bias.device), torch.finfo(bias.dtype).min)


# Transformer ----------------------------------------------------------------------------------------------------------


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
        weights = weights + attention_mask
    weights = weights.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


# Queries of a causal self-attention that run together, with the keys up to the last of them.
CAUSAL_BLOCK = 256
# Heads of a photo that run together in [`BlockwiseAttention`], so that every thread has products of its own, and their
# logits: each thread's part of them fits into its cache.
HEADS_IN_BLOCK = 4
LOGITS_IN_BLOCK = 2**19


class BlockwiseAttention(torch.autograd.Function):
    """Softmax attention with a bias that has a gradient, on a CPU: the logits of a few queries at a time.

    A block stays in the cache for all that is done with it, and the backward pass makes it again. torch's kernel for
    CPUs has no gradient for a bias; without it every step of the softmax, there and back, passes over all logits in
    main memory. Under autocast it computes in float32: without AMX bfloat16 is slower; with it nobody has measured.

    Args:
        query, key, value: (batch, heads, length, head_dim); bias: (1 or batch, heads, queries, keys).
        causal: the bias lets no query see a later key; queries and keys are as many.

    Returns (batch, heads, queries, head_dim).
    """

    @staticmethod
    def blocks(query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor, causal: bool):
        """Yields, block by block, the indices of its queries, of the keys that they see, and of their bias."""
        (batch, heads, queries, _), keys = query.shape, key.shape[2]
        size = max(1, LOGITS_IN_BLOCK // (HEADS_IN_BLOCK * keys))
        for first in range(0, heads, HEADS_IN_BLOCK):
            some = slice(first, first + HEADS_IN_BLOCK)
            for start in range(0, queries, size):
                rows, columns = slice(start, start + size), slice(start + size if causal else keys)
                for photo in range(batch):  # innermost, while the bias they may share is in the cache
                    shared = 0 if len(bias) == 1 else photo
                    yield (photo, some, rows), (photo, some, columns), (shared, some, rows, columns)

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx, query, key, value, bias, scaling: float, causal: bool) -> torch.Tensor:
        query = query * scaling
        output = torch.empty_like(query)
        for rows, columns, b in BlockwiseAttention.blocks(query, key, bias, causal):
            weights = torch.baddbmm(bias[b], query[rows], key[columns].mT).softmax(-1)
            output[rows] = torch.bmm(weights, value[columns])
        ctx.save_for_backward(query, key, value, bias)
        ctx.scaling, ctx.causal = scaling, causal
        return output

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output: torch.Tensor):
        query, key, value, bias = ctx.saved_tensors
        grad_query, grad_bias = torch.empty_like(query), torch.zeros_like(bias)
        grad_key, grad_value = key.new_zeros(2, *key.shape)  # contiguous, or products are added head by head
        for rows, columns, b in BlockwiseAttention.blocks(query, key, bias, ctx.causal):
            q, k, grad = query[rows], key[columns], grad_output[rows]
            weights = torch.baddbmm(bias[b], q, k.mT).softmax(-1)
            grad_value[columns].baddbmm_(weights.mT, grad)
            grad_weights = torch.bmm(grad, value[columns].mT)
            grad_logits = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            grad_bias[b].add_(grad_logits)
            grad_query[rows] = torch.bmm(grad_logits, k)
            grad_key[columns].baddbmm_(grad_logits.mT, q)
        return grad_query.mul_(ctx.scaling), grad_key, grad_value, grad_bias, None, None


def trains_large_bias_on_cpu(query: torch.Tensor, bias: torch.Tensor) -> bool:
    """Whether [`BlockwiseAttention`] pays: logits that are one block are in the cache as they are."""
    trained = torch.is_grad_enabled() and bias.requires_grad and not torch.compiler.is_compiling()
    exact = query.dtype in (torch.float32, torch.float64) or torch.is_autocast_enabled("cpu")
    large = bias.shape[2] * bias.shape[3] * HEADS_IN_BLOCK > LOGITS_IN_BLOCK
    return trained and query.device.type == "cpu" and exact and large


class IFSegAttention(nn.Module):
    """Multi-head attention whose heads are scaled by a learnt factor (`c_attn`) before the output projection."""

    is_causal = False  # the bias carries the causal mask

    def __init__(self, config: IFSegConfig, heads: int, layer_idx: int):
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

    def _heads(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _keys_and_values(self, hidden_states, key_value_states, past_key_values):
        """Keys and values, (batch, heads, length, head_dim), through the cache where there is one."""
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
        attention_bias: torch.Tensor,
        key_value_states: torch.Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        causal: bool = False,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`causal`: the bias lets no position see a later one, whose logits then need not be computed."""
        query = self._heads(self.q_proj(hidden_states))
        key, value = self._keys_and_values(hidden_states, key_value_states, past_key_values)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attention = partial(
            attention,
            self,
            scaling=self.scaling,
            dropout=self.config.attention_dropout if self.training else 0.0,
            **kwargs,
        )
        sdpa = self.config._attn_implementation == "sdpa"
        blockwise = sdpa and self.config.attention_dropout == 0 and trains_large_bias_on_cpu(query, attention_bias)
        bias = attention_bias if blockwise else attention_bias.to(query.dtype)
        if blockwise:
            output = BlockwiseAttention.apply(query, key, value, bias, self.scaling, causal).transpose(1, 2)
            weights = None
        elif causal and sdpa:
            length = query.shape[2]
            stops = [min(start + CAUSAL_BLOCK, length) for start in range(0, length, CAUSAL_BLOCK)]
            blocks = zip(query.split(CAUSAL_BLOCK, dim=2), bias.split(CAUSAL_BLOCK, dim=2), stops, strict=True)
            output = torch.cat(
                [attention(q, key[:, :, :stop], value[:, :, :stop], b[..., :stop])[0] for q, b, stop in blocks], dim=1
            )
            weights = None
        else:
            output, weights = attention(query, key, value, bias)
        output = output * self.c_attn[:, None]
        return self.out_proj(output.flatten(2)), weights


def drop_path(hidden_states: torch.Tensor, rate: float, training: bool) -> torch.Tensor:
    """Stochastic depth: zeroes a sample's branch with probability `rate` and rescales the rest."""
    if rate == 0.0 or not training:
        return hidden_states
    keep = torch.rand(len(hidden_states), *[1] * (hidden_states.ndim - 1), device=hidden_states.device) >= rate
    return hidden_states * keep / (1 - rate)


class IFSegLayer(GradientCheckpointingLayer):
    """What encoder and decoder layers share: the residual branches and the feed-forward block."""

    def __init__(self, config: IFSegConfig, ffn_dim: int, drop_path_rate: float):
        super().__init__()
        self.config = config
        self.drop_path_rate = drop_path_rate
        self.activation_fn = ACT2FN[config.activation_function]
        self.fc1 = nn.Linear(config.d_model, ffn_dim)
        self.fc2 = nn.Linear(ffn_dim, config.d_model)
        self.ffn_layer_norm = nn.LayerNorm(ffn_dim, eps=config.layer_norm_eps)
        self.final_layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)

    def _add(self, hidden_states: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
        branch = nn.functional.dropout(branch, p=self.config.dropout, training=self.training)
        return hidden_states + drop_path(branch, self.drop_path_rate, self.training)

    def _feed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        branch = self.activation_fn(self.fc1(self.final_layer_norm(hidden_states)))
        branch = nn.functional.dropout(branch, p=self.config.activation_dropout, training=self.training)
        return self._add(hidden_states, self.fc2(self.ffn_layer_norm(branch)))


class IFSegEncoderLayer(IFSegLayer):
    def __init__(self, config: IFSegConfig, layer_idx: int, drop_path_rate: float):
        super().__init__(config, config.encoder_ffn_dim, drop_path_rate)
        self.self_attn = IFSegAttention(config, config.encoder_attention_heads, layer_idx)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.self_attn_mid_layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)

    def forward(self, hidden_states: torch.Tensor, attention_bias: torch.Tensor, **kwargs) -> torch.Tensor:
        branch, _ = self.self_attn(self.self_attn_layer_norm(hidden_states), attention_bias, **kwargs)
        hidden_states = self._add(hidden_states, self.self_attn_mid_layer_norm(branch))
        return self._feed_forward(hidden_states)


class IFSegDecoderLayer(IFSegLayer):
    def __init__(self, config: IFSegConfig, layer_idx: int, drop_path_rate: float):
        super().__init__(config, config.decoder_ffn_dim, drop_path_rate)
        self.self_attn = IFSegAttention(config, config.decoder_attention_heads, layer_idx)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.self_attn_mid_layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.cross_attn = IFSegAttention(config, config.decoder_attention_heads, layer_idx)
        self.cross_attn_layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.cross_attn_mid_layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_bias: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        cross_attention_bias: torch.Tensor,
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
        branch, _ = self.cross_attn(
            self.cross_attn_layer_norm(hidden_states),
            cross_attention_bias,
            key_value_states=encoder_hidden_states,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden_states = self._add(hidden_states, self.cross_attn_mid_layer_norm(branch))
        return self._feed_forward(hidden_states)


class IFSegPreTrainedModel(PreTrainedModel):
    config: IFSegConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the losses are means: Trainer is to average them over accumulated batches
    _no_split_modules = ["IFSegTrunk", "IFSegEncoderLayer", "IFSegDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, IFSegAttention):
            init.ones_(module.c_attn)
        elif isinstance(module, IFSegFrozenBatchNorm2d):
            init.ones_(module.weight)
            init.zeros_(module.bias)
            init.zeros_(module.running_mean)
            init.ones_(module.running_var)
        elif isinstance(module, nn.Conv2d):
            # all convolutions are followed by ReLU; the transformer's 0.02 would fade to nothing over 30 blocks
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class _IFSegStack(IFSegPreTrainedModel):
    """The parts that encoder and decoder have alike: embeddings, positions, relative tables."""

    def __init__(self, config: IFSegConfig, layers: int, heads: int):
        super().__init__(config)
        d_model = config.d_model
        self.embed_tokens = nn.Embedding(config.vocab_size, d_model, config.pad_token_id)
        self.layernorm_embedding = nn.LayerNorm(d_model, eps=config.layer_norm_eps)
        # two rows more than there are positions, which no text uses: so are the published checkpoints
        self.embed_positions = IFSegTable(config.max_position_embeddings + 2, d_model)
        self.embed_image_positions = IFSegTable(config.image_bucket_size**2 + 1, d_model)
        self.pos_ln = nn.LayerNorm(d_model, eps=config.layer_norm_eps)
        self.image_pos_ln = nn.LayerNorm(d_model, eps=config.layer_norm_eps)
        self.layer_norm = nn.LayerNorm(d_model, eps=config.layer_norm_eps)
        text_rows = 2 * config.token_bucket_size - 1
        image_rows = (2 * config.image_bucket_size - 1) ** 2 + 3
        self.token_rel_pos_table_list = nn.ModuleList(IFSegTable(text_rows, heads) for _ in range(layers))
        self.image_rel_pos_table_list = nn.ModuleList(IFSegTable(image_rows, heads) for _ in range(layers))
        self.biases = IFSegBiasMemory()

    def train(self, mode: bool = True):
        self.biases.clear()  # training does not use them
        return super().train(mode)

    def _apply(self, fn, *args, **kwargs):
        self.biases.clear()  # the weights move or change their type
        return super()._apply(fn, *args, **kwargs)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding):
        self.embed_tokens = value

    def text_positions(self, start: int, stop: int) -> torch.Tensor:
        """Normalised positions start..stop-1 of text tokens, (1, stop - start, d_model)."""
        limit = self.config.max_position_embeddings
        if stop > limit:
            raise ValueError(f"The text has {stop} tokens; this model has positions for {limit}.")
        return self.pos_ln(self.embed_positions()[start:stop])[None]

    def image_positions(self, height: int, width: int, interpolate: bool) -> torch.Tensor:
        """Positions of a height x width patch grid, (height * width, d_model), before their layer norm.

        Grids with more patches than an `image_size` photo's are resized from that one if `interpolate`.
        """
        config = self.config
        side, base = config.image_bucket_size, config.grid_size
        grid = self.embed_image_positions()[1:].view(side, side, -1)
        if max(height, width) <= side and (height * width <= base**2 or not interpolate):
            return grid[:height, :width].flatten(0, 1)
        if not interpolate:
            raise ValueError(
                f"The photo has {height} x {width} patches; without interpolate_pos_encoding this model has positions "
                f"for {side} x {side}, a photo of at most {side * config.patch_size} pixels a side."
            )
        return resize_grid(grid[:base, :base].permute(2, 0, 1), height, width).flatten(1).T

    def image_relative_bias(self, layer: int, height: int, width: int, interpolate: bool) -> torch.Tensor:
        """Relative biases between patches, (heads, height * width, height * width)."""
        table = self.image_rel_pos_table_list[layer]()[:-3]
        if interpolate:
            return resized_grid_relative_bias(table, self.config.grid_size, height, width)
        return grid_relative_bias(table, height, width)


class IFSegEncoder(_IFSegStack):
    """OFA's encoder over [image ; text]; either may be absent."""

    _can_record_outputs = {"hidden_states": IFSegEncoderLayer, "attentions": IFSegAttention}

    def __init__(self, config: IFSegConfig):
        super().__init__(config, config.encoder_layers, config.encoder_attention_heads)
        d_model = config.d_model
        self.type_embedding = IFSegTable(2, d_model)
        self.embed_images = IFSegTrunk(config)
        self.image_proj = nn.Linear(config.trunk_hidden_sizes[-1], d_model)
        self.patch_layernorm_embedding = nn.LayerNorm(d_model, eps=config.layer_norm_eps)
        self.pos_q_linear = nn.Linear(d_model, d_model)
        self.pos_k_linear = nn.Linear(d_model, d_model)
        rates = torch.linspace(0, config.encoder_drop_path_rate, config.encoder_layers, device="cpu").tolist()
        self.layers = nn.ModuleList(IFSegEncoderLayer(config, i, rate) for i, rate in enumerate(rates))
        self.post_init()

    def _embed(self, tokens: torch.Tensor, token_type: int, norm: nn.LayerNorm) -> torch.Tensor:
        tokens = norm(tokens + self.type_embedding()[token_type].to(tokens.device))
        return nn.functional.dropout(tokens, p=self.config.dropout, training=self.training)

    def positions(self, grid: tuple[int, int] | None, text_length: int, interpolate: bool) -> torch.Tensor:
        """Normalised positions of [image ; text], (1, L + T, d_model)."""
        parts = []
        if grid is not None:
            parts.append(self.image_pos_ln(self.image_positions(*grid, interpolate))[None])
        if text_length:
            parts.append(self.text_positions(0, text_length))
        return cat_sequences(parts)

    def _layer_biases(
        self, positions: torch.Tensor, mask: torch.Tensor | None, grid, text_length: int, interpolate: bool
    ) -> Callable[[int], torch.Tensor]:
        """Gives the bias of a layer, (1 or batch, heads, L + T, L + T): the absolute one, which all layers share, and
        the layer's relative ones: image with image, text with text, nothing in between."""
        heads, factor = self.config.encoder_attention_heads, self.config.attn_scale_factor
        q, k = project_positions(self.pos_q_linear, self.pos_k_linear, positions, positions, heads, factor)

        absolute: list[torch.Tensor] = []

        def layer_bias(layer: int) -> torch.Tensor:
            if not absolute:
                absolute.append(masked_bias(q @ k.transpose(2, 3), None if mask is None else mask[:, None, None]))
            blocks: list[BiasBlock] = []
            if grid is not None:
                height, width = grid
                image = slice(height * width)
                blocks.append((image, image, self.image_relative_bias(layer, height, width, interpolate)))
            if text_length:
                text = slice(-text_length, None)
                relative = text_relative_bias(self.token_rel_pos_table_list[layer](), 0, text_length)
                blocks.append((text, text, relative))
            return add_blocks(absolute[0], blocks)

        if grid is None:
            return layer_bias
        tables = [*self.image_rel_pos_table_list, *self.token_rel_pos_table_list]
        sources = [q, k, *(table() for table in tables), *([] if mask is None else [mask])]
        return self.biases((tuple(grid), interpolate), sources, layer_bias, len(self.layers))

    @one_photo_size_at_a_time
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> IFSegEncoderOutput:
        r"""
        Args:
            input_ids: (1 or batch, T) text tokens, or `inputs_embeds` (1 or batch, T, d_model).
            attention_mask: (1 or batch, T), 0 where the text is padding.
            pixel_values: (batch, 3, H, W) photos; pixel_mask: (batch, H, W), 0 where they are padding.
            image_embeds: (batch, h, w, d_model) image tokens in place of the projected features of a photo.
            interpolate_pos_encoding: resize the positions of an `image_size` photo to the grid, as segmentation
                does; otherwise they are looked up directly, as OFA does.
        """
        if input_ids is not None and inputs_embeds is not None:
            raise ValueError("Pass input_ids or inputs_embeds, not both.")
        if pixel_values is not None and image_embeds is not None:
            raise ValueError("Pass pixel_values or image_embeds, not both.")
        if input_ids is not None:
            inputs_embeds = self.embed_tokens(input_ids)
        image_features = None
        if pixel_values is not None:
            image_features = self.embed_images(pixel_values)
            image_embeds = self.image_proj(image_features.permute(0, 2, 3, 1))

        parts, masks, patch_mask, grid, text_length = [], [], None, None, 0
        batch = max(len(x) for x in (inputs_embeds, image_embeds) if x is not None)
        if image_embeds is not None:
            grid = image_embeds.shape[1:3]
            patch_mask = torch.ones(image_embeds.shape[:3], dtype=torch.bool, device=image_embeds.device)
            parts.append(self._embed(image_embeds.flatten(1, 2), 1, self.patch_layernorm_embedding))
            masks.append(patch_mask.flatten(1))
        if inputs_embeds is not None:
            text_length = inputs_embeds.shape[1]
            text = self._embed(inputs_embeds, 0, self.layernorm_embedding)
            if attention_mask is not None:
                text = text * attention_mask[:, :, None].to(text)
                text_mask = attention_mask.bool()
            else:
                text_mask = torch.ones(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)
            parts.append(text.expand(batch, -1, -1))
            masks.append(text_mask)
        hidden_states = cat_sequences(parts)
        mask = None
        if attention_mask is not None or pixel_mask is not None:
            # one mask, and so one bias, where all photos share it
            rows = len(masks[-1]) if pixel_mask is None else batch
            mask = cat_sequences([part[:rows].expand(rows, -1) for part in masks])

        positions = self.positions(grid, text_length, interpolate_pos_encoding)
        bias_mask = None if attention_mask is None else mask
        layer_bias = self._layer_biases(positions, bias_mask, grid, text_length, interpolate_pos_encoding)
        for i, layer in enumerate(self.layers):
            hidden_states = layer(hidden_states, layer_bias(i), **kwargs)

        return IFSegEncoderOutput(
            last_hidden_state=self.layer_norm(hidden_states),
            image_features=image_features,
            patch_mask=patch_mask,
            attention_mask=mask,
            position_embeddings=positions if pixel_mask is None else positions.expand(batch, -1, -1),
        )


class IFSegDecoder(_IFSegStack):
    """OFA's decoder: causal over its input, with cross-attention to all of the encoder's output."""

    _can_record_outputs = {
        "hidden_states": IFSegDecoderLayer,
        "attentions": OutputRecorder(IFSegAttention, index=1, layer_name="self_attn"),
        "cross_attentions": OutputRecorder(IFSegAttention, index=1, layer_name="cross_attn"),
    }

    def __init__(self, config: IFSegConfig):
        super().__init__(config, config.decoder_layers, config.decoder_attention_heads)
        d_model = config.d_model
        self.self_pos_q_linear = nn.Linear(d_model, d_model)
        self.self_pos_k_linear = nn.Linear(d_model, d_model)
        self.cross_pos_q_linear = nn.Linear(d_model, d_model)
        self.cross_pos_k_linear = nn.Linear(d_model, d_model)
        # for the image codes that OFA can generate; kept so that a checkpoint loses nothing
        self.code_layernorm_embedding = nn.LayerNorm(d_model, eps=config.layer_norm_eps)
        rates = torch.linspace(0, config.decoder_drop_path_rate, config.decoder_layers, device="cpu").tolist()
        self.layers = nn.ModuleList(IFSegDecoderLayer(config, i, rate) for i, rate in enumerate(rates))
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        encoder_position_embeddings: torch.Tensor | None = None,
        position_embeddings: torch.Tensor | None = None,
        grid: tuple[int, int] | None = None,
        relative_bias: Callable[[int], list[BiasBlock]] | None = None,
        relative_tables: list[torch.Tensor] | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        r"""
        Args:
            input_ids: (batch, S) tokens, or `inputs_embeds` (batch, S, d_model).
            attention_mask: (batch, past + S), 0 where the decoder's input is padding.
            encoder_hidden_states: (batch, K, d_model); encoder_attention_mask: bool (1 or batch, K);
                encoder_position_embeddings: (1 or batch, K, d_model).
            grid, position_embeddings: where the input is not text, the patches that it reads and its normalised
                positions, (1, S, d_model).
            relative_bias, relative_tables: gives the relative biases of a layer, blocks of (heads, S, S), and all that
                it makes them of.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass either input_ids or inputs_embeds to the decoder.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))

        start = past_key_values.get_seq_length() if past_key_values is not None else 0
        stop = start + inputs_embeds.shape[1]
        if position_embeddings is None:
            position_embeddings = self.text_positions(0, stop)
        heads, factor = self.config.decoder_attention_heads, self.config.attn_scale_factor
        queries = position_embeddings[:, start:]
        self_q, self_k = project_positions(
            self.self_pos_q_linear, self.self_pos_k_linear, queries, position_embeddings, heads, factor
        )
        cross_q, cross_k = project_positions(
            self.cross_pos_q_linear, self.cross_pos_k_linear, queries, encoder_position_embeddings, heads, factor
        )

        causal: list[torch.Tensor] = []

        def compute_bias(layer: Any) -> torch.Tensor:
            if layer == "cross":
                allowed = None if encoder_attention_mask is None else encoder_attention_mask[:, None, None].bool()
                return masked_bias(cross_q @ cross_k.transpose(2, 3), allowed)
            if not causal:
                steps = torch.arange(stop, device=self_q.device)
                allowed = steps[start:, None] >= steps
                if attention_mask is not None:
                    allowed = allowed & attention_mask[:, None, None].to(allowed.device).bool()
                causal.append(masked_bias(self_q @ self_k.transpose(2, 3), allowed))
            if relative_bias is not None:
                return add_blocks(causal[0], relative_bias(layer))
            relative = text_relative_bias(self.token_rel_pos_table_list[layer](), start, stop)
            return causal[0] + relative.to(self_q.device)

        layer_bias: Callable[[Any], torch.Tensor] = compute_bias
        if grid is not None:
            masks = [mask for mask in (attention_mask, encoder_attention_mask) if mask is not None]
            sources = [self_q, self_k, cross_q, cross_k, *relative_tables, *masks]
            layer_bias = self.biases((tuple(grid), attention_mask is None), sources, compute_bias, len(self.layers) + 1)

        hidden_states = self.layernorm_embedding(inputs_embeds)
        hidden_states = nn.functional.dropout(hidden_states, p=self.config.dropout, training=self.training)
        cross_bias = layer_bias("cross")
        for i, layer in enumerate(self.layers):
            hidden_states = layer(
                hidden_states,
                layer_bias(i),
                encoder_hidden_states,
                cross_bias,
                past_key_values=past_key_values,
                causal=grid is not None and attention_mask is None,
                **kwargs,
            )

        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=self.layer_norm(hidden_states), past_key_values=past_key_values
        )


class IFSegModel(IFSegPreTrainedModel):
    """OFA's encoder and decoder without a head."""

    _tied_weights_keys = {"decoder.embed_tokens.weight": "encoder.embed_tokens.weight"}

    def __init__(self, config: IFSegConfig):
        super().__init__(config)
        self.encoder = IFSegEncoder(config)
        self.decoder = IFSegDecoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding):
        self.encoder.embed_tokens = value
        self.decoder.embed_tokens = value

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: IFSegEncoderOutput | None = None,
        inputs_embeds: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Seq2SeqModelOutput:
        r"""
        Args:
            input_ids, attention_mask, inputs_embeds, pixel_values, pixel_mask, image_embeds,
                interpolate_pos_encoding: as for [`IFSegEncoder`].
            decoder_input_ids: (batch, S), or `decoder_inputs_embeds` (batch, S, d_model); `<s>` alone if neither.
            decoder_attention_mask: (batch, past + S).
        """
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                pixel_values=pixel_values,
                pixel_mask=pixel_mask,
                image_embeds=image_embeds,
                interpolate_pos_encoding=interpolate_pos_encoding,
                **kwargs,
            )
        hidden_states = encoder_outputs.last_hidden_state
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            start = self.config.decoder_start_token_id
            decoder_input_ids = torch.full((len(hidden_states), 1), start, device=hidden_states.device)
        decoder_outputs = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            inputs_embeds=decoder_inputs_embeds,
            encoder_hidden_states=hidden_states,
            encoder_attention_mask=encoder_outputs.attention_mask,
            encoder_position_embeddings=encoder_outputs.position_embeddings,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        return Seq2SeqModelOutput(
            last_hidden_state=decoder_outputs.last_hidden_state,
            past_key_values=decoder_outputs.past_key_values,
            decoder_hidden_states=decoder_outputs.hidden_states,
            decoder_attentions=decoder_outputs.attentions,
            cross_attentions=decoder_outputs.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
        )


class IFSegForConditionalGeneration(IFSegPreTrainedModel, GenerationMixin):
    """OFA with its token-prediction head: captions, answers and whatever else it was trained to write."""

    _tied_weights_keys = {"lm_head.weight": "model.encoder.embed_tokens.weight"}

    def __init__(self, config: IFSegConfig):
        super().__init__(config)
        self.model = IFSegModel(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: IFSegEncoderOutput | None = None,
        inputs_embeds: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Seq2SeqLMOutput:
        r"""
        Args:
            labels: (batch, S) tokens to predict, -100 ignored. They give the mean cross-entropy and, shifted by one,
                the decoder's input where that is not passed.

        The others are as for [`IFSegModel`]. The logits are (batch, S, vocab_size).
        """
        if labels is not None:
            use_cache = False
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            pixel_mask=pixel_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            inputs_embeds=inputs_embeds,
            image_embeds=image_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            interpolate_pos_encoding=interpolate_pos_encoding,
            **kwargs,
        )
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.to(logits.device).flatten())
        return Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            decoder_hidden_states=outputs.decoder_hidden_states,
            decoder_attentions=outputs.decoder_attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
            encoder_attentions=outputs.encoder_attentions,
        )

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """`labels` (batch, S) moved one to the right behind the start token, -100 replaced by padding."""
        start = labels.new_full((len(labels), 1), self.config.decoder_start_token_id)
        shifted = torch.cat([start, labels[:, :-1]], dim=1)
        return shifted.masked_fill(shifted == -100, self.config.pad_token_id)

    def _expand_inputs_for_generation(self, *args, encoder_outputs: IFSegEncoderOutput | None = None, **kwargs):
        if encoder_outputs is not None:
            # beam search repeats every tensor of the encoder's output along the batch, so none may be shared by it
            batch = len(encoder_outputs.last_hidden_state)
            encoder_outputs["position_embeddings"] = encoder_outputs.position_embeddings.expand(batch, -1, -1)
            if encoder_outputs.attention_mask is not None:
                encoder_outputs["attention_mask"] = encoder_outputs.attention_mask.expand(batch, -1)
            kwargs["encoder_outputs"] = encoder_outputs
        return super()._expand_inputs_for_generation(*args, **kwargs)


__all__ = [
    "IFSegDecoder",
    "IFSegEncoder",
    "IFSegEncoderOutput",
    "IFSegForConditionalGeneration",
    "IFSegModel",
    "IFSegPreTrainedModel",
    "IFSegTrunk",
]
