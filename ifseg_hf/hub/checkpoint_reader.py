"""Locating checkpoints, and loading their tensors without running any code in them."""

import json
import pickle
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

# Weight files of a folder, in order of preference.
_WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)


class ConversionError(ValueError):
    """A source cannot be converted or a result cannot be written. The output folder is not created."""


def locate_checkpoint(source: str | Path, other_files: Iterable[str] = (), revision: str | None = None) -> Path:
    """The local file or folder of a checkpoint; for a Hub id, the folder that it is downloaded to.

    Args:
        source: path or Hub id.
        other_files: names of files to download besides weights and config.json.
        revision: branch, tag or commit on the Hub.

    Raises:
        ConversionError: there is no such path, and it is no Hub id or could not be downloaded.
    """
    path = Path(source)
    if path.exists():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) or path.suffix in (".pt", ".pth", ".bin", ".safetensors"):
        raise ConversionError(f"There is no file or folder {source}.")
    patterns = [*_WEIGHT_FILES, "model-*.safetensors", "pytorch_model-*.bin", "config.json", *other_files]
    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=patterns))
    except Exception as error:  # network, authorisation and unknown names raise different classes
        raise ConversionError(
            f"There is no folder {source} here, and it could not be downloaded from the Hub ({first_sentence(error)})."
        ) from error


def read_weights(path: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Returns the tensors of a checkpoint by name, and the names of the other entries in its file.

    Args:
        path: a folder in the transformers format, or one weight file.

    Raises:
        ConversionError: there are no weights, or a file is damaged or would run code.
    """
    if path.is_file():
        return _read_file(path)
    file = _weights_of(path)
    if file is None:
        raise ConversionError(
            f"{path} has no weights: it contains none of {', '.join(_WEIGHT_FILES)}. "
            "For a fairseq checkpoint, give the path of the .pt file."
        )
    return _read_shards(file) if file.suffix == ".json" else _read_file(file)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of a folder, an index among them; [] if there are none."""
    file = _weights_of(folder)
    if file is None:
        return []
    if file.suffix != ".json":
        return [file]
    shards = read_json(file).get("weight_map")
    names = sorted({Path(str(shard)).name for shard in shards.values()}) if isinstance(shards, dict) else []
    return [file, *(folder / name for name in names)]


def _weights_of(folder: Path) -> Path | None:
    """The file that `from_pretrained` would load, or the index of several; `None` if there is none."""
    return next((folder / name for name in _WEIGHT_FILES if (folder / name).is_file()), None)


def _read_shards(index: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The tensors of the weight files that an index names; there are no other entries."""
    shard_of = read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise ConversionError(f"{index} is not an index of weight files: it has no weight_map.")
    weights: dict[str, torch.Tensor] = {}
    for shard in sorted({Path(str(shard)).name for shard in shard_of.values()}):
        if not (index.parent / shard).is_file():
            raise ConversionError(f"{index} names {shard}, which is missing. Download the folder again.")
        weights.update(_read_file(index.parent / shard)[0])
    if weights.keys() != shard_of.keys():
        difference = listing(weights.keys() ^ shard_of.keys())
        raise ConversionError(f"{index} and the weight files beside it name different tensors: {difference}.")
    return weights, []


def _read_file(path: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The tensors of one weight file by name, and the names of its other entries."""
    try:
        loaded = load_file(path) if path.suffix == ".safetensors" else _read_pickle(path)
    except ConversionError:
        raise
    except Exception as error:  # damaged files make the readers raise many classes
        raise ConversionError(
            f"{path} cannot be read as a checkpoint ({first_sentence(error)}). It may be cut short, damaged, or a "
            "different kind of file (a Git LFS pointer, a web page): download it again."
        ) from error
    other_entries = []
    if isinstance(loaded, dict) and isinstance(loaded.get("model"), dict):  # fairseq: weights beside training state
        other_entries = sorted(str(name) for name in loaded if name != "model")
        loaded = loaded["model"]
    if not isinstance(loaded, dict) or not loaded:
        raise ConversionError(f"{path} holds no weights: expected names with tensors, or fairseq's `model` entry.")
    if wrong := [name for name, value in loaded.items() if not isinstance(name, str) or not _is_plain_tensor(value)]:
        raise ConversionError(
            f"{path} is no checkpoint of weights: these entries are no plain tensors with a name: {listing(wrong)}."
        )
    return dict(loaded), other_entries


def _is_plain_tensor(value: Any) -> bool:
    """Whether `value` is a dense tensor with its values in memory."""
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and not (value.is_meta or value.is_nested or value.is_quantized)
    )


class _Inert:
    """Stands in for every class and function in a pickle that torch does not trust; calling it has no effect."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


def _read_pickle(path: Path) -> Any:
    """The content of a file written by `torch.save`, loaded by torch's restricted unpickler.

    That unpickler creates tensors and containers only and refuses everything else, including the Namespace that
    fairseq saves beside the weights. So every name that it would refuse is replaced by a class that does nothing. Some
    names stay refused, before they are called: those in modules that torch blocks and, in the format before PyTorch
    1.6, all but tensors and containers.
    """
    arguments = {}
    inert = []
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            # A memory-mapped file does not load the optimiser's state.
            arguments["mmap"] = all(member.compress_type == zipfile.ZIP_STORED for member in archive.infolist())
        if damaged is not None:
            raise ConversionError(f"{path} is damaged: the checksum of {damaged} is wrong. Download it again.")
        inert = [(_Inert, name) for name in get_unsafe_globals_in_checkpoint(path)]
    try:
        with safe_globals(inert):
            return torch.load(path, map_location="cpu", weights_only=True, **arguments)
    except pickle.UnpicklingError as error:
        if name := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ConversionError(
                f"{path} was refused: it calls {name[1]}, and a checkpoint must not run code. No code in it was run. "
                "If you trust its source, load the file yourself, save its weights alone, and convert that file."
            ) from error
        # torch's message advises to disable this protection; only its last part is the reason.
        reason = re.search(r"WeightsUnpickler error:\s*(.*)", str(error))
        raise pickle.UnpicklingError(reason[1] if reason else "not written by torch.save") from None


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file with one object. Raises `ConversionError` for any other file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path} is no JSON file ({first_sentence(error)}). Download it again.") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds a {type(content).__name__}; expected a JSON object.")
    return content


def first_sentence(error: BaseException) -> str:
    """The first sentence of an error's message, for a message of one line."""
    return re.split(r"\.?\n|\. |\.$", str(error).strip())[0] or type(error).__name__


def listing(names: Iterable[str]) -> str:
    """The names, sorted, with commas between them."""
    return ", ".join(sorted(map(str, names)))


__all__ = [
    "ConversionError",
    "first_sentence",
    "listing",
    "locate_checkpoint",
    "read_json",
    "read_weights",
    "weight_files",
]
