"""Positions of OFA as attention biases.

Positions are never added to tokens: they enter as biases of the attention logits, an absolute bias shared by all layers
and a relative one per layer.
"""

import math
from collections.abc import Sequence
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


@dataclass
class GridBias:
    """
    Relative biases between the patches of a grid, in a compact form that yields those of one line of queries at a time.

    Args:
        columns: (heads, width, D, width), the bias of a query in column x and a key in column x' whose lines differ by
            d - (D - 1) / 2 = y' - y.
        lines: `None`, or (D, height, height) if lines are resized: the bias of query (y, x) and key (y', x') is the sum
            over d of lines[d, y, y'] * columns[head, x, d, x']. D is then independent of the height.
    """

    columns: torch.Tensor
    lines: torch.Tensor | None = None

    @classmethod
    def from_table(cls, table: torch.Tensor, height: int, width: int, side: int | None = None) -> "GridBias":
        """
        Args:
            table: ((2g - 1)^2, heads); the row of query (y, x) and key (y', x') is
                (y - y' + g - 1) * (2g - 1) + (x - x' + g - 1), for grids of at most g x g.
            side: resize the biases of the side x side grid bilinearly to height x width, over keys and over queries.
                The result is float32, or float64 if the table is.
        """
        diagonals = math.isqrt(len(table))
        window = table.view(diagonals, diagonals, -1).permute(2, 0, 1).flip(1)
        any_size = is_symbolic(height, width)
        if side is None or (not any_size and (height, width) == (side, side)):
            rows, columns = (slice(diagonals // 2 - n + 1, diagonals // 2 + n) for n in (height, width))
            columns = window[:, rows, columns].unfold(2, width, 1).flip(3)
            return cls(columns.transpose(1, 2).contiguous())
        crop = slice(diagonals // 2 - side + 1, diagonals // 2 + side)
        window = window[:, crop, crop].to(torch.promote_types(table.dtype, torch.float32))
        columns = _resized_differences(window, side, width).transpose(1, 2).contiguous()
        if not any_size and height == side:  # as for every image that is wider than high: only columns are resized
            return cls(columns)
        one_hot = torch.eye(2 * side - 1, dtype=window.dtype, device=window.device).flip(1)
        return cls(columns, _resized_differences(one_hot, side, height))

    @property
    def height(self) -> int:
        return (self.columns.shape[2] + 1) // 2 if self.lines is None else self.lines.shape[1]

    @property
    def width(self) -> int:
        return self.columns.shape[3]

    def line(self, y: int, key_lines: int | None = None, heads: slice = slice(None)) -> torch.Tensor:
        """Biases of the queries in line y and the keys in the first lines, (heads, width, key_lines * width)."""
        key_lines = self.height if key_lines is None else key_lines
        if self.lines is None:
            first = self.height - 1 - y
            return self.columns[heads, :, first : first + key_lines].flatten(2)
        return (self.lines[:, y, :key_lines].T @ self.columns[heads]).flatten(2)

    def part(self, first: int, stop: int, key_lines: int, heads: slice = slice(None)) -> torch.Tensor:
        """Biases of the queries in lines first..stop-1, (heads, (stop - first) * width, key_lines * width)."""
        if stop - first == 1:
            return self.line(first, key_lines, heads)
        columns = self.columns[heads]
        if self.lines is None:
            start = self.height - stop  # of the window of the last line
            bias = columns[:, :, start : self.height - first - 1 + key_lines].unfold(2, key_lines, 1).flip(2)
            bias = bias.permute(0, 2, 1, 4, 3)  # from (heads, x, y, x', y')
        else:
            # one product maps the few differences of lines to all pairs of them
            lines = self.lines[:, first:stop, :key_lines]
            bias = columns.transpose(2, 3).flatten(1, 2) @ lines.flatten(1)
            bias = bias.view(len(columns), self.width, self.width, *lines.shape[1:]).permute(0, 3, 1, 4, 2)
        return bias.reshape(len(columns), -1, key_lines * self.width)

    def whole(self) -> torch.Tensor:
        """Biases of all patches, (heads, height * width, height * width)."""
        return self.part(0, self.height, self.height)

    def gradient(self, grad: torch.Tensor) -> torch.Tensor:
        """The gradient of `columns`, from the gradient of [`whole`]."""
        result = torch.zeros_like(self.columns)
        for y in range(self.height):
            line = grad[:, y * self.width : (y + 1) * self.width].unflatten(2, (self.height, self.width))
            if self.lines is None:
                first = self.height - 1 - y
                result[:, :, first : first + self.height] += line
            else:
                result += self.lines[:, y] @ line.to(result.dtype)
        return result

    def to(self, *args, **kwargs) -> "GridBias":
        """A copy on a device or with a dtype, as of a tensor."""
        lines = None if self.lines is None else self.lines.to(*args, **kwargs)
        return GridBias(self.columns.to(*args, **kwargs), lines)


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
    """[`add_blocks`] with compact gradients; autograd would copy the whole gradient for each addition in place.

    places: rows and columns of each block, and `lines` of a [`GridBias`], whose `columns` are the block.
    """

    @staticmethod
    def forward(
        bias: torch.Tensor, places: list[tuple[slice, slice, torch.Tensor | None]], *blocks: torch.Tensor
    ) -> torch.Tensor:
        return _AddBlocks.add_in_place(bias.clone(), places, *blocks)

    @staticmethod
    def add_in_place(bias: torch.Tensor, places: list, *blocks: torch.Tensor) -> torch.Tensor:
        """`bias` with the blocks added to it, without a gradient."""
        for (rows, columns, lines), block in zip(places, blocks, strict=True):
            part = bias[:, :, rows, columns]
            if block.ndim == 3:
                part += block
                continue
            grid = GridBias(block, lines)
            for y in range(grid.height):  # a line stays in the processor's cache
                part[:, :, y * grid.width : (y + 1) * grid.width] += grid.line(y)
        return bias

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.places, *blocks = inputs
        ctx.save_for_backward(*(block for block in blocks if block.ndim == 4))
        ctx.shapes = [block.shape for block in blocks]

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        shared = grad[0] if len(grad) == 1 else grad.sum(0)
        columns_of_grids = iter(ctx.saved_tensors)
        gradients = []
        for (rows, columns, lines), shape in zip(ctx.places, ctx.shapes, strict=True):
            part = shared[:, rows, columns]
            if len(shape) == 3:
                gradients.append(part.sum_to_size(shape))
            else:
                gradients.append(GridBias(next(columns_of_grids), lines).gradient(part))
        return grad, None, *gradients


# A part of a bias: its rows (queries), its columns (keys), and the values to add, (heads, rows, columns) or of size 1.
BiasBlock = tuple[slice, slice, torch.Tensor]


def add_blocks(
    bias: torch.Tensor, blocks: Sequence[tuple[slice, slice, torch.Tensor | GridBias]], reuse: bool = False
) -> torch.Tensor:
    """The sum of `bias` (1 or batch, heads, queries, keys) and blocks that do not overlap.

    On a CPU a [`GridBias`] is added line by line, without its whole bias in memory. With `reuse`, for a `bias` that the
    caller no longer needs, the sum is written to `bias` unless gradients are enabled.
    """
    compiling = torch.compiler.is_compiling()
    places, values = [], []
    for rows, columns, block in blocks:
        block = block.to(bias.device)
        if isinstance(block, GridBias) and (compiling or bias.device.type != "cpu"):
            block = block.whole().to(bias.dtype)
        grid = isinstance(block, GridBias)
        places.append((rows, columns, block.lines if grid else None))
        values.append(block.columns if grid else block)
    if compiling:  # ONNX transposes for additions in place, torch.compile cannot trace _AddBlocks
        padded = [_pad_block(block, *place[:2], bias.shape) for place, block in zip(places, values, strict=True)]
        return sum(padded, start=bias)
    if reuse and not torch.is_grad_enabled():
        return _AddBlocks.add_in_place(bias, places, *values)
    return _AddBlocks.apply(bias, places, *values)


def _pad_block(block: torch.Tensor, rows: slice, columns: slice, shape: torch.Size) -> torch.Tensor:
    """The values of a block, (heads, queries, keys) for a bias of this shape, with zeros around them."""
    sides, sizes = [], []
    for part, size in ((columns, shape[3]), (rows, shape[2])):  # slice.indices would make constants of dynamic sizes
        start, stop = part.start or 0, size if part.stop is None else part.stop
        start = start + size if start < 0 else start
        sides += [start, size - stop]
        sizes.append(stop - start)
    return nn.functional.pad(block.expand(-1, *reversed(sizes)), sides)


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

    def relative_bias(self, layer: int) -> list[tuple[slice, slice, torch.Tensor | GridBias]]:
        """Relative biases of a layer, blocks of (heads, height * width + 1, height * width + 1)."""
        table, patches = self.tables[layer], slice(1, None)
        bias = GridBias.from_table(table[:-3], *self.grid, self.side)
        return [(patches, patches, bias), *start_token_blocks(table[-3:])]


__all__ = [
    "BiasBlock",
    "GridBias",
    "OFAPatchPositions",
    "OFATable",
    "add_blocks",
    "cat_sequences",
    "is_symbolic",
    "masked_bias",
    "positions_of_any_grid",
    "project_positions",
    "resize_grid",
    "start_token_blocks",
    "text_relative_bias",
]
