"""Features of all training images, computed once: the trunk is frozen during pre-training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import multiprocessing
from tqdm.auto import tqdm

from ifseg_hf.modeling.trunk_ofa import OFAEfficientNetLiteTrunk
from ifseg_hf.nano.trunk_weights import load_efficientnet_lite, load_efficientnet_lite_classifier
from ifseg_hf.processing.image_processing_ifseg import IFSegImageProcessor

TOP_CLASSES = 10  # classes of ImageNet-1k whose probabilities are kept
MAX_RATIO = 2.2  # of an image's sides; of longer images only the middle is used
_SHARD = 256  # views in a file


@dataclass(frozen=True)
class View:
    """An image at one size.

    Args:
        image: its position in the list of images; short_side: pixels of the short side.
    """

    image: int
    short_side: int


@dataclass
class Features:
    """Trunk outputs and class probabilities of a view.

    Args:
        fine, coarse: outputs of the trunk's fifth and seventh stage, float16, (channels, h, w), strides 16 and 32.
        classes, probabilities: the most probable classes of ImageNet-1k, (10, h / 2, w / 2), for each patch of
            `coarse`.
    """

    fine: torch.Tensor
    coarse: torch.Tensor
    classes: torch.Tensor
    probabilities: torch.Tensor

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width in patches of 16 pixels."""
        return self.fine.shape[1], self.fine.shape[2]

    def joined(self, size: tuple[int, int] | None = None) -> torch.Tensor:
        """The trunk's output, float32, (channels, h, w), resized bilinearly to `size`."""
        features = OFAEfficientNetLiteTrunk.join(self.fine[None].float(), self.coarse[None].float())
        if size is not None and size != self.grid:
            features = torch.nn.functional.interpolate(features, size=size, mode="bilinear", align_corners=False)
        return features[0]


def crop_middle(image: Image.Image) -> Image.Image:
    """The part of an image that is used, see [`middle`]."""
    used = middle(*image.size)
    return image if used == (0, 0, *image.size) else image.crop(used)


def middle(width: int, height: int) -> tuple[int, int, int, int]:
    """
    Left, top, right and bottom of the part that is used of an image.

    It is the whole image or, if its sides differ by a factor above [`MAX_RATIO`], the middle with a ratio of 2.
    """
    if max(width, height) <= MAX_RATIO * min(width, height):
        return 0, 0, width, height
    new_width, new_height = min(width, 2 * height), min(height, 2 * width)
    left, top = (width - new_width) // 2, (height - new_height) // 2
    return left, top, left + new_width, top + new_height


def pixel_values(image: Image.Image, short_side: int) -> torch.Tensor:
    """An RGB image resized to `short_side` pixels, bilinear with antialiasing, and normalised: (1, 3, H, W)."""
    scale = short_side / min(image.size)
    size = round(image.height * scale), round(image.width * scale)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    pixels = torch.nn.functional.interpolate(pixels, size, mode="bilinear", antialias=True, align_corners=False)
    return (pixels - 127) / 128


class FeatureCache:
    """
    The features of all views, in safetensors files of a folder.

    Files that exist are not computed again, so that a computation that was stopped resumes.

    Args:
        folder: where the files are.
        views: all views, in a fixed order.
    """

    def __init__(self, folder: Path, views: Sequence[View]):
        self.folder, self.views = folder, views
        self._files: dict[Path, safe_open] = {}

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, index: int) -> Features:
        file = self._file(index // _SHARD)
        if file not in self._files:
            self._files[file] = safe_open(file, "pt")
        tensors = self._files[file]
        return Features(*(tensors.get_tensor(f"{index}.{name}") for name in Features.__dataclass_fields__))

    def _file(self, shard: int) -> Path:
        return self.folder / f"features-{shard:04d}.safetensors"

    def missing(self) -> list[int]:
        """The shards that have no file yet."""
        return [shard for shard in range(-(-len(self.views) // _SHARD)) if not self._file(shard).exists()]

    def compute(self, trunk_config, images: Callable[[int], Image.Image], workers: int = 1) -> None:
        """
        Computes the missing files.

        Args:
            trunk_config: the [`OFAConfig`] of the trunk.
            images: returns the RGB image at a position.
            workers: processes of one thread each, which are faster than one process of as many threads.

        Raises:
            `ValueError`: an image cannot be read.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        missing = self.missing()
        if workers > 1 and len(missing) > 1:
            parts = [missing[rank::workers] for rank in range(workers)]
            try:
                multiprocessing.spawn(_compute_part, (self, trunk_config, images, parts), nprocs=workers)
            except multiprocessing.ProcessRaisedException as error:  # its message ends with that of the error
                raise ValueError(str(error).strip().splitlines()[-1].partition(": ")[2] or str(error)) from error
        elif missing:
            self._compute(trunk_config, images, missing)

    @torch.inference_mode()
    def _compute(self, trunk_config, images, shards: Sequence[int], show: bool = True) -> None:
        trunk = load_efficientnet_lite(OFAEfficientNetLiteTrunk(trunk_config)).eval()
        trunk.to(memory_format=trunk.memory_format)
        classifier = load_efficientnet_lite_classifier()
        for shard in tqdm(shards, desc="features", unit_scale=_SHARD, unit="image", disable=not show):
            tensors = {}
            for index in range(shard * _SHARD, min(len(self.views), (shard + 1) * _SHARD)):
                view = self.views[index]
                image = crop_middle(images(view.image))
                fine, coarse = trunk.stage_outputs(pixel_values(image, view.short_side))
                probabilities, classes = classifier(coarse)[0].softmax(0).topk(TOP_CLASSES, dim=0)
                features = Features(fine[0].half(), coarse[0].half(), classes.short(), probabilities.half())
                tensors |= {f"{index}.{name}": value.contiguous() for name, value in vars(features).items()}
            temporary = self._file(shard).with_suffix(".tmp")
            save_file(tensors, temporary)
            temporary.replace(self._file(shard))


def _compute_part(rank: int, cache: FeatureCache, trunk_config, images, parts: list[list[int]]) -> None:
    """One of the processes of [`FeatureCache.compute`]."""
    torch.set_num_threads(1)
    cache._compute(trunk_config, images, parts[rank], show=rank == 0)


def image_processor(**kwargs) -> IFSegImageProcessor:
    """The image processor of EfficientNet-Lite: (x - 127) / 128 of values from 0 to 255."""
    return IFSegImageProcessor(image_mean=[127 / 255] * 3, image_std=[128 / 255] * 3, **kwargs)
