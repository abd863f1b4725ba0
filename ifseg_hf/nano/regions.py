"""Named regions of training images, and the loss of naming their patches."""

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ifseg_hf.nano.examples import SCENE_SOURCES, Box, Example
from ifseg_hf.nano.features import FeatureCache
from ifseg_hf.nano.vocabulary import BACKGROUND, Vocabulary

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
# Relative frequencies of the annotations for which images are drawn.
DRAWN = {"name": 3, "box": 2, "caption": 2, "filled": 4}
# Weights of the losses of the kinds of regions, see `region_loss`.
WEIGHTS = {"named": 1.0, "outside": 1.0, "filled": 1.0, "caption": 0.6, "class": 0.3}
# The share of a region that its name should cover at least.
SCENE_SHARE, OBJECT_SHARE, BOX_SHARE, CAPTION_SHARE = 0.8, 0.4, 0.6, 0.15
FILLED_SHARE = 0.75  # of the patches of a filled box that are sure to show its category
MOST_BOXES = 8  # with more boxes, an image is likely to have objects without a box
MOST_DRAWS = 1000  # until an image has the orientation of its batch
CLASS_PROBABILITY = 0.4  # from which on a patch is given to a class of ImageNet-1k


@dataclass
class Region:
    """
    A part of an image and its name.

    Args:
        kind: "named": an image or a box around an object, of which some patches show something else; "filled": a box
            that the name fills; "caption": the name is somewhere in the image; "class": a patch that ImageNet's
            classifier names; "outside": everything outside of `boxes`.
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
        self.cache, self.vocabulary, self.rng = cache, vocabulary, rng
        self.pools: dict[str, tuple[list[list], list[float]]] = {}
        by_name: dict[tuple, list[tuple[Example, int | None]]] = {}
        by_category: dict[tuple, list[tuple[Example, int | None]]] = {}
        for example in examples:
            if example.name is not None:
                by_name.setdefault((example.source, example.name), []).append((example, None))
            for name in example.filled:
                by_category.setdefault((example.source, name), []).append((example, name))
        # Frequent names are drawn more often, but less than in proportion.
        self._add_pool("name", list(by_name.values()), [len(group) ** 0.5 for group in by_name.values()])
        boxes = [sum(len(example.filled[name]) for example, name in group) for group in by_category.values()]
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
            names = {*example.caption_names, *example.filled, *(name for _, name in example.boxes)}
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
        others = [name for name in example.filled if name != category]
        names = [category, *self.rng.sample(others, min(5, len(others)))]
        regions = []
        for name in names:
            boxes = example.filled[name]
            regions += [Region("filled", [box], name) for box in self.rng.sample(boxes, min(2, len(boxes)))]
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
            background: give surfaces, and what is outside of all boxes, the name "background".

        Returns:
            features (size, h, w, channels), the images, and the regions of each.
        """
        features, examples, regions = [], [], []
        for _ in range(size):
            example, found = self.draw(portrait=grid[0] > grid[1])
            if background:
                found = self._with_background(example, found)
            joined = self.cache[example.view].joined(grid).permute(1, 2, 0)
            if self.rng.random() < 0.5:
                joined = joined.flip(1)
                for region in found:
                    region.boxes = [(top, 1 - right, bottom, 1 - left) for top, left, bottom, right in region.boxes]
            features.append(joined)
            examples.append(example)
            regions.append(found)
        return torch.stack(features), examples, regions

    def _with_background(self, example: Example, regions: list[Region]) -> list[Region]:
        """The regions with every surface named "background", as in a list of words that has things alone."""
        background = self.vocabulary.index[BACKGROUND]
        surfaces = self.vocabulary.accepted[:, background]
        for region in regions:
            if surfaces[region.name]:
                region.name = background
        if 0 < len(example.boxes) <= MOST_BOXES:
            regions.append(Region("outside", [box for box, _ in example.boxes], background))
        return regions


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
    "named", "caption" and "outside": -log min(1, mean P / share); "filled": the mean of -log P over the 75 % of the
    patches where it is lowest, since a few patches show something else; "class": mean -log P times its weight.

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
