"""Positions of OFA as attention biases.

Positions are never added to tokens: they enter as biases of the attention logits, an absolute bias shared by all layers
and a relative one per layer.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn


class OFATable(nn.Embedding):
    """An embedding that also returns its whole table, when called without indices.

    Call the table instead of reading `.weight`: accelerate loads offloaded weights only when a module is called.
    """

    def forward(self, input: torch.Tensor | None = None) -> torch.Tensor:
        return self.weight if input is None else super().forward(input)


def is_symbolic(height: int | torch.SymInt, width: int | torch.SymInt) -> bool:
    """Whether the size of a grid is known only when an exported model runs."""
    return isinstance(height, torch.SymInt) or isinstance(width, torch.SymInt)


def resize_grid(grid: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Bilinear resizing (align_corners false) of the last two dimensions of `grid` (..., h, w)."""
    if not is_symbolic(height, width) and grid.shape[-2:] == (height, width):
        return grid
    planes = grid.reshape(-1, 1, *grid.shape[-2:])
    planes = nn.functional.interpolate(planes, size=(height, width), mode="bilinear", align_corners=False)
    return planes.view(*grid.shape[:-2], height, width)


def positions_of_any_grid(grid: torch.Tensor, base: int, height: torch.SymInt, width: torch.SymInt) -> torch.Tensor:
    """
    Positions of a grid whose size [`is_symbolic`], (height * width, d_model), as [`_OFAStack.image_positions`] does.

    Both cases are computed: a grid with at most as many patches as base x base has its own positions, a larger one
    those of base x base, resized.

    Args:
        grid: the positions that the model has, (side, side, d_model).
    """
    side = grid.shape[0]
    resized = resize_grid(grid[:base, :base].permute(2, 0, 1), height, width).flatten(1).T
    rows, columns = (torch.arange(size, device=grid.device).clamp(max=side - 1) for size in (height, width))
    own = grid[rows][:, columns].flatten(0, 1)
    patches, *sides = (torch.scalar_tensor(count, device=grid.device) for count in (height * width, height, width))
    fits = (patches <= base**2) & (sides[0] <= side) & (sides[1] <= side)
    return torch.where(fits, own, resized)


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
    return _grid_bias_of_lines(window.unfold(2, width, 1).transpose(1, 2).flip(2, 3))


def _grid_bias_of_lines(lines: torch.Tensor) -> torch.Tensor:
    """Biases between the patches of a grid, (heads, height * width, height * width), from those between its lines.

    lines: (heads, x, y' - y, x') in ascending order of y' - y: the biases of the queries of one line are a slice.
    """
    height, width = (lines.shape[2] + 1) // 2, lines.shape[3]
    bias = torch.stack([lines[:, :, height - 1 - y : 2 * height - 1 - y] for y in range(height)], dim=1)
    return bias.view(-1, height * width, height * width)


