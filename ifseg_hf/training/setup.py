"""Set-up of a training run: accelerator, datasets, processor and model."""

import copy
import importlib.util
import os
from dataclasses import replace

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import parse_flag_from_env

from ifseg_hf.adapters import add_lora
from ifseg_hf.data.crops import CropDataset, find_labels, load_training_dataset, load_validation_dataset
from ifseg_hf.data.segmentation import BENCHMARKS, SegmentationDataset, load_segmentation_dataset
from ifseg_hf.loading import load_segmentation_model
from ifseg_hf.modeling.configuration_ifseg import IFSegConfig
from ifseg_hf.modeling.modeling_ifseg import IFSegForSemanticSegmentation
from ifseg_hf.processing.processing_ifseg import IFSegProcessor
from ifseg_hf.remote_code import import_backbone
from ifseg_hf.training.batch_norm import calibrate_batch_norm, train_batch_norm, trunk_state
from ifseg_hf.training.config import TrainingConfig
from ifseg_hf.training.errors import SettingError, sample_errors

__all__ = [
    "cpu_gains_from_bfloat16",
    "freeze",
    "load_data",
    "load_eval_data",
    "load_model",
    "make_accelerator",
    "measure_batch_norm",
    "samples_per_batch",
]

DECODER_CHOICES = ("decoder_positions", "decoder_cross_attention")  # of OFA alone
CALIBRATION_CROPS, CALIBRATION_BATCH = 128, 16


def cpu_gains_from_bfloat16() -> bool:
    """Whether this CPU is faster in bfloat16 than in float32.

    Without bfloat16 instructions, emulation can be hundreds of times slower. With AVX-512 but without AMX, matrix
    products in bfloat16 took twice as long as in float32 (measured on an Intel Xeon).
    """
    avx512_alone = torch.cpu._is_avx512_supported() and not torch.cpu._is_amx_tile_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and not avx512_alone


def make_accelerator(config: TrainingConfig, report: bool = True) -> Accelerator:
    """The accelerator of a run, with its precision, gradient accumulation and trackers. Raises `SettingError`.

    With `report`, prints when another precision than the settings' is used.
    """
    mixed_precision = config.mixed_precision
    requested = mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    on_cpu = config.cpu or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    slower = on_cpu and requested == "bf16" and not cpu_gains_from_bfloat16()
    if slower:
        mixed_precision = "no"
    elif mixed_precision is None and requested == "no" and not on_cpu and torch.cuda.is_available():
        mixed_precision = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    trackers = [name.strip() for name in config.report_to.split(",")] if config.report_to else []
    try:
        accelerator = Accelerator(
            cpu=config.cpu,
            mixed_precision=mixed_precision,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            dataloader_config=DataLoaderConfiguration(dispatch_batches=False),  # each process draws its own samples
            step_scheduler_with_optimizer=False,  # the learning rate depends on the step, even if fp16 skips some
            log_with=trackers or None,
            project_dir=config.output_dir,
        )
    except ValueError as error:
        raise SettingError(" ".join(str(error).split())) from error
    if len(accelerator.log_with) < len(trackers):
        raise SettingError(f"report_to={config.report_to}: the package of a tracker is not installed.")
    if slower and report:
        accelerator.print("In float32: this CPU is slower in bfloat16.")
    return accelerator


def samples_per_batch(config: TrainingConfig, processes: int) -> int:
    """Batch size of one process, such that an optimiser step has `batch_size` samples in all. Raises `SettingError`."""
    size, rest = divmod(config.batch_size, processes * config.gradient_accumulation_steps)
    if size * (1 - config.word_map_ratio) < 1:
        # Every process needs an image in each batch: distributed training waits for the trunk's gradients.
        raise SettingError(f"word_map_ratio={config.word_map_ratio} leaves no image in a batch of {size} samples.")
    if rest:
        raise SettingError(
            f"batch_size={config.batch_size} cannot be divided among {processes} processes and "
            f"{config.gradient_accumulation_steps} accumulated batches."
        )
    return size


def load_data(config: TrainingConfig) -> SegmentationDataset | None:
    """The training dataset, if there is one, without opening an image. Raises `SettingError`."""
    if config.dataset is None:
        return None
    if config.on_images and importlib.util.find_spec("kornia") is None:
        raise SettingError('Training on images needs kornia: pip install "ifseg-hf[train]".')
    try:
        categories = config.categories if config.on_images else None
        data = load_training_dataset(config.dataset, config.data_dir, config.split, categories)
        find_labels(data, config.unseen)
    except ValueError as error:
        raise SettingError(" ".join(str(error).split())) from error
    if len(data.names) < 2:
        raise SettingError("One category is not enough for segmentation: give at least two.")
    return data


def load_eval_data(config: TrainingConfig, data: SegmentationDataset | None) -> SegmentationDataset | None:
    """The dataset that `eval_steps` evaluates on, with the categories of `data`. Raises `SettingError`.

    The subsets of the dataset are the seen and the unseen categories, if `unseen` is set.
    """
    if not config.eval_steps:
        return None
    categories = data.names if config.categories is None else config.categories
    try:
        if config.eval_dataset is None:
            found = load_validation_dataset(config.dataset, config.data_dir, categories)
        else:
            data_dir = config.data_dir if config.eval_dataset in BENCHMARKS else None
            found = load_segmentation_dataset(config.eval_dataset, data_dir).select(categories)
    except ValueError as error:
        raise SettingError(f"eval_steps={config.eval_steps}: {' '.join(str(error).split())}") from error
    unseen = find_labels(data, config.unseen)
    if not unseen:
        return found
    seen = [label for label in range(len(found.names)) if label not in unseen]
    return replace(found, subsets={"seen": seen, "unseen": unseen})


