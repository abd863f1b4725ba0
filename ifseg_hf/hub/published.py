"""Published OFA checkpoints as models to start from: converted once, into a cache.

    path = resolve_checkpoint("OFA-Sys/ofa-base")
    model = IFSegForSemanticSegmentation.from_pretrained(path)

Other models are returned unchanged.
"""

import hashlib
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.utils import WeakFileLock

from ifseg_hf.adapters import base_of_adapter, find_adapter
from ifseg_hf.cache import CONVERTED, cache_folder
from ifseg_hf.hub.checkpoint_reader import ConversionError, locate_checkpoint, read_json, weight_files
from ifseg_hf.hub.conversion import TRANSFORMERS_VOCABULARY, convert_ofa_checkpoint, vocabulary_files
from ifseg_hf.pretrained import CHECKPOINT_SUFFIXES, NANO, resolve_model, use_converted

_FORMAT = "1"  # counted up when conversion gives another result, so that models are converted again


def resolve_checkpoint(
    name: str | Path, cache_dir: str | Path | None = None, notify: Callable[[str], object] | None = None
) -> str | Path:
    """Returns the folder or Hub id of a model for `from_pretrained`; a published OFA is converted first.

    Published are a Hub id or folder in OFA-Sys's layout (`config.json`, `vocab.json`, `merges.txt`, weights) and a
    fairseq `.pt` file with its vocabulary beside it. No code in them is run. The converted folder stays in a cache, by
    the commit of the Hub or the contents of the files, and appears there only when it is complete; of several
    processes one converts, the others wait. In this process, [`ifseg_hf.resolve_model`] then returns the folder, too.
    The base model of an adapter is converted likewise.

    Args:
        name: folder, Hub id, "ifseg-ofa-nano", or `.pt` file.
        cache_dir: folder of converted models. Default: `converted` in [`ifseg_hf.cache.cache_folder`].
        notify: function that is called with a sentence before a conversion. Default: prints it to stderr.

    Raises:
        `FileNotFoundError`: as [`ifseg_hf.resolve_model`] does.
        ConversionError: the checkpoint cannot be converted, or the cache cannot be written.
    """
    path = resolve_model(name, converted=False)
    found = _find_published(path)
    if found is None:
        if path != NANO and (adapter := find_adapter(path)) is not None:
            resolve_checkpoint(base_of_adapter(adapter), cache_dir, notify)
        return path
    source, key = found
    cache = cache_folder() / CONVERTED if cache_dir is None else Path(cache_dir).expanduser()
    folder = cache / f"{_readable(path)}-{_digest([_FORMAT, *key])[:16]}"
    if not folder.is_dir():
        say = notify or (lambda sentence: print(sentence, file=sys.stderr, flush=True))
        _convert(source(), folder, lambda: say(f"Converting {name} once; the result is kept in {folder}."))
    use_converted(name, folder)
    return folder


def _convert(source: Path, folder: Path, notify: Callable[[], object]) -> None:
    """Converts a checkpoint to a folder of the cache, unless another process does or did so."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(folder.with_name(f".{folder.name}.lock")):
            if folder.is_dir():
                return
            for rest in folder.parent.glob(f".{folder.name}-*"):  # of a process that was killed
                shutil.rmtree(rest, ignore_errors=True)
            notify()
            convert_ofa_checkpoint(source, folder)
    except OSError as error:
        raise ConversionError(
            f"The cache {folder.parent} cannot be written ({error.strerror or error}). Free some space or make it "
            "writable; `ifseg convert` converts to another folder."
        ) from error


def _find_published(path: str | Path) -> tuple[Callable[[], Path], list[str]] | None:
    """A function that returns the local path of a published checkpoint, and its key; `None` for any other model."""
    if isinstance(path, str):
        return _find_on_hub(path)
    if path.is_file():
        return lambda: path, _contents([path, *vocabulary_files(path.parent)])
    config_file = path / "config.json"
    if config_file.is_file() and not is_published(read_json(config_file)):
        return None
    weights = weight_files(path)
    # Without config.json it may be a folder of another kind, whose use ends in an error that says so.
    if not weights or not all((path / file).is_file() for file in TRANSFORMERS_VOCABULARY):
        if not config_file.is_file():
            return None
        raise ConversionError(
            f"{path} is an OFA as OFA-Sys publishes it, but incomplete: it needs pytorch_model.bin and "
            f"{' and '.join(TRANSFORMERS_VOCABULARY)} beside config.json. Download it again."
        )
    return lambda: path, _contents([*weights, *vocabulary_files(path)])


def _find_on_hub(repo_id: str) -> tuple[Callable[[], Path], list[str]] | None:
    """As [`_find_published`], for a Hub id. Downloads config.json only."""
    try:
        config_file = Path(hf_hub_download(repo_id, "config.json"))
    except Exception:  # no such repository, no network, ...: `from_pretrained` reports it, with a better message
        return None
    if not is_published(read_json(config_file)):
        return None
    commit = config_file.parent.name  # the cache of the Hub has a folder for each commit
    return lambda: locate_checkpoint(repo_id, TRANSFORMERS_VOCABULARY, revision=commit), [repo_id, commit]


def is_published(config: dict) -> bool:
    """Whether a `config.json` is that of an OFA as OFA-Sys publishes it, not one that this package has saved."""
    return config.get("model_type") == "ofa" and "trunk_type" not in config


def _contents(files: Iterable[Path]) -> list[str]:
    """Names of the files and hashes of their contents."""
    parts = []
    for path in files:
        try:
            with path.open("rb") as file:
                parts += [path.name, hashlib.file_digest(file, "sha256").hexdigest()]
        except OSError as error:
            raise ConversionError(f"{path} cannot be read ({error.strerror or error}).") from error
    return parts


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _readable(path: str | Path) -> str:
    """The name of a checkpoint as the beginning of a folder's name: `OFA-Sys--ofa-base`, `ofa_base`."""
    name = path.replace("/", "--") if isinstance(path, str) else path.resolve().name
    name = next((name.removesuffix(suffix) for suffix in CHECKPOINT_SUFFIXES if name.endswith(suffix)), name)
    return re.sub(r"[^\w.-]", "_", name)[:60] or "model"


__all__ = ["is_published", "resolve_checkpoint"]
