"""A fully connected conditional random field, which fits label maps to the colours of an image (DenseCRF).

Krähenbühl and Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials" (2011): mean-field
inference, whose messages between all pairs of pixels are two Gaussian filters. The filter over positions is a
separable sum; the filter over positions and colours is approximated on the permutohedral lattice (Adams, Baek and
Davis, "Fast High-Dimensional Filtering Using the Permutohedral Lattice", 2010).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import conv2d, embedding_bag

_SMALLEST = 1e-5  # probabilities below are raised to it, so that no label is impossible


@dataclass(frozen=True)
class DenseCRFSettings:
    """
    Settings of the field; the defaults are those of the published code.

    Args:
        iterations: of mean-field inference.
        gaussian_sxy, gaussian_weight: standard deviation in pixels and weight of the filter over positions.
        bilateral_sxy, bilateral_srgb, bilateral_weight: standard deviations in pixels and in colours from 0 to 255, and
            weight, of the filter over positions and colours.
    """

    iterations: int = 10
    gaussian_sxy: float = 1.0
    gaussian_weight: float = 3.0
    bilateral_sxy: float = 67.0
    bilateral_srgb: float = 3.0
    bilateral_weight: float = 4.0


def dense_crf(probabilities: Tensor, image: Tensor, settings: DenseCRFSettings | None = None) -> Tensor:
    """
    Returns the probabilities of an image's labels after mean-field inference.

    The energy of two pixels with different labels is the sum of the weights times the kernels, which are normalised
    symmetrically; a pixel's own energy is its negative log-probability.

    Args:
        probabilities (`Tensor` of shape `(categories, height, width)`): of each pixel, any floating type.
        image (`Tensor` of shape `(height, width, 3)`): RGB from 0 to 255, of the same size and device.
        settings ([`DenseCRFSettings`], *optional*).

    Returns:
        `Tensor` of shape `(categories, height, width)`, float32.

    Raises:
        `ValueError` where the sizes differ.
    """
    settings = settings or DenseCRFSettings()
    categories, height, width = probabilities.shape
    if image.shape != (height, width, 3):
        raise ValueError(
            f"The image has shape {tuple(image.shape)}, and the probabilities are for {height} x {width} pixels: give "
            f"an RGB image of shape {(height, width, 3)}."
        )
    with torch.autocast(probabilities.device.type, enabled=False):
        logits = probabilities.float().clamp(min=_SMALLEST).log().flatten(1).T.contiguous()  # (pixels, categories)
        near = _Normalized(
            _PositionFilter(height, width, settings.gaussian_sxy, logits.device),
            height * width,
            settings.gaussian_weight,
        )
        positions = torch.meshgrid(*(torch.arange(n, device=image.device) for n in (height, width)), indexing="ij")
        colours = image.reshape(-1, 3).float() / settings.bilateral_srgb
        places = torch.stack(positions, dim=-1).reshape(-1, 2).float() / settings.bilateral_sxy
        lattice = PermutohedralLattice(torch.cat([places, colours], dim=1))
        alike = _Normalized(lattice, height * width, settings.bilateral_weight)
        current = logits.softmax(1)
        for _ in range(settings.iterations):
            current = near(current).add_(alike(current)).add_(logits).softmax(1)
    return current.T.reshape(categories, height, width)


class _Normalized:
    """A filter K, normalised symmetrically, times a weight w: w D^-1/2 K D^-1/2 with the row sums D of K."""

    def __init__(self, kernel, pixels: int, weight: float):
        self.kernel = kernel
        self.scale = kernel(torch.ones(pixels, 1, device=kernel.device)).clamp(min=1e-20).rsqrt()
        self.weighted = weight * self.scale

    def __call__(self, values: Tensor) -> Tensor:
        return self.kernel(self.scale * values).mul_(self.weighted)


class _PositionFilter:
    """Sums values (pixels, n) over an image with the weights exp(-distance² / 2 sigma²), cut off at 5 sigma a side."""

    def __init__(self, height: int, width: int, sigma: float, device: torch.device):
        self.size, self.device = (height, width), device
        self.reach = math.ceil(5 * sigma)
        steps = torch.arange(-self.reach, self.reach + 1, device=device)
        self.weights = torch.exp(-0.5 * (steps / sigma) ** 2)

    def __call__(self, values: Tensor) -> Tensor:
        count = values.shape[1]
        image = values.reshape(1, *self.size, count).permute(0, 3, 1, 2)  # channels last, so nothing is copied
        vertical = self.weights.view(1, 1, -1, 1).expand(count, -1, -1, -1)
        rows = conv2d(image, vertical, padding=(self.reach, 0), groups=count)
        both = conv2d(rows, vertical.transpose(2, 3), padding=(0, self.reach), groups=count)
        return both.permute(0, 2, 3, 1).reshape(-1, count)


class PermutohedralLattice:
    """
    Sums values over points with the weights exp(-|f_i - f_j|² / 2), up to a common factor.

    A point's values are distributed to the d + 1 lattice points around it, blurred along the d + 1 directions of the
    lattice, and read back. Time and memory are linear in the number of points.

    Args:
        features (`Tensor` of shape `(points, d)`, float32): positions of the points.
    """

    def __init__(self, features: Tensor):
        self.device = features.device
        count, dimensions = features.shape
        packed, weights, radices = _surrounding(features)
        packed, order = packed.T.flatten().sort()
        points, counts = packed.unique_consecutive(return_counts=True)
        self.count = len(points)

        rows = torch.empty_like(order)
        rows[order] = torch.repeat_interleave(torch.arange(self.count, device=self.device), counts)
        self.weights = weights.T.contiguous()
        self.lattice_points = rows.view(count, -1)
        self.members = order // (dimensions + 1)
        self.member_weights = self.weights.flatten()[order]
        self.offsets = counts.cumsum(0) - counts
        self.neighbors = [self._neighbors(points, radices, axis) for axis in range(dimensions + 1)]
        self.blur = torch.tensor([1.0, 0.5, 0.5], device=self.device)

    def _neighbors(self, points: Tensor, radices: list[int], axis: int) -> Tensor:
        """Each lattice point and its two neighbours in a direction, (count + 1, 3); row `count` is a missing point."""
        step = -sum(radices) + (len(radices) + 1) * (radices[axis] if axis < len(radices) else 0)
        own = torch.arange(self.count + 1, device=self.device)
        found = torch.searchsorted(points, points + step).clamp(max=self.count - 1)
        exists = points[found] == points + step
        nearby = torch.full((2, self.count + 1), self.count, device=self.device)
        nearby[0, :-1] = found.where(exists, self.count)
        nearby[1].scatter_(0, nearby[0, :-1], own[:-1])  # the neighbour's neighbour in the other direction
        nearby[1, -1] = self.count
        return torch.stack([own, *nearby], dim=1)

    def __call__(self, values: Tensor) -> Tensor:
        """Filters values (points, n), float32."""
        table = embedding_bag(
            self.members, values.contiguous(), self.offsets, mode="sum", per_sample_weights=self.member_weights
        )
        table = torch.cat([table, table.new_zeros(1, table.shape[1])])
        blur = self.blur.expand(len(table), -1).contiguous()
        for neighbors in self.neighbors:
            table = embedding_bag(neighbors, table, mode="sum", per_sample_weights=blur)
            table[-1] = 0
        return embedding_bag(self.lattice_points, table, mode="sum", per_sample_weights=self.weights)


def _surrounding(features: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """
    The d + 1 lattice points around each point.

    A lattice point has d + 1 integer coordinates with the sum 0. The first d are packed into one number, each
    multiplied by a radix.

    Args:
        features (`Tensor` of shape `(points, d)`).

    Returns:
        Packed lattice points, int64 `(d + 1, points)`; their barycentric weights `(d + 1, points)`; and the d radices.
    """
    dimensions = features.shape[1]
    size = dimensions + 1
    # onto the hyperplane of coordinates with sum 0, scaled so that the blur along the lattice has the variance 1
    order = torch.arange(1, size, dtype=torch.float32, device=features.device)[:, None]
    scaled = features.T * (size * (2 / 3) ** 0.5) / (order * (order + 1)).sqrt()
    zero = torch.zeros_like(scaled[:1])
    elevated = torch.cat([scaled.flip(0).cumsum(0).flip(0), zero]) - torch.cat([zero, order * scaled])

    # the nearest point whose coordinates are multiples of d + 1, and the ranks of the coordinates' distances to it
    nearest = (elevated / size).round()
    rest = elevated / size - nearest
    earlier = torch.ones(size, size, dtype=torch.bool, device=features.device).tril(-1)[..., None]
    ranks = ((rest[None] > rest[:, None]) | ((rest[None] == rest[:, None]) & earlier)).sum(1)
    ranks = ranks + nearest.sum(0).long()
    shift = (ranks < 0).long() - (ranks > dimensions).long()
    ranks, nearest, rest = ranks + size * shift, (nearest + shift).long(), rest - shift

    low = [size * int(row.min()) - 2 * size for row in nearest]  # margins for the points around and their neighbours
    extents = [size * int(row.max()) + 2 * size - start for row, start in zip(nearest, low, strict=True)]
    radices = [math.prod(extents[:axis]) for axis in range(dimensions)]
    if math.prod(extents[:dimensions]) >= 2**63:
        raise ValueError(f"The features extend over {extents} lattice points: choose larger standard deviations.")

    # point number n has n added to every coordinate, and d + 1 subtracted from the n coordinates of the last ranks
    base = sum((size * nearest[axis] - low[axis]) * radices[axis] for axis in range(dimensions))
    radix_of = torch.tensor([*radices, 0], device=features.device)[:, None].expand_as(ranks)
    by_rank = torch.empty_like(ranks).scatter_(0, ranks, radix_of)
    subtracted = torch.cat([torch.zeros_like(by_rank[:1]), by_rank.flip(0).cumsum(0)[:-1]])
    packed = base + sum(radices) * torch.arange(size, device=features.device)[:, None] - size * subtracted

    # distances from the last rank to the first: differences of successive ones are the weights
    distances = torch.empty_like(rest).scatter_(0, dimensions - ranks, rest)
    weights = distances - torch.cat([distances[-1:] - 1, distances[:-1]])
    return packed, weights, radices


__all__ = ["DenseCRFSettings", "PermutohedralLattice", "dense_crf"]
