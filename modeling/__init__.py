"""Configuration and models. What a Hub checkpoint carries: nothing here imports the rest of the project."""

from .configuration_ifseg import IFSegConfig
from .modeling_ifseg import IFSegForSemanticSegmentation, IFSegSegmentationOutput
from .modeling_ofa import IFSegForConditionalGeneration, IFSegModel, IFSegPreTrainedModel

__all__ = [
    "IFSegConfig",
    "IFSegForConditionalGeneration",
    "IFSegForSemanticSegmentation",
    "IFSegModel",
    "IFSegPreTrainedModel",
    "IFSegSegmentationOutput",
]
