"""Named regions of training images, and the loss of naming their patches."""

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ifseg_hf.nano.examples import SCENE_SOURCES, THIN_SHARE, Box, Example
from ifseg_hf.nano.features import FeatureCache
from ifseg_hf.nano.vocabulary import BACKGROUND, Vocabulary

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
# Relative frequencies of the annotations for which images are drawn.
DRAWN = {"name": 3, "box": 2, "caption": 2, "filled": 4}
# Weights of the losses of the kinds of regions, see `region_loss`.
WEIGHTS = {"named": 1.0, "outside": 1.0, "filled": 1.0, "thin": 0.4, "caption": 0.6, "class": 0.3}
# The share of a region that its name should cover at least.
SCENE_SHARE, OBJECT_SHARE, BOX_SHARE, CAPTION_SHARE = 0.8, 0.4, 0.6, 0.15
FILLED_SHARE = 0.75  # of the patches of a filled box that are sure to show its category
SMALL_GRID = 0.7  # of the height or width at which boxes were drawn: on smaller grids small boxes are left out
ASKED_SHARE = 0.6  # of the things of a batch that keep their names where the others are background
MOST_BOXES = 8  # with more boxes, an image is likely to have objects without a box
MOST_DRAWS = 1000  # until an image has the orientation of its batch
CLASS_PROBABILITY = 0.4  # from which on a patch is given to a class of ImageNet-1k


@dataclass
class Region:
    """
    A part of an image and its name.

    Args:
        kind: "named": an image or a box around an object, of which some patches show something else; "filled": a box
            that the name fills; "thin": a small box of which the name covers half; "caption": the name is somewhere in
            the image; "class": a patch that ImageNet's classifier names; "outside": everything outside of `boxes`.
        boxes: one box; of "outside", the boxes that are left out.
        name: position in the vocabulary; weight: factor of its loss; share: the part of the region that the name covers
            at least. The loss is 0 from there on, so that the surroundings of an object may have other names.
    """

    kind: str
    boxes: list[Box]
    name: int
    weight: float = 1.0
    share: float = 1.0

    def mask(self, height: int, width: int) -> np.ndarray:
        """The patches of the region, bool (height, width)."""
        mask = np.zeros((height, width), bool)
        for top, left, bottom, right in self.boxes:
            y, x = min(height - 1, round(top * height)), min(width - 1, round(left * width))
            mask[y : max(y + 1, round(bottom * height)), x : max(x + 1, round(right * width))] = True
        return ~mask if self.kind == "outside" else mask


