"""Code saved with a model, for backbones that this package does not have."""

from pathlib import Path

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module


def import_backbone(model: str | Path, trust_remote_code: bool = False) -> None:
    """
    Imports the file of a model's backbone, which registers the backbone, unless it is registered already.

    Args:
        model: folder or Hub id, as [`ifseg_hf.resolve_model`] returns it.
        trust_remote_code: whether to run the code that is saved with the model.

    Raises:
        `ValueError`: the backbone is unknown, and its code is missing or must not be run.
    """
    config, _ = PreTrainedConfig.get_config_dict(model)
    model_type = (config.get("backbone_config") or config).get("model_type")
    if model_type in CONFIG_MAPPING:
        return
    reference = config.get("auto_map", {}).get("AutoConfig")
    if reference is None:
        raise ValueError(f'the backbone\'s model_type "{model_type}" is unknown, and no code is saved with the model.')
    if not trust_remote_code:
        raise ValueError(
            f'the backbone\'s model_type "{model_type}" is unknown: to run the code saved with the model, set '
            "trust_remote_code (--trust-remote-code)."
        )
    get_class_from_dynamic_module(reference, str(model))


__all__ = ["import_backbone"]
