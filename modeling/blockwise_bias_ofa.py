"""Attention biases of large patch grids, computed for one block of queries at a time."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .configuration_ofa import OFAConfig
from .positions_ofa import BiasBlock, GridBias

# Largest bias that is computed whole, in elements: heads * queries * keys. A larger one is computed in blocks.
LARGEST_BIAS = 2**25
# Heads whose logits of a line of a large grid are computed together on a CPU: as many as stay in the cache.
HEADS_IN_BLOCK = 4
# Logits that are computed together on a GPU, of several lines: enough to fill it, 256 MB in float32.
LOGITS_IN_GPU_BLOCK = 2**26


def _needs_whole_bias(config: OFAConfig) -> bool:
    """Whether attention is eager, which returns the weights of all queries, or the model is compiled or exported."""
    return torch.compiler.is_compiling() or config._attn_implementation == "eager"


def is_large(config: OFAConfig, query_positions: torch.Tensor, key_positions: torch.Tensor) -> bool:
    """Whether the bias of two [`project_positions`] should be computed in blocks."""
    if _needs_whole_bias(config):  # first, since an exported model may have dynamic sizes
        return False
    return query_positions.shape[1] * query_positions.shape[2] * key_positions.shape[2] > LARGEST_BIAS


def on_gpu(tensor: torch.Tensor) -> bool:
    """Whether a tensor is on a GPU, where few large operations are faster than many that stay in a cache."""
    return tensor.device.type != "cpu"


def trains_on_gpu(config: OFAConfig, positions: torch.Tensor) -> bool:
    """Whether a bias of [`project_positions`] gets a gradient on a GPU, where kernels with a whole bias are slow."""
    trained = torch.is_grad_enabled() and positions.requires_grad
    return trained and on_gpu(positions) and not _needs_whole_bias(config)


@dataclass
class BlockwiseBias:
    """
    An attention bias (1 or batch, heads, queries, keys) that is never whole in memory.

    The absolute bias of a block is a product of two thin matrices, the relative bias of a line of the grid a product of
    the line's and the columns' resizing. A model with 32 x 32 patches segments images of 128 x 128 patches this way.

    Args:
        query_positions, key_positions: see [`project_positions`].
        grid: relative biases of the patches; `None` in cross-attention.
        height, width: the grid of the patches among the queries.
        start: index of the first patch, in the queries and, if there is a `grid`, in the keys.
        blocks: biases of other queries and keys, as for [`add_blocks`].
        allowed: bool, broadcastable to (batch, heads, 1, keys): keys that are not masked.
        causal: masks all keys after a query.
    """

    query_positions: torch.Tensor
    key_positions: torch.Tensor
    height: int
    width: int
    grid: GridBias | None = None
    start: int = 0
    blocks: list[BiasBlock] = field(default_factory=list)
    allowed: torch.Tensor | None = None
    causal: bool = False

    def to(self, device: torch.device, **kwargs) -> "BlockwiseBias":
        """A copy on a device. accelerate calls this where the layers of a model are on several devices."""

        def move(value):
            if isinstance(value, torch.Tensor | GridBias):
                return value.to(device, **kwargs)
            return [(rows, columns, move(x)) for rows, columns, x in value] if isinstance(value, list) else value

        return BlockwiseBias(**{x.name: move(getattr(self, x.name)) for x in fields(self)})

    def rows(self, lines: int) -> Iterator[slice]:
        """The blocks of queries: what precedes the patches, some lines of the grid, and what follows the patches."""
        queries, stop = self.query_positions.shape[2], self.start + self.height * self.width
        if self.start:
            yield slice(0, self.start)
        for first in range(self.start, stop, lines * self.width):
            yield slice(first, min(first + lines * self.width, stop))
        if queries > stop:
            yield slice(stop, queries)

    def attention(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, dropout: float
    ) -> torch.Tensor:
        """Softmax attention in blocks, with this bias; the backward pass computes each block again.

        query, key, value: (batch, heads, length, head_dim). Returns (batch, queries, heads, head_dim).
        """
        batch = query.shape[0]
        # The absolute bias is a part of the product of queries and keys, with more columns.
        query = torch.cat([query * scaling, self.query_positions.to(query.dtype).expand(batch, -1, -1, -1)], dim=3)
        key = torch.cat([key, self.key_positions.to(key.dtype).expand(batch, -1, -1, -1)], dim=3)
        if self.is_absolute and on_gpu(query):
            return self._attend_at_once(query, key, value, dropout)
        key = key.mT.contiguous()  # products with few columns of transposed keys are faster
        inputs = query, key, value, dropout
        lines = 1
        if on_gpu(query):
            lines = max(1, LOGITS_IN_GPU_BLOCK // (batch * query.shape[1] * self.width * key.shape[3]))
        rows_of_blocks = list(self.rows(lines))
        if torch.is_grad_enabled():
            blocks = [checkpoint(self._attend, *inputs, rows, use_reentrant=False) for rows in rows_of_blocks]
        else:
            queries = max(len(range(query.shape[2])[rows]) for rows in rows_of_blocks)
            buffer = query.new_empty(batch * query.shape[1] * queries * key.shape[3])
            blocks = [self._attend(*inputs, rows, buffer) for rows in rows_of_blocks]
        return torch.cat(blocks, dim=2).transpose(1, 2)

    @property
    def is_absolute(self) -> bool:
        """Whether there is nothing but the absolute bias, as in cross-attention without a mask."""
        return self.grid is None and self.allowed is None and not self.blocks and not self.causal

    @staticmethod
    def _attend_at_once(query, key, value, dropout: float) -> torch.Tensor:
        """Attention without any other bias than that of the additional columns, in torch's fused kernel."""
        columns = value.shape[3]
        value = nn.functional.pad(value, (0, query.shape[3] - columns))  # the kernels need heads of one size
        output = nn.functional.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=1.0)
        return output[..., :columns].transpose(1, 2)

    def _attend(self, query, key, value, dropout: float, rows: slice, buffer: torch.Tensor | None = None):
        """
        Attention of one of the [`rows`]; on a CPU in blocks of heads.

        Args:
            key: (batch, heads, head_dim, keys), transposed.
            buffer: memory for the logits, since new memory for each block is slow; `None` if autograd needs them.
        """
        heads, keys = query.shape[1], rows.stop if self.causal else key.shape[3]
        size = heads if on_gpu(query) else HEADS_IN_BLOCK
        outputs = []
        for h in (slice(i, i + size) for i in range(0, heads, size)):
            q, k, v = query[:, h, rows], key[:, h, :, :keys], value[:, h, :keys]
            shape = *q.shape[:3], keys
            logits = q.new_empty(shape) if buffer is None else buffer[: math.prod(shape)].view(shape)
            if self.grid is not None:
                self._write_relative_bias(logits, rows, h)
            factors = q.flatten(0, 1), k.flatten(0, 1)
            logits.flatten(0, 1).baddbmm_(*factors, beta=0 if self.grid is None else 1)
            least = torch.finfo(logits.dtype).min
            if self.allowed is not None:
                logits.masked_fill_(~self.allowed[..., :keys].to(logits.device), least)
            if self.causal:  # of the keys up to the last query, only those of the block follow a query
                later = torch.ones(shape[2], shape[2], dtype=torch.bool, device=logits.device).triu(1)
                logits[..., rows].masked_fill_(later, least)
            exact = torch.promote_types(logits.dtype, torch.float32)
            if buffer is None or exact != logits.dtype:
                weights = logits.softmax(dim=-1, dtype=exact).to(v.dtype)
            else:
                weights = torch.softmax(logits, dim=-1, out=logits)
            outputs.append(nn.functional.dropout(weights, p=dropout, training=dropout > 0) @ v)
        return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]

    def _write_relative_bias(self, result: torch.Tensor, rows: slice, heads: slice) -> None:
        """Writes the relative biases of a block of queries and the first keys to `result` (..., heads, rows, keys)."""
        line, offset = divmod(rows.start - self.start, self.width)
        first = last = self.start
        if offset == 0 and 0 <= line < self.height:
            stop = line + (rows.stop - rows.start) // self.width
            values = self.grid.part(line, stop, stop if self.causal else self.height, heads)
            last += values.shape[2]
            result[..., first:last] = values
        result[..., :first] = 0
        result[..., last:] = 0
        for block_rows, columns, values in self.blocks:
            first, last, _ = block_rows.indices(self.query_positions.shape[2])
            if first <= rows.start and rows.stop <= last:
                inside = slice(rows.start - first, rows.stop - first) if values.shape[1] > 1 else slice(None)
                result[..., columns] += values[heads, inside]
