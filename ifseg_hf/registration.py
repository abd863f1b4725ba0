"""Registration of the classes with transformers' Auto classes and its image-segmentation pipeline."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForSemanticSegmentation,
    AutoProcessor,
    AutoTokenizer,
    pipelines,
)

# From its own module: up to 5.17, `transformers.AutoImageProcessor` refuses to work without torchvision.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.pipelines import PIPELINE_REGISTRY
from wrapt import FunctionWrapper, wrap_function_wrapper

from ifseg_hf.modeling import (
    IFSegConfig,
    IFSegForSemanticSegmentation,
    OFAConfig,
    OFAForConditionalGeneration,
    OFAModel,
)
from ifseg_hf.processing import IFSegImageProcessor, IFSegImageSegmentationPipeline, IFSegProcessor, OFATokenizer

AUTO_ARGUMENTS = ("pretrained_model_name_or_path", "trust_remote_code", "code_revision")  # of the Auto classes alone


def register() -> None:
    """Registers the classes; calling it again changes nothing.

    A backbone registers itself when its file is imported: OFA's configuration and backbone in `ifseg_hf.modeling`.
    """
    AutoConfig.register(IFSegConfig.model_type, IFSegConfig, exist_ok=True)
    AutoModelForSemanticSegmentation.register(IFSegConfig, IFSegForSemanticSegmentation, exist_ok=True)
    AutoModel.register(OFAConfig, OFAModel, exist_ok=True)
    AutoModelForImageTextToText.register(OFAConfig, OFAForConditionalGeneration, exist_ok=True)
    for config_class in (IFSegConfig, OFAConfig):
        # The image processor needs no torchvision, and is also used if torchvision is installed.
        image_processors = {"pil": IFSegImageProcessor, "torchvision": IFSegImageProcessor}
        AutoImageProcessor.register(config_class, image_processor_classes=image_processors, exist_ok=True)
        AutoProcessor.register(config_class, IFSegProcessor, exist_ok=True)
    AutoTokenizer.register(OFAConfig, OFATokenizer, exist_ok=True)  # of a published OFA, whose folder names no class
    # Saved processors refer to these classes in `auto_map` and get copies of the files that define them.
    # (Models do this themselves: their files depend on the backbone.)
    IFSegImageProcessor.register_for_auto_class("AutoImageProcessor")
    IFSegProcessor.register_for_auto_class("AutoProcessor")
    # Registered below, so `pipeline()` need not load the class from the model's folder with `trust_remote_code`.
    IFSegConfig.pipelines = {}
    # `PIPELINE_REGISTRY.register_pipeline` is the documented way, but it warns at every import that the task exists.
    # For every other model the class creates transformers' own pipeline.
    _, task, _ = PIPELINE_REGISTRY.check_task("image-segmentation")
    task["impl"] = IFSegImageSegmentationPipeline
    _accept_adapters()


def _accept_adapters() -> None:
    """Lets transformers load the adapters of this package, whose words and embedded base model only it knows."""
    IFSegForSemanticSegmentation.find_base = staticmethod(_find_base)
    if isinstance(pipelines.pipeline, FunctionWrapper):
        return
    wrap_function_wrapper(pipelines, "pipeline", _pipeline)
    transformers.pipeline = pipelines.pipeline  # kept there once it was read
    for auto_class in (AutoModel, AutoModelForSemanticSegmentation):
        wrap_function_wrapper(auto_class, "from_pretrained", _auto_model)


def _find_base(name: str) -> str | Path:
    """What `from_pretrained` loads for the base model of an adapter; a published OFA is converted first."""
    from ifseg_hf.hub.published import resolve_checkpoint  # imports much that other models do not need

    return resolve_checkpoint(name)


def _pipeline(wrapped: Callable, instance: None, args: tuple, kwargs: dict) -> Any:
    """`transformers.pipeline`, with the base model and the words of an adapter. Raises `ValueError` without peft."""
    from ifseg_hf.adapter_pipeline import load_adapter_arguments  # imports much that other pipelines do not need

    arguments = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    arguments |= arguments.pop("kwargs", {})
    return wrapped(**load_adapter_arguments(arguments))


def _auto_model(wrapped: Callable, auto_class: type, args: tuple, kwargs: dict) -> Any:
    """`from_pretrained` of an Auto class, with the base model and the words of an adapter.

    The Hub is asked about an adapter only where transformers cannot load the model. Raises `ValueError` for an adapter
    where `auto_class` is of models without a segmentation head.
    """
    name = args[0] if args else kwargs.get("pretrained_model_name_or_path")
    try:
        if not (isinstance(name, (str, Path)) and Path(name).is_dir() and _is_adapter(name, kwargs)):
            return wrapped(*args, **kwargs)
    except (OSError, ValueError):
        if not isinstance(name, str) or Path(name).is_dir() or not _is_adapter(name, kwargs):
            raise
    if auto_class is not AutoModelForSemanticSegmentation:
        raise ValueError(
            f'"{name}" is an adapter for segmentation: load it with AutoModelForSemanticSegmentation or '
            'pipeline("image-segmentation").'
        )
    given = {key: value for key, value in kwargs.items() if key not in AUTO_ARGUMENTS}
    return IFSegForSemanticSegmentation.from_pretrained(name, *args[1:], **given)


def _is_adapter(name: str | Path, arguments: dict[str, Any]) -> bool:
    """Whether a folder or Hub id is an adapter with words."""
    from ifseg_hf.adapters import find_adapter  # imports much that other models do not need

    return find_adapter(name, arguments.get("revision"), arguments.get("token")) is not None


__all__ = ["register"]
