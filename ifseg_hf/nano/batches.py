"""Batches of scenes for the phases of pre-training."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from ifseg_hf.nano.scenes import Scene, SceneMaker, cells

Size = int | tuple[int, int]  # of all sides, or (height, width), in pixels


@dataclass
class Phase:
    """A part of training: `steps` steps with `batch` scenes of `size` pixels.

    If there are several sizes, each step draws one. `batch` is the number of scenes of the first size; for other sizes
    the number changes so that every step has about the same number of pixels.

    Args:
        single: each scene is one image or one street crop.
        train_trunk: (vision-language) whether the trunk is trained.
        train_norms: (vision-language) whether the trunk's batch norms use the statistics of the batch.
        language_every: (vision-language) number of steps from one with captions and infilling to the next. The cheaper
            steps between them only align patches with names. 0: no captions and infilling, fixed word embeddings.
        whole_image_share: share of steps whose scenes are single images, for [`patch_loss`].
        whole_image_sizes: sizes of these images; (height, width) distorts them.
    """

    steps: int
    batch: int
    size: int | tuple[int, ...]
    single: bool = False
    train_trunk: bool = True
    train_norms: bool = False
    language_every: int = 1
    whole_image_share: float = 0.0
    whole_image_sizes: tuple[Size, ...] = ()

    def draw(self, rng: random.Random) -> tuple[Size, int, bool]:
        """Size and number of a step's scenes, and whether they are single images for [`patch_loss`]."""
        sizes = (self.size,) if isinstance(self.size, int) else self.size
        whole_images = rng.random() < self.whole_image_share
        size = rng.choice(self.whole_image_sizes if whole_images else sizes)
        pixels = size**2 if isinstance(size, int) else size[0] * size[1]
        return size, max(1, round(self.batch * sizes[0] ** 2 / pixels)), whole_images

    def has_language(self, step: int) -> bool:
        """Whether captions and infilling are part of a step."""
        return self.language_every > 0 and step % self.language_every == 0


def collate_scenes(scenes: list[Scene]) -> dict[str, torch.Tensor]:
    """images (B, H, W, 3) uint8, boxes (B, R, 4) float32, labels (B, R) int64, -100 where a scene has fewer boxes."""
    most = max(1, *(len(scene.labels) for scene in scenes))
    boxes = torch.zeros(len(scenes), most, 4)
    labels = torch.full((len(scenes), most), -100)
    for row, scene in enumerate(scenes):
        boxes[row, : len(scene.labels)] = torch.from_numpy(scene.boxes.reshape(-1, 4))
        labels[row, : len(scene.labels)] = torch.tensor(scene.labels, dtype=torch.long)
    return {"images": torch.from_numpy(np.stack([s.image for s in scenes])), "boxes": boxes, "labels": labels}


class SceneBatches(IterableDataset):
    """Batches of scenes of all phases, in order, from step `start`; each batch is a function of (seed, step).

    A batch is the result of [`collate_scenes`] and `whole_images`: whether its scenes are for [`patch_loss`].

    Of every batch, process `rank` of `world` processes draws the scenes `rank`, `rank + world`, ...
    """

    def __init__(
        self, maker: SceneMaker, phases: list[Phase], seed: int, start: int = 0, rank: int = 0, world: int = 1
    ):
        self.maker, self.phases, self.seed, self.start = maker, phases, seed, start
        self.rank, self.world = rank, world

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        step = 0
        for phase in self.phases:
            for _ in range(phase.steps):
                if step >= self.start:
                    size, count, whole_images = phase.draw(random.Random(f"{self.seed}:{step}"))
                    seeds = (f"{self.seed}:{step}:{i}" for i in range(self.rank, count, self.world))
                    scenes = [self._scene(random.Random(seed), size, phase.single, whole_images) for seed in seeds]
                    yield {**collate_scenes(scenes), "whole_images": whole_images}
                step += 1

    def _scene(self, rng: random.Random, size: Size, single: bool, whole_image: bool) -> Scene:
        if whole_image or not isinstance(size, int):
            return self.maker.mosaic(rng, size, cells(1), street_share=0)
        return self.maker.mosaic(rng, size, cells(1)) if single else self.maker.draw(rng, size)

    def loader(self) -> DataLoader:
        """The batches, drawn ahead of time in another process."""
        return DataLoader(self, batch_size=None, num_workers=1, prefetch_factor=4)


def to_pixels(images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """uint8 images (B, H, W, 3) to pixel_values (B, 3, H, W) in [-1, 1]; a generator adds colour jitter."""
    pixels = images.permute(0, 3, 1, 2).float() / 127.5 - 1  # channels last in memory
    if generator is None:
        return pixels
    light, contrast, saturation = torch.empty(3, len(pixels), 1, 1, 1).uniform_(-0.3, 0.3, generator=generator)
    grey = pixels.mean(1, keepdim=True)
    pixels = grey + (pixels - grey) * (1 + saturation)
    centre = grey.mean((2, 3), keepdim=True)
    return (centre + (pixels - centre) * (1 + contrast) + light).clamp_(-1, 1)
