"""Attention biases of large patch grids, computed for one block of queries at a time."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .configuration_ofa import OFAConfig
from .positions_ofa import BiasBlock, GridBias

# Largest bias that is computed whole, in elements: heads * queries * keys. A larger one is computed in blocks.
LARGEST_BIAS = 2**25


def is_large(config: OFAConfig, query_positions: torch.Tensor, key_positions: torch.Tensor) -> bool:
    """Whether the bias of two [`project_positions`] should be computed in blocks.

    Not with eager attention, which returns the weights of all queries, nor in a compiled or exported model, whose sizes
    may be dynamic.
    """
    if torch.compiler.is_compiling() or config._attn_implementation == "eager":
        return False
    return query_positions.shape[1] * query_positions.shape[2] * key_positions.shape[2] > LARGEST_BIAS


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

    def rows(self) -> Iterator[slice]:
        """The blocks of queries: what precedes the patches, each line of the grid, and what follows the patches."""
        queries, stop = self.query_positions.shape[2], self.start + self.height * self.width
        if self.start:
            yield slice(0, self.start)
        for first in range(self.start, stop, self.width):
            yield slice(first, first + self.width)
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
        blocks, trained = [], torch.is_grad_enabled()
        for rows in self.rows():
            keys = slice(rows.stop if self.causal else key.shape[2])
            inputs = rows, query[:, :, rows], key[:, :, keys], value[:, :, keys], dropout
            blocks.append(checkpoint(self._attend, *inputs, use_reentrant=False) if trained else self._attend(*inputs))
        return torch.cat(blocks, dim=2).transpose(1, 2)

    def _attend(self, rows: slice, query, key, value, dropout: float) -> torch.Tensor:
        """Attention of one of the [`rows`]; on a CPU one head at a time, whose logits stay in the cache."""
        heads, keys = query.shape[1], key.shape[2]
        some = [slice(i, i + 1) for i in range(heads)] if query.device.type == "cpu" else [slice(heads)]
        allowed = None if self.allowed is None else self.allowed[..., :keys].to(query.device)
        if self.causal:
            steps = torch.arange(keys, device=query.device)
            causal = steps[rows, None] >= steps
            allowed = causal if allowed is None else causal & allowed
        outputs = []
        for h in some:
            bias = self._relative_bias(rows, h, query.dtype, keys)
            product = query[:, h], key[:, h].mT
            logits = torch.matmul(*product) if bias is None else _add_product(bias, *product)
            if allowed is not None:
                logits = logits.masked_fill(~allowed, torch.finfo(logits.dtype).min)
            weights = logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32)).to(value.dtype)
            outputs.append(nn.functional.dropout(weights, p=dropout, training=dropout > 0) @ value[:, h])
        return torch.cat(outputs, dim=1)

    def _relative_bias(self, rows: slice, heads: slice, dtype: torch.dtype, keys: int) -> torch.Tensor | None:
        """Relative biases of a block of queries and the first keys, (heads, queries, keys)."""
        if self.grid is None:
            return None
        line, offset = divmod(rows.start - self.start, self.width)
        if offset == 0 and 0 <= line < self.height:
            bias = self.grid.line(line, line + 1 if self.causal else self.height, heads).to(dtype)
            bias = nn.functional.pad(bias, (self.start, keys - self.start - bias.shape[2]))
        else:
            size = len(range(self.query_positions.shape[1])[heads]), rows.stop - rows.start, keys
            bias = self.query_positions.new_zeros(size, dtype=dtype)
        for block_rows, columns, values in self.blocks:
            first, last, _ = block_rows.indices(self.query_positions.shape[2])
            if first <= rows.start and rows.stop <= last:
                inside = slice(rows.start - first, rows.stop - first) if values.shape[1] > 1 else slice(None)
                bias[..., columns] += values[heads, inside].to(dtype)
        return bias


def _add_product(bias: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """bias (heads, queries, keys) + query (batch, heads, queries, d) @ key (batch, heads, d, keys)."""
    batch, heads = query.shape[:2]
    if batch == 1:
        return bias.baddbmm_(query[0], key[0])[None]
    bias = bias.expand(batch, -1, -1, -1).flatten(0, 1)
    return torch.baddbmm(bias, query.flatten(0, 1), key.flatten(0, 1)).unflatten(0, (batch, heads))