def resized_grid_relative_bias(table: torch.Tensor, side: int, height: int, width: int) -> torch.Tensor:
    """Biases of the side x side grid resized bilinearly to height x width, over keys and over queries.

    Returns (heads, height * width, height * width); `table` is as for [`grid_relative_bias`].
    """
    any_size = is_symbolic(height, width)
    if not any_size and (height, width) == (side, side):
        return grid_relative_bias(table, side, side)
    window = table if table.dtype == torch.float64 else table.float()
    diagonals = math.isqrt(len(window))
    window = window.view(diagonals, diagonals, -1).permute(2, 0, 1)
    crop = slice(diagonals // 2 - side + 1, diagonals // 2 + side)
    if not any_size and height == side:  # as for every image that is wider than high: only columns are resized
        columns = _resized_differences(window[:, crop, crop], side, width)
        return _grid_bias_of_lines(columns.transpose(1, 2).flip(2)).to(table.dtype)
    one_hot = torch.eye(2 * side - 1, dtype=window.dtype, device=window.device)
    # Bilinear resizing is separable. Rows first, to the small (heads, x - x', y, y'); then one product maps the
    # 2 * side - 1 distances x - x' to pairs of columns.
    rows = _resized_differences(window[:, crop, crop].transpose(1, 2), side, height)
    columns = _resized_differences(one_hot, side, width)
    bias = rows.permute(0, 2, 3, 1) @ columns.flatten(1)
    bias = bias.unflatten(3, (width, width)).transpose(2, 3)
    return bias.reshape(-1, height * width, height * width).to(table.dtype)


def resized_grid_factors(table: torch.Tensor, side: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of [`resized_grid_relative_bias`]: lines (D, height, height) and columns (heads, D, width, width).

    The bias of query (y, x) and key (y', x') is the sum of lines[d, y, y'] * columns[:, d, x, x'] over the
    D = 2 * side - 1 distances d. Both are float32, or float64 if the table is.
    """
    window = table if table.dtype == torch.float64 else table.float()
    diagonals = math.isqrt(len(window))
    crop = slice(diagonals // 2 - side + 1, diagonals // 2 + side)
    window = window.view(diagonals, diagonals, -1).permute(2, 0, 1)[:, crop, crop]
    one_hot = torch.eye(2 * side - 1, dtype=window.dtype, device=window.device)
    return _resized_differences(one_hot, side, height), _resized_differences(window, side, width)


def _resized_differences(values: torch.Tensor, side: int, size: int) -> torch.Tensor:
    """Values that depend on the difference i - j of two axes of length `side`, with both axes resized linearly.

    values: (..., 2 * side - 1), the value of difference 0 in the middle. Returns (..., size, size).
    """
    basis = torch.eye(side, dtype=values.dtype, device=values.device)
    resize = nn.functional.interpolate(basis[None], size=size, mode="linear", align_corners=False)[0]
    return resize.T @ values.unfold(-1, side, 1).flip(-1) @ resize


def text_relative_bias(table: torch.Tensor, query_start: int, key_length: int) -> torch.Tensor:
    """Biases between text tokens, (heads, key_length - query_start, key_length).

    Queries are the positions from `query_start`, keys all `key_length` positions. Each distance i - j of at most
    bucket_size / 2 has a row in the table; longer distances, up to 1023, share logarithmic buckets.

    Args:
        table: (2 * bucket_size - 1, heads); distance 0 is the middle row.
    """
    bucket_size = (len(table) + 1) // 2
    mid = bucket_size // 2
    positions = torch.arange(key_length, device=table.device)
    distance = positions[query_start:, None] - positions
    far = torch.log(distance.abs().clamp(min=mid) / mid) / math.log(1023 / mid) * (mid - 1)
    # clamped, since a device that rounds the logarithm of distance 1023 up would read behind the table
    far = far.ceil().long().clamp(max=mid - 1) + mid
    bucket = torch.where(distance.abs() <= mid, distance, distance.sign() * far)
    return table[bucket + bucket_size - 1].permute(2, 0, 1)


class _AddBlocks(torch.autograd.Function):
    """[`add_blocks`] whose gradients are views; autograd would copy the whole gradient for each addition in place."""

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


# A part of a bias: its rows (queries), its columns (keys), and the values to add, (heads, rows, columns) or of size 1.
BiasBlock = tuple[slice, slice, torch.Tensor]


def add_blocks(bias: torch.Tensor, blocks: list[BiasBlock]) -> torch.Tensor:
    """The sum of `bias` (1 or batch, heads, queries, keys) and blocks that do not overlap."""
    blocks = [(rows, columns, block.to(bias.device)) for rows, columns, block in blocks]
    if torch.compiler.is_compiling():  # ONNX transposes for additions in place, torch.compile cannot trace _AddBlocks
        return sum((_pad_block(block, *bias.shape[2:]) for block in blocks), start=bias)
    return _AddBlocks.apply(bias, [block[:2] for block in blocks], *(block for _, _, block in blocks))


def _pad_block(block: BiasBlock, queries: int, keys: int) -> torch.Tensor:
    """The values of a block, (heads, queries, keys), with zeros around them."""
    sides, sizes = [], []
    for part, size in ((block[1], keys), (block[0], queries)):  # slice.indices would make constants of dynamic sizes
        start, stop = part.start or 0, size if part.stop is None else part.stop
        start = start + size if start < 0 else start
        sides += [start, size - stop]
        sizes.append(stop - start)
    return nn.functional.pad(block[2].expand(-1, *reversed(sizes)), sides)


def start_token_blocks(rows: torch.Tensor) -> list[BiasBlock]:
    """
    Relative biases of `<s>` and the patches behind it, without those between patches.

    Args:
        rows: (3, heads), the last rows of a relative table: `<s>` as query, as key, as both.
    """
    start, patches = slice(0, 1), slice(1, None)
    query, key, both = rows[:, :, None, None].unbind()
    return [(start, patches, query), (patches, start, key), (start, start, both)]


def project_positions(
    query_linear: nn.Linear, key_linear: nn.Linear, queries: torch.Tensor, keys: torch.Tensor, heads: int, factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """W_q p_i * s and W_k p_j per head, each (batch, heads, length, head_dim), s = (factor * head_dim)^-0.5.

    queries, keys: normalised positions, (batch, length, d_model); a batch of 1 is shared by all images. The absolute
    bias is the product of the two over head_dim.
    """
    scale = (factor * query_linear.out_features / heads) ** -0.5
    q = (query_linear(queries) * scale).unflatten(-1, (heads, -1)).transpose(1, 2)
    k = key_linear(keys).unflatten(-1, (heads, -1)).transpose(1, 2)
    return q, k.to(q.device)


def cat_sequences(parts: list[torch.Tensor]) -> torch.Tensor:
    """Concatenation of (batch, length, ...) tensors along their lengths, on the device of the first."""
    return torch.cat([part.to(parts[0].device) for part in parts], dim=1)


def masked_bias(bias: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
    """`bias` (batch, heads, queries, keys) with the dtype's minimum where `allowed` (broadcastable) is false."""
    return bias if allowed is None else bias.masked_fill(~allowed.to(bias.device), torch.finfo(bias.dtype).min)


@dataclass
class OFAPatchPositions:
    """
    Positions of `<s>` and the patches of a grid, for a decoder that reads patches instead of text.

    Args:
        grid: height and width in patches.
        embeddings: (1, height * width + 1, d_model), normalised.
        tables: relative tables of all layers, the rows of [`start_token_blocks`] last.
        side: side of the square grid whose relative biases are resized.
    """

    grid: tuple[int, int]
    embeddings: torch.Tensor
    tables: list[torch.Tensor]
    side: int

    def relative_bias(self, layer: int) -> list[BiasBlock]:
        """Relative biases of a layer, blocks of (heads, height * width + 1, height * width + 1)."""
        table, patches = self.tables[layer], slice(1, None)
        bias = resized_grid_relative_bias(table[:-3], self.side, *self.grid)
        return [(patches, patches, bias), *start_token_blocks(table[-3:])]


__all__ = [
    "BiasBlock",
    "OFAPatchPositions",
    "OFATable",
    "add_blocks",
    "cat_sequences",
    "grid_relative_bias",
    "is_symbolic",
    "masked_bias",
    "positions_of_any_grid",
    "project_positions",
    "resize_grid",
    "resized_grid_factors",
    "resized_grid_relative_bias",
    "start_token_blocks",
    "text_relative_bias",
]