def load_model(
    config: TrainingConfig, data: SegmentationDataset | None = None
) -> tuple[IFSegProcessor, IFSegForSemanticSegmentation]:
    """The processor, and the model in float32 with its words and its frozen part. Raises `SettingError`."""
    categories = data.names if config.on_images or config.categories is None else config.categories
    try:
        processor = IFSegProcessor.from_pretrained(config.model_path)
    except (OSError, ValueError) as error:
        raise SettingError(f'"{config.model}" has no processor that can be loaded: {error}'[:500]) from error
    try:
        words = processor.encode_categories(categories, config.prompt, config.append_unknown, config.background)
    except ValueError as error:
        raise SettingError(str(error)) from error
    try:
        import_backbone(config.model_path, config.trust_remote_code)
        model_config = IFSegConfig.from_pretrained(config.model_path)
        model_config.backbone_config.dropout = config.dropout
        model_config.backbone_config.drop_path_rate = config.drop_path
        change_backbone(model_config, processor, config)
        if config.from_scratch:
            model = IFSegForSemanticSegmentation(model_config)
        else:
            model = load_segmentation_model(config.model_path, config=model_config)
    except SettingError:
        raise
    except (OSError, ValueError) as error:
        raise SettingError(f'"{config.model}" has no model that can be loaded: {error}'[:500]) from error
    model.set_words(**words)
    freeze(model, config.frozen)
    if config.lora:
        _add_lora(model, config)
    if config.on_images:
        prepare_image_processor(processor, config, model.config)
    return processor, model


def _add_lora(model: IFSegForSemanticSegmentation, config: TrainingConfig) -> None:
    """Adds the adapter that the run trains. Raises `SettingError` without peft."""
    try:
        add_lora(model, config.lora_rank, config.model)
    except ImportError as error:
        raise SettingError(str(error)) from error


def change_backbone(model_config: IFSegConfig, processor: IFSegProcessor, config: TrainingConfig) -> None:
    """Sets `image_size`, also of the image processor, and choices of the decoder where they differ from the model's.

    Raises `SettingError` where the model has no such attribute, or cannot have this value.
    """
    backbone, before = model_config.backbone_config, model_config.image_size
    wanted = {name: getattr(config, name) for name in ("image_size", *DECODER_CHOICES)}
    changes = {name: x for name, x in wanted.items() if x is not None and x != getattr(backbone, name, None)}
    for name in DECODER_CHOICES:
        if name in changes and not hasattr(backbone, name):
            raise SettingError(f"{name}={changes[name]}: the backbone {backbone.model_type} has no such choice.")
    if not changes:
        return
    if config.lora:
        shown = ", ".join(f"{name}={value}" for name, value in changes.items())
        raise SettingError(f"{shown} would change the model itself, which a LoRA adapter cannot: leave it out.")
    try:
        changed = type(backbone).from_dict({**backbone.to_dict(), **changes})  # which checks them
    except ValueError as error:
        raise SettingError(str(error)) from error
    positions = [getattr(config, "decoder_positions", None) for config in (backbone, changed)]
    if "image_size" in changes and model_config.is_tuned and positions == ["segmentation"] * 2:
        raise SettingError(
            f"image_size={config.image_size}: the model was tuned with decoder positions for {before} pixels. Start "
            "from the model before tuning."
        )
    model_config.backbone_config = changed
    image_processor, scale = processor.image_processor, changed.image_size / before
    sides = dict(image_processor.size).items()
    image_processor.size = {side: max(1, round(pixels * scale)) for side, pixels in sides if pixels}


def freeze(model: IFSegForSemanticSegmentation, part: str) -> None:
    """
    Freezes a part of the model, and all parameters that segmentation does not use.

    Args:
        part: "nothing", "words" (the word embeddings) or "trunk" (all but the backbone's `image_free_parameters`).
    """
    backbone = model.backbone
    parameters = backbone.image_free_parameters() if part == "trunk" else backbone.segmentation_parameters()
    trained = {id(parameter) for parameter in parameters}
    if part == "words":
        trained -= {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)


def prepare_image_processor(processor: IFSegProcessor, config: TrainingConfig, model_config: IFSegConfig) -> None:
    """Sets the inference defaults of the trained model: image size, no smoothing, crops after supervised training."""
    image_processor = processor.image_processor
    if config.short_side is not None:
        image_processor.size = {"shortest_edge": config.short_side, "longest_edge": 4 * config.short_side}
    image_processor.smoothing_iterations = 0
    supervised = config.stage == "supervised"
    image_processor.sliding_window = (config.crop_size or model_config.image_size) if supervised else None


def measure_batch_norm(trunk: torch.nn.Module, crops: CropDataset, device: torch.device) -> None:
    """Sets the statistics of frozen batch norms to those of the first crops, the same in every process.

    With random weights and without these statistics, the scale of the outputs would change from layer to layer.
    """
    starts = range(0, CALIBRATION_CROPS, CALIBRATION_BATCH)
    batches = ([crops[index]["pixel_values"] for index in range(x, x + CALIBRATION_BATCH)] for x in starts)
    learning = train_batch_norm(copy.deepcopy(trunk)).to(device)
    with sample_errors():
        calibrate_batch_norm(learning, (torch.stack(batch).to(device) for batch in batches))
    trunk.load_state_dict(trunk_state(learning))
