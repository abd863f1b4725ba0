"""LoRA adapters of words: made for training, saved with their words, found in folders and on the Hub.

An adapter changes the linear layers among the parameters that tuning on words trains (section 3 of the paper), and
replaces what the vision-language model lacks, such as OFA's segmentation positions.
"""

import copy
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from ifseg_hf.loading import quiet_loading
from ifseg_hf.modeling.adapters_ifseg import PEFT_MISSING
from ifseg_hf.modeling.modeling_ifseg import IFSegForSemanticSegmentation
from ifseg_hf.pretrained import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    ADAPTER_WORDS,
    EMBEDDED,
    base_of_adapter,
    resolve_model,
)

ADAPTER_FILES = (ADAPTER_WORDS, ADAPTER_CONFIG, ADAPTER_WEIGHTS)

__all__ = [
    "add_lora",
    "base_of_adapter",
    "find_adapter",
    "load_adapter",
    "lora_targets",
    "merge_adapter",
    "new_modules",
    "refuse_adapter",
    "require_adapter",
    "save_adapter",
    "split_adapter",
    "words_of_adapter",
]


def add_lora(model: IFSegForSemanticSegmentation, rank: int, base: str) -> None:
    """
    Adds a LoRA adapter to a model and freezes all other parameters.

    Args:
        model: gets the layers of [`lora_targets`] adapted and those of [`new_modules`] copied.
        rank: of the two matrices of each layer; their product is scaled by 2.
        base: folder, Hub id or name of the model, which the saved adapter names.

    Raises `ImportError` without peft.
    """
    if importlib.util.find_spec("peft") is None:
        raise ImportError(PEFT_MISSING)
    from peft import LoraConfig  # an optional dependency

    lora = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=lora_targets(model), modules_to_save=new_modules(model) or None
    )
    model.add_adapter(lora)
    path = resolve_model(base, converted=False)
    lora.base_model_name_or_path = (
        EMBEDDED if base == EMBEDDED else str(path.resolve() if isinstance(path, Path) else path)
    )


def lora_targets(model: IFSegForSemanticSegmentation) -> list[str]:
    """Names of the linear layers whose weights are among the backbone's `image_free_parameters`."""
    trained = {id(parameter) for parameter in model.backbone.image_free_parameters()}
    kept = tuple(f"{name}." for name in new_modules(model))
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and id(module.weight) in trained and not name.startswith(kept)
    ]


def new_modules(model: IFSegForSemanticSegmentation) -> list[str]:
    """Names of the modules with the backbone's `new_parameters`, which an adapter holds in full."""
    names = {f"backbone.{name.rstrip('.')}" for name in model.backbone.new_parameters}
    return [name for name, _ in model.named_modules() if name in names]


def save_adapter(
    model: IFSegForSemanticSegmentation, folder: Path, state_dict: Mapping[str, torch.Tensor] | None = None
) -> None:
    """
    Writes the active adapter and the words of a model, in peft's layout, with weights in float16.

    Args:
        state_dict: the weights of the model. Default: `model.state_dict()`.
    """
    from peft import get_peft_model_state_dict  # an optional dependency

    folder.mkdir(parents=True, exist_ok=True)
    (name,) = model.active_adapters()
    weights = get_peft_model_state_dict(
        model,
        None if state_dict is None else dict(state_dict),
        name,
        save_embedding_layers=False,  # or else peft looks for the base model on the Hub
    )
    half = {f"base_model.model.{key}": x.detach().half().contiguous().cpu() for key, x in weights.items()}
    save_file(half, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = copy.copy(model.peft_config[name])
    config.inference_mode, config.target_modules = True, sorted(config.target_modules)
    config.save_pretrained(folder)
    model.save_words(folder)


def find_adapter(name: str | Path, revision: str | None = None, token: str | bool | None = None) -> Path | None:
    """
    Returns the local folder of an adapter with words; one of the Hub is downloaded, unless its files are in the cache.

    Args:
        name: folder or Hub id of an adapter or of a model; revision, token: of a repository on the Hub.

    Returns:
        `None` if it is no adapter, also where the Hub has no such repository or cannot be reached.
    """
    try:
        path = resolve_model(name)
    except FileNotFoundError:
        return None
    if isinstance(path, Path):
        return path if all((path / file).is_file() for file in ADAPTER_FILES) else None
    try:  # the words first, which adapters of other programs lack
        files = [hf_hub_download(path, file, revision=revision, token=token) for file in ADAPTER_FILES]
    except (OSError, ValueError):
        return None
    return Path(files[0]).parent


def require_adapter(name: str | Path) -> Path:
    """As [`find_adapter`]; raises `ValueError` if it is no adapter."""
    folder = find_adapter(name)
    if folder is None:
        raise ValueError(
            f'"{name}" is no adapter with words: give the folder of an adapter of `ifseg tune --lora`, or its Hub id.'
        )
    return folder


def split_adapter(name: str | Path) -> tuple[str | Path, Path | None]:
    """Returns the base model of an adapter and the adapter's folder; for any other model its name and `None`."""
    folder = None if str(name) == EMBEDDED else find_adapter(name)
    return (name, None) if folder is None else (base_of_adapter(folder), folder)


def refuse_adapter(name: str | Path) -> None:
    """Raises `ValueError` if a model to tune is an adapter."""
    base, folder = split_adapter(name)
    if folder is not None:
        raise ValueError(
            f'"{name}" is an adapter, which cannot be tuned further: tune the model that it was tuned on, "{base}".'
        )


def words_of_adapter(folder: Path) -> dict[str, Any]:
    """The words of an adapter, as attributes of [`IFSegConfig`] by name. Raises `ValueError` if they are damaged."""
    try:
        words = json.loads((folder / ADAPTER_WORDS).read_text(encoding="utf-8"))["words"]
    except (OSError, ValueError, KeyError, TypeError):
        words = None
    if not isinstance(words, dict):
        raise ValueError(f'The words of the adapter "{folder}" ({ADAPTER_WORDS}) cannot be read.')
    return words


def merge_adapter(model: IFSegForSemanticSegmentation) -> None:
    """Adds the active adapter to the weights of the model, whose layers are then as before [`add_lora`].

    The model keeps the words of the adapter, and can be saved or exported as one that was tuned as a whole.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer  # an optional dependency
    from peft.utils import ModulesToSaveWrapper

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            plain = module.get_base_layer()
        elif isinstance(module, ModulesToSaveWrapper):
            plain = module.modules_to_save[module.active_adapters[0]]
        else:
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, plain)
    # What transformers keeps of an adapter: a mark, and the renaming of weights, which it would undo when it saves.
    del model.peft_config
    model._hf_peft_config_loaded = False
    model.__dict__.pop("_weight_conversions", None)
    model.adapter_words.clear()


def load_adapter(model: IFSegForSemanticSegmentation, folder: Path, name: str = "default") -> None:
    """Loads an adapter into a model, with its words, and makes it the active one.

    Raises `ValueError` without peft, and for an adapter that is not of this model or cannot be read.
    """
    try:
        with quiet_loading():
            model.load_adapter(folder, name)
    except (ImportError, OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f'The adapter "{folder}" cannot be loaded: {" ".join(str(error).split())}'[:500]) from error
    model.eval()
