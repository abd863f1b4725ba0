"""Locations of models: the embedded checkpoint, folders and Hub ids. Imports the standard library only."""

import json
import re
from pathlib import Path

EMBEDDED = "ifseg-ofa-nano"
NANO = Path(__file__).resolve().parent / "nano"
"""Folder of the embedded checkpoint, a small OFA that has not been tuned on words, for `from_pretrained`."""
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""peft's files in the folder or repository of an adapter."""
ADAPTER_WORDS = "ifseg_words.json"
"""File beside them with the words that the adapter was tuned on."""
CHECKPOINT_SUFFIXES = (".pt", ".pth")
"""Suffixes of checkpoints that fairseq saves, which are converted before use."""

_converted: dict[str, Path] = {}


def use_converted(name: str | Path, folder: Path) -> None:
    """Makes [`resolve_model`] return a converted folder for a published checkpoint, in this process."""
    _converted[str(name)] = folder


def resolve_model(name: str | Path, converted: bool = True) -> str | Path:
    """Returns the folder or Hub id of a model, for `from_pretrained`.

    Args:
        name: a folder, a Hub id (owner/name), or `"ifseg-ofa-nano"` for the embedded checkpoint. The path of a fairseq
            `.pt` file is returned unchanged, or its folder once it was converted: see
            [`ifseg_hf.hub.published.resolve_checkpoint`].
        converted: return the folder of a published checkpoint that this process converted, in its place.

    Raises:
        `FileNotFoundError`: `name` is neither an existing folder nor a possible Hub id. The Hub is not asked.
    """
    if str(name) == EMBEDDED:
        return NANO
    if converted and str(name) in _converted and _converted[str(name)].is_dir():
        return _converted[str(name)]
    folder = Path(name).expanduser()
    if name != "" and (folder.is_dir() or (folder.suffix in CHECKPOINT_SUFFIXES and folder.is_file())):
        return folder
    # A Hub id has an owner; a name without one is a missing folder.
    if isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        return name
    raise FileNotFoundError(
        f'There is no model folder "{name}". Give the folder of a saved model (`ifseg convert` converts OFA '
        f"checkpoints), a Hub id (owner/name), or {EMBEDDED} for the embedded model."
    )


def base_of_adapter(folder: str | Path) -> str:
    """The name, folder or Hub id of the model that the adapter in a folder was tuned on. Raises `ValueError`."""
    file = Path(folder) / ADAPTER_CONFIG
    try:
        base = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = None
    if not isinstance(base, str) or not base:
        raise ValueError(f'"{folder}" is no adapter: its {ADAPTER_CONFIG} cannot be read, or names no base model.')
    return base


def checkpoint_folder(name: str | Path) -> Path:
    """Returns the local folder of a model; one of the Hub is downloaded first, unless its files are in the cache.

    Args:
        name: as for [`resolve_model`].

    Raises:
        `FileNotFoundError`: as [`resolve_model`] does.
        `ValueError`: the Hub has no such model, or cannot be reached.
    """
    path = resolve_model(name)
    if isinstance(path, Path):
        return path
    from huggingface_hub import snapshot_download  # takes long to import, and few need it

    try:
        return Path(snapshot_download(path, ignore_patterns=["*.md", ".gitattributes"]))
    except (OSError, ValueError) as error:
        raise ValueError(f'The model "{name}" cannot be downloaded: {" ".join(str(error).split())}'[:500]) from error
