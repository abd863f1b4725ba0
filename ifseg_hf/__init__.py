"""IFSeg for transformers: image-free semantic segmentation into categories named by words.

Importing this package registers IFSeg with transformers' Auto classes and `pipeline("image-segmentation")`. Saved
models carry their code, so that they also load where the package is not installed.

The import loads neither torch nor transformers, so that scripts reject wrong arguments at once: names are resolved when
they are first used, and the classes are registered when transformers is imported.
"""

import importlib
import sys
from typing import TYPE_CHECKING

from wrapt import register_post_import_hook

from ifseg_hf.pretrained import NANO, resolve_model

if TYPE_CHECKING:
    from ifseg_hf.modeling import (
        IFSegBackbone,
        IFSegConfig,
        IFSegForSemanticSegmentation,
        OFAConfig,
        OFAForConditionalGeneration,
        OFAModel,
    )
    from ifseg_hf.processing import IFSegImageProcessor, IFSegImageSegmentationPipeline, IFSegProcessor
    from ifseg_hf.tuning import segment, tune

_LAZY = {
    "IFSegBackbone": "ifseg_hf.modeling",
    "IFSegConfig": "ifseg_hf.modeling",
    "IFSegForSemanticSegmentation": "ifseg_hf.modeling",
    "OFAConfig": "ifseg_hf.modeling",
    "OFAForConditionalGeneration": "ifseg_hf.modeling",
    "OFAModel": "ifseg_hf.modeling",
    "IFSegImageProcessor": "ifseg_hf.processing",
    "IFSegImageSegmentationPipeline": "ifseg_hf.processing",
    "IFSegProcessor": "ifseg_hf.processing",
    "segment": "ifseg_hf.tuning",
    "tune": "ifseg_hf.tuning",
}


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


def _register(module) -> None:
    """Registers the classes with transformers, unless a module that defines them is still being imported."""
    for name in _REGISTERED:
        if name in sys.modules and not hasattr(sys.modules[name], "__all__"):
            return  # this module is being imported, and its hook calls this function again at the end
    importlib.import_module("ifseg_hf.registration").register()


# The hook of `transformers` runs when the package itself is imported, before any of its submodules.
_REGISTERED = ("ifseg_hf.modeling", "ifseg_hf.processing", "ifseg_hf.registration")
for _name in ("transformers", *_REGISTERED):
    register_post_import_hook(_register, _name)

__all__ = [
    "NANO",
    "IFSegBackbone",
    "IFSegConfig",
    "IFSegForSemanticSegmentation",
    "IFSegImageProcessor",
    "IFSegImageSegmentationPipeline",
    "IFSegProcessor",
    "OFAConfig",
    "OFAForConditionalGeneration",
    "OFAModel",
    "resolve_model",
    "segment",
    "tune",
]