class RegionSampler:
    """
    Draws images and some of their regions.

    Args:
        examples: the images; cache: their features; vocabulary: their names; rng: source of all random choices.
    """

    def __init__(self, examples: Sequence[Example], cache: FeatureCache, vocabulary: Vocabulary, rng: random.Random):
        self.examples, self.cache, self.vocabulary, self.rng = examples, cache, vocabulary, rng
        self.pools: dict[str, tuple[list[list], list[float]]] = {}
        by_name: dict[tuple, list[tuple[Example, int | None]]] = {}
        by_category: dict[tuple, list[tuple[Example, int | None]]] = {}
        for example in examples:
            if example.name is not None:
                by_name.setdefault((example.source, example.name), []).append((example, None))
            for name in {**example.filled, **example.thin}:
                by_category.setdefault((example.source, name), []).append((example, name))
        # Frequent names are drawn more often, but less than in proportion.
        self._add_pool("name", list(by_name.values()), [len(group) ** 0.5 for group in by_name.values()])
        boxes = [
            sum(len(example.filled.get(name, [])) + len(example.thin.get(name, [])) for example, name in group)
            for group in by_category.values()
        ]
        weights = [n**0.35 * len(group) ** 0.5 for n, group in zip(boxes, by_category.values(), strict=True)]
        self._add_pool("filled", list(by_category.values()), weights)
        self._add_pool("box", [[(example, None) for example in examples if example.boxes]], [1.0])
        self._add_pool("caption", [[(example, None) for example in examples if example.caption_names]], [1.0])
        self.used = self._count_names(examples)
        self.classes = torch.from_numpy(vocabulary.classes)
        self.things = torch.from_numpy(vocabulary.things)
        self.related = torch.from_numpy(vocabulary.related)

    def _add_pool(self, kind: str, groups: list[list], weights: list[float]) -> None:
        if groups and groups[0]:
            self.pools[kind] = groups, weights

    @staticmethod
    def _count_names(examples: Sequence[Example]) -> dict[int, float]:
        """Square root of the number of images of each name that has some."""
        counts: Counter[int] = Counter()
        for example in examples:
            names = {*example.caption_names, *example.filled, *example.thin, *(name for _, name in example.boxes)}
            counts.update(sorted(names if example.name is None else names | {example.name}))
        return {name: count**0.5 for name, count in counts.items()}

    def draw(self, portrait: bool) -> tuple[Example, list[Region]]:
        """
        An image that is not wider than high (`portrait`) or not higher than wide, and its regions.

        Raises:
            `ValueError`: there is hardly any such image.
        """
        kinds = list(self.pools)
        for _ in range(MOST_DRAWS):
            kind = self.rng.choices(kinds, [DRAWN[k] for k in kinds])[0]
            groups, weights = self.pools[kind]
            example, category = self.rng.choice(self.rng.choices(groups, weights)[0])
            height, width = self.cache[example.view].grid
            if width <= height if portrait else height <= width:
                break
        else:
            missing = "wider than high" if portrait else "higher than wide"
            raise ValueError(f"All {MOST_DRAWS} training images that were drawn are {missing}: add other images.")
        regions = getattr(self, f"_{kind}_regions")(example, category)
        if kind != "filled":
            regions += self._class_regions(example)
        return example, regions

    def _name_regions(self, example: Example, _) -> list[Region]:
        share = SCENE_SHARE if example.source in SCENE_SOURCES else OBJECT_SHARE
        return [Region("named", [WHOLE], self.generalize(example.name), share=share)]

    def _box_regions(self, example: Example, _) -> list[Region]:
        chosen = self.rng.sample(example.boxes, min(5, len(example.boxes)))
        return [Region("named", [box], self.generalize(name), share=BOX_SHARE) for box, name in chosen]

    def _caption_regions(self, example: Example, _) -> list[Region]:
        chosen = self.rng.sample(example.caption_names, min(5, len(example.caption_names)))
        return [Region("caption", [WHOLE], self.generalize(name), share=CAPTION_SHARE) for name in chosen]

    def _filled_regions(self, example: Example, category: int) -> list[Region]:
        others = [name for name in {**example.filled, **example.thin} if name != category]
        regions = []
        for name in [category, *self.rng.sample(others, min(6, len(others)))]:
            filled, thin = example.filled.get(name, []), example.thin.get(name, [])
            regions += [Region("filled", [box], name) for box in self.rng.sample(filled, min(2, len(filled)))]
            thin = self.rng.sample(thin, min(3, len(thin)))
            regions += [Region("thin", [box], name, share=THIN_SHARE) for box in thin]
        return regions

    def _class_regions(self, example: Example) -> list[Region]:
        """Up to 10 patches of at most 2 names that ImageNet's classifier is sure of."""
        features = self.cache[example.view]
        classes = features.classes.long()
        name = self.classes[classes[0]]
        same = self.related[name.expand_as(classes), self.classes[classes]]
        probability = (features.probabilities.float() * same).sum(0) * self.things[classes[0]]
        height, width = probability.shape
        sure = (probability > CLASS_PROBABILITY).flatten().nonzero()[:, 0].tolist()
        names: dict[int, int] = {}
        regions = []
        for patch in self.rng.sample(sure, min(10, len(sure))):
            y, x = divmod(patch, width)
            found = int(name[y, x])
            if found not in names and len(names) == 2:
                continue
            general = names.setdefault(found, self.generalize(found))
            box = (y / height, x / width, (y + 1) / height, (x + 1) / width)
            regions.append(Region("class", [box], general, float(probability[y, x])))
        return regions

    def class_patches(self, images: int, patches: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Patches of images that are drawn uniformly, and what ImageNet's classifier says of them.

        Returns:
            features (n, channels), and the most probable classes and their probabilities, (n, 10).
        """
        found = []
        for example in self.rng.sample(self.examples, min(images, len(self.examples))):
            features = self.cache[example.view]
            height, width = features.classes.shape[1:]
            chosen = torch.randperm(height * width)[:patches]
            found.append(
                [
                    features.joined((height, width)).flatten(1).T[chosen],
                    features.classes.flatten(1).T[chosen].long(),
                    features.probabilities.flatten(1).T[chosen].float(),
                ]
            )
        joined, classes, probabilities = (torch.cat(parts) for parts in zip(*found, strict=True))
        return joined, classes, probabilities

    def generalize(self, name: int) -> int:
        """The name itself or, in 45 % of the cases, one of the names that hold for it too."""
        if self.rng.random() < 0.55:
            return name
        return self.rng.choice(self.vocabulary.accepted[name].nonzero()[0].tolist())

    def distractors(self, names: Sequence[int], count: int) -> list[int]:
        """Names that are not related to `names` or to one another."""
        found: list[int] = []
        used, weights = list(self.used), list(self.used.values())
        while len(found) < count:
            known = self.rng.random() < 0.7
            name = self.rng.choices(used, weights)[0] if known else self.rng.randrange(len(self.vocabulary))
            related = any(self.vocabulary.related[name, other] for other in (*names, *found))
            if not related and not self.vocabulary.held_out[name]:
                found.append(name)
        return found

    def batch(
        self, size: int, grid: tuple[int, int], background: bool = False
    ) -> tuple[torch.Tensor, list[Example], list[list[Region]]]:
        """
        Images on one grid, half of them mirrored.

        Args:
            background: give surfaces, some things, and what is outside of all boxes, the name "background".

        Returns:
            features (size, h, w, channels), the images, and the regions of each.
        """
        features, examples, regions = [], [], []
        for _ in range(size):
            example, found = self.draw(portrait=grid[0] > grid[1])
            if min(grid) < SMALL_GRID * min(self.cache[example.view].grid):
                # a small box is less than a patch there
                found = [region for region in found if region.kind != "thin"] or found
            if background and 0 < len(example.boxes) <= MOST_BOXES:
                outside = [box for box, _ in example.boxes]
                found.append(Region("outside", outside, self.vocabulary.index[BACKGROUND]))
            joined = self.cache[example.view].joined(grid).permute(1, 2, 0)
            if self.rng.random() < 0.5:
                joined = joined.flip(1)
                for region in found:
                    region.boxes = [(top, 1 - right, bottom, 1 - left) for top, left, bottom, right in region.boxes]
            features.append(joined)
            examples.append(example)
            regions.append(found)
        if background:
            self._name_background(regions)
        return torch.stack(features), examples, regions

    def _name_background(self, regions: Sequence[Sequence[Region]]) -> None:
        """Names "background" every surface and some things, as in a list of words that has a few things alone."""
        background = self.vocabulary.index[BACKGROUND]
        surfaces = self.vocabulary.accepted[:, background]
        things = list(dict.fromkeys(region.name for found in regions for region in found if not surfaces[region.name]))
        asked = self.rng.sample(things, math.ceil(ASKED_SHARE * len(things)))
        for region in (region for found in regions for region in found):
            if surfaces[region.name] or not self.vocabulary.related[region.name, asked].any():
                region.name = background
                if region.kind == "named":
                    region.share = max(region.share, SCENE_SHARE)  # what surrounds the thing is background, too


@dataclass
class Selection:
    """
    The patches of the regions of a batch.

    Args:
        regions: all regions, image by image.
        rows: for each region, its patches as rows of the (batch * h * w) patches of the batch.
    """

    regions: list[Region]
    rows: list[torch.Tensor]

    @property
    def indices(self) -> torch.Tensor:
        """The rows of all regions, one after another."""
        return torch.cat(self.rows)


def select_patches(
    regions: Sequence[Sequence[Region]], height: int, width: int, max_patches: int | None = None
) -> Selection:
    """
    The patches of the regions of each image. Regions without patches are left out.

    Args:
        max_patches: the most patches of a region, chosen at random. Default: all.
    """
    selection = Selection([], [])
    for i, found in enumerate(regions):
        for region in found:
            patches = torch.from_numpy(region.mask(height, width).ravel().nonzero()[0])
            if max_patches is not None and len(patches) > max_patches:
                patches = patches[torch.randperm(len(patches))[:max_patches]]
            if len(patches):
                selection.regions.append(region)
                selection.rows.append(patches + i * height * width)
    return selection


def region_loss(
    scores: torch.Tensor, selection: Selection, candidates: Sequence[int], related: torch.Tensor
) -> dict[str, torch.Tensor]:
    """
    Weighted mean losses of naming the regions, by their kinds.

    With P the softmax over the candidates that are not related to the region's name, and means over its patches:
    "named", "thin", "caption" and "outside": -log min(1, mean P / share); "filled": the mean of -log P over the 75 %
    of the patches where it is lowest, since a few patches show something else; "class": mean -log P times its weight.

    Args:
        scores: (patches, candidates), logits of `selection.indices`.
        candidates: the name of each column of `scores`, those of all regions among them.
        related: bool (names, names), see [`Vocabulary`].
    """
    position = {name: i for i, name in enumerate(candidates)}
    sizes = [len(rows) for rows in selection.rows]
    target = torch.tensor([position[region.name] for region in selection.regions]).repeat_interleave(
        torch.tensor(sizes)
    )
    names = torch.as_tensor(list(candidates))
    excluded = related[names[target]][:, names]
    excluded[torch.arange(len(target)), target] = False
    log_p = scores.float().masked_fill(excluded, -1e4).log_softmax(1).gather(1, target[:, None])[:, 0]
    losses: dict[str, list[torch.Tensor]] = {}
    for region, values in zip(selection.regions, log_p.split(sizes), strict=True):
        log_mean = values.logsumexp(0) - math.log(len(values))
        if region.kind == "filled":
            loss = -values.sort(descending=True).values[: math.ceil(FILLED_SHARE * len(values))].mean()
        elif region.kind == "class":
            loss = -values.mean() * region.weight
        else:
            loss = (math.log(region.share) - log_mean).clamp(min=0)
        losses.setdefault(region.kind, []).append(loss)
    return {kind: WEIGHTS[kind] * torch.stack(values).mean() for kind, values in losses.items()}


def class_loss(scores: torch.Tensor, columns: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """
    Cross-entropy of the classifier's most probable classes, in which sure patches count more.

    Args:
        scores: (patches, names), logits; columns: int64 (patches, classes), the column of each class;
        probabilities: float (patches, classes), of the classes, 0 for those left out.
    """
    log_p = scores.float().log_softmax(1).gather(1, columns)
    sure = torch.zeros_like(scores).scatter_add_(1, columns, probabilities.to(scores.dtype)).amax(1)
    return -(sure * (probabilities * log_p).sum(1)).sum() / sure.sum().clamp(min=1e-6)
