"""Configurations and models. Checkpoints carry copies of these files, which import nothing else of the project."""

from .backbone import IFSegBackbone
from .backbone_clipcap import ClipCapBackbone
from .backbone_florence2 import Florence2Backbone, Florence2SegmentationConfig
from .backbone_ofa import OFABackbone
from .configuration_clipcap import ClipCapConfig
from .configuration_ifseg import IFSegConfig
from .configuration_ofa import OFAConfig
from .modeling_ifseg import IFSegForSemanticSegmentation, IFSegSegmentationOutput
from .modeling_ofa import OFAForConditionalGeneration, OFAModel

__all__ = [
    "ClipCapBackbone",
    "ClipCapConfig",
    "Florence2Backbone",
    "Florence2SegmentationConfig",
    "IFSegBackbone",
    "IFSegConfig",
    "IFSegForSemanticSegmentation",
    "IFSegSegmentationOutput",
    "OFABackbone",
    "OFAConfig",
    "OFAForConditionalGeneration",
    "OFAModel",
]
