"""IFSeg the Hugging Face way: category words in, a segmented photo out.

Importing this package makes transformers' Auto classes and `pipeline("image-segmentation")` know IFSeg models, and
makes the models that it saves bring their own code along, for places where the package is not installed.
"""

from pathlib import Path

_HERE = Path(__file__).resolve().parent
if not (_HERE / "modeling").is_dir():
    # A checkout, where modeling/ and processing/ stand beside this folder: make them parts of the package from
    # whatever directory and however it was found, as pyproject.toml does in an installation.
    __path__.append(str(_HERE.parent))

from transformers import (  # noqa: E402
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForSemanticSegmentation,
    AutoProcessor,
    pipelines,
)

from .modeling import (  # noqa: E402
    IFSegConfig,
    IFSegForConditionalGeneration,
    IFSegForSemanticSegmentation,
    IFSegModel,
)
from .processing import IFSegImageProcessor, IFSegImageSegmentationPipeline, IFSegProcessor  # noqa: E402
from .recipe import resolve_model  # noqa: E402

NANO = _HERE / "nano"
"""Folder of the embedded checkpoint, for `from_pretrained`: a small OFA, before any tuning on words."""


def _register() -> None:
    """Tells transformers about the classes; safe to run again, as a reload does."""
    AutoConfig.register(IFSegConfig.model_type, IFSegConfig, exist_ok=True)
    AutoModel.register(IFSegConfig, IFSegModel, exist_ok=True)
    AutoModelForImageTextToText.register(IFSegConfig, IFSegForConditionalGeneration, exist_ok=True)
    AutoModelForSemanticSegmentation.register(IFSegConfig, IFSegForSemanticSegmentation, exist_ok=True)
    # It needs no torchvision, so it serves where that is installed, too.
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
    # This class leaves other models to transformers' own. PIPELINE_REGISTRY.register_pipeline would warn, and forget
    # which Auto classes and which default model the task has.
    pipelines.SUPPORTED_TASKS["image-segmentation"]["impl"] = IFSegImageSegmentationPipeline


_register()

__all__ = [
    "NANO",
    "IFSegConfig",
    "IFSegForConditionalGeneration",
    "IFSegForSemanticSegmentation",
    "IFSegImageProcessor",
    "IFSegImageSegmentationPipeline",
    "IFSegModel",
    "IFSegProcessor",
    "resolve_model",
]
