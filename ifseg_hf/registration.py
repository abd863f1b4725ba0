"""Registration of the classes with transformers' Auto classes and its image-segmentation pipeline."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForSemanticSegmentation,
    AutoProcessor,
)
from transformers.pipelines import PIPELINE_REGISTRY

from ifseg_hf.modeling import (
    IFSegConfig,
    IFSegForConditionalGeneration,
    IFSegForSemanticSegmentation,
    IFSegModel,
)
from ifseg_hf.processing import IFSegImageProcessor, IFSegImageSegmentationPipeline, IFSegProcessor


def register() -> None:
    """Registers the classes; calling it again changes nothing."""
    AutoConfig.register(IFSegConfig.model_type, IFSegConfig, exist_ok=True)
    AutoModel.register(IFSegConfig, IFSegModel, exist_ok=True)
    AutoModelForImageTextToText.register(IFSegConfig, IFSegForConditionalGeneration, exist_ok=True)
    AutoModelForSemanticSegmentation.register(IFSegConfig, IFSegForSemanticSegmentation, exist_ok=True)
    # It needs no torchvision, so it serves where torchvision is installed, too.
    image_processors = {"pil": IFSegImageProcessor, "torchvision": IFSegImageProcessor}
    AutoImageProcessor.register(IFSegConfig, image_processor_classes=image_processors, exist_ok=True)
    AutoProcessor.register(IFSegConfig, IFSegProcessor, exist_ok=True)
    # Saved models and processors name these classes in `auto_map` and get a copy of the files that define them.
    IFSegConfig.register_for_auto_class("AutoConfig")
    IFSegModel.register_for_auto_class("AutoModel")
    IFSegForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
    IFSegForSemanticSegmentation.register_for_auto_class("AutoModelForSemanticSegmentation")
    IFSegImageProcessor.register_for_auto_class("AutoImageProcessor")
    IFSegProcessor.register_for_auto_class("AutoProcessor")
    # `PIPELINE_REGISTRY.register_pipeline` is the documented way, but it warns at every import that the task exists.
    # The class leaves every other model to transformers' own pipeline.
    _, task, _ = PIPELINE_REGISTRY.check_task("image-segmentation")
    task["impl"] = IFSegImageSegmentationPipeline


__all__ = ["register"]
