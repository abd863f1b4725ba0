"""Registration of the classes with transformers' Auto classes and its image-segmentation pipeline."""

import inspect
from collections.abc import Callable
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
    """Lets `pipeline()` load the adapters of this package, whose words and embedded base model only it knows."""
    if not isinstance(pipelines.pipeline, FunctionWrapper):
        wrap_function_wrapper(pipelines, "pipeline", _pipeline)
        transformers.pipeline = pipelines.pipeline  # kept there once it was read


def _pipeline(wrapped: Callable, instance: None, args: tuple, kwargs: dict) -> Any:
    """`transformers.pipeline`, with the base model and the words of an adapter. Raises `ValueError` without peft."""
    from ifseg_hf.adapter_pipeline import load_adapter_arguments  # imports much that other pipelines do not need

    arguments = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    arguments |= arguments.pop("kwargs", {})
    return wrapped(**load_adapter_arguments(arguments))


__all__ = ["register"]
