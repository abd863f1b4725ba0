"""`transformers.pipeline` for adapters: the base model that an adapter names, with the adapter and its words."""

from pathlib import Path
from typing import Any

import torch

from ifseg_hf.adapters import base_of_adapter, find_adapter, load_adapter
from ifseg_hf.hub.published import resolve_checkpoint
from ifseg_hf.loading import quiet_loading
from ifseg_hf.modeling.modeling_ifseg import IFSegForSemanticSegmentation
from ifseg_hf.processing.processing_ifseg import IFSegProcessor
from ifseg_hf.remote_code import import_backbone

__all__ = ["load_adapter_arguments"]

TASK = "image-segmentation"
LOADING = ("config", "revision", "token", "device_map", "dtype", "torch_dtype", "trust_remote_code", "model_kwargs")


def load_adapter_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """
    Returns the arguments of `transformers.pipeline` with the loaded model and its processor in place of an adapter.

    transformers itself would look for the base model "ifseg-ofa-nano" on the Hub.

    Args:
        arguments: by name. They are returned unchanged if `model` is no adapter with words.

    Raises:
        `ValueError`: peft is not installed, or the adapter or its base model cannot be loaded.
    """
    model, task = arguments.get("model"), arguments.get("task")
    on_hub = isinstance(model, str) and not Path(model).is_dir()
    if not isinstance(model, (str, Path)) or (task != TASK and (task is not None or on_hub)):
        return arguments
    folder = find_adapter(model, arguments.get("revision"), arguments.get("token"))
    if folder is None:
        return arguments
    base = resolve_checkpoint(base_of_adapter(folder))
    import_backbone(base, bool(arguments.get("trust_remote_code")))
    dtype = arguments.get("dtype") or arguments.get("torch_dtype")
    with quiet_loading():
        loaded = IFSegForSemanticSegmentation.from_pretrained(
            base,
            dtype=torch.float32 if dtype in (None, "auto") else dtype,
            device_map=arguments.get("device_map"),
            **(arguments.get("model_kwargs") or {}),
        )
    load_adapter(loaded, folder)
    processor = IFSegProcessor.from_pretrained(base)
    parts = {"tokenizer": processor.tokenizer, "image_processor": processor.image_processor, "processor": processor}
    given = {name: value for name, value in arguments.items() if name not in LOADING and value is not None}
    return {**parts, **given, "task": TASK, "model": loaded}
