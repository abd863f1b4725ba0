"""Batches of word maps and images, and the loss of a batch."""

from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import reduce
from torch.utils.data import DataLoader, Dataset

from ifseg_hf.data.crops import CropDataset, MixedDataset, collate_samples, find_labels
from ifseg_hf.data.segmentation import SegmentationDataset
from ifseg_hf.data.word_maps import WordMapDataset, WordMapSampler, word_map_labels
from ifseg_hf.modeling.configuration_ifseg import IFSegConfig
from ifseg_hf.processing.image_processing_ifseg import IGNORE_INDEX
from ifseg_hf.processing.processing_ifseg import IFSegProcessor
from ifseg_hf.training.config import TrainingConfig
from ifseg_hf.training.errors import sample_errors

__all__ = ["batch_loss", "crop_dataset", "mixed_dataset", "sample_batches", "word_map_dataset"]


def word_map_dataset(config: TrainingConfig, model_config: IFSegConfig) -> WordMapDataset:
    """The word maps of all steps."""
    return WordMapDataset(
        num_words=len(model_config.word_ids or model_config.category_ids),
        length=config.steps * config.batch_size,
        seed=config.seed,
        grid_size=model_config.grid_size,
        max_cells=config.max_cells,
        word_categories=model_config.word_categories,
        random_cells=config.random_cells,
    )


def sample_batches(
    config: TrainingConfig, accelerator: Accelerator, samples: Dataset, batch_size: int, start: int, end: int
) -> Iterator[dict[str, torch.Tensor]]:
    """This process's batches of samples for the optimiser steps `start + 1` to `end`.

    Raises `TrainingError` for an image that cannot be used.
    """
    first = start * config.batch_size + accelerator.process_index * batch_size
    firsts = range(first, end * config.batch_size, accelerator.num_processes * batch_size)
    loader = DataLoader(
        samples,
        batch_sampler=[range(first, first + batch_size) for first in firsts],
        num_workers=config.dataloader_workers,
        collate_fn=collate_samples,
        generator=torch.Generator(),  # starting workers must not advance the default generator, which draws dropout
    )
    with sample_errors():
        for batch in loader:
            yield {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in batch.items()}


def crop_dataset(
    config: TrainingConfig,
    model_config: IFSegConfig,
    processor: IFSegProcessor,
    data: SegmentationDataset,
    masks: Path | None = None,
    kind: type[CropDataset] = CropDataset,
) -> CropDataset:
    """Augmented crops of the images in `data`; `masks` is a folder of labels that replace those of `data`.

    `kind` is the class of the result.
    """
    image_processor = processor.image_processor
    size = image_processor.size
    return kind(
        data,
        crop_size=config.crop_size or model_config.image_size,
        short_side=size["shortest_edge"] or size["height"],
        mean=image_processor.image_mean,
        std=image_processor.image_std,
        seed=config.seed,
        ignored=find_labels(data, config.unseen),
        masks=masks,
        long_side=size["longest_edge"],
        on_error=config.on_error,
    )


def mixed_dataset(config: TrainingConfig, model_config: IFSegConfig, crops: CropDataset) -> MixedDataset:
    """Crops with word maps among them, as many as `word_map_ratio` asks for."""
    max_cells = config.max_cells or model_config.grid_size
    word_maps = WordMapSampler(
        len(model_config.category_ids), config.seed, model_config.grid_size, max_cells, random_cells=config.random_cells
    )
    return MixedDataset(crops, word_maps, config.word_map_ratio)


def batch_loss(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], model_config: IFSegConfig, loss_mean: str = "labelled"
) -> torch.Tensor:
    """Mean cross-entropy over a batch: over the word maps, and over the images, in proportion to their numbers.

    Args:
        loss_mean: "labelled", as published: the mean over the labelled pixels of all images in the batches of all
            processes, so that their number does not change it (accumulated batches have means of their own). "all": the
            mean over all pixels, with 0 for pixels without a label, where images count as much as they have labels.

    Returns:
        A scalar, whose mean over the processes is the loss of the step.
    """
    word_map, pixel_values = batch.get("word_map"), batch.get("pixel_values")
    words = 0 if word_map is None else len(word_map)
    samples = words + (0 if pixel_values is None else len(pixel_values))
    loss: torch.Tensor | float = 0.0
    if words:
        labels = word_map_labels(word_map, batch["grid_size"], model_config.image_size, model_config.word_categories)
        loss = model(word_map=word_map, labels=labels).loss * (words / samples)
    # Images come second: a distributed model writes its buffers in every forward pass, and the backward pass of images
    # needs the trunk's buffers unchanged.
    if pixel_values is not None:
        labels = batch["labels"]
        labelled = (labels != IGNORE_INDEX).sum().float()
        pixels: torch.Tensor | int = labels[0].numel()  # of an image that count
        if loss_mean == "labelled":
            counts = torch.stack([labelled, labelled.new_tensor(samples - words)])
            all_labelled, all_images = reduce(counts, "mean")  # over the processes
            pixels = all_labelled.clamp(min=1e-6) / all_images
        # The model's loss is the mean over the labelled pixels of this process.
        loss = loss + model(pixel_values=pixel_values, labels=labels).loss * labelled / (pixels * samples)
    return loss
