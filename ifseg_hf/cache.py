"""The cache of tuned and converted models: one folder for each. Imports the standard library only.

Tuned models are in `tuned`, by model, words and recipe; models that [`ifseg_hf.hub.published`] converted are in
`converted`. A folder appears under its name only when it is complete. While it is written, the name of a tuned model
ends in `.incomplete` and that of a converted one begins with a dot; a file that ends in `.lock` is locked by the
process that writes it.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Container, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ifseg_hf.training.config import INCOMPLETE, SETTINGS_FILE, TrainingConfig

__all__ = ["CacheEntry", "cache_entries", "cache_folder", "clear_cache", "entry_folder", "locked", "shrink_cache"]

CONVERTED = "converted"  # folder of converted models in the cache
MODEL_FILES = (".json", ".safetensors", ".bin", ".txt", ".py")


@dataclass
class CacheEntry:
    """A tuned or converted model in the cache, or the rest of a tuning that was interrupted.

    Attributes:
        folder: where it is. name: the folder's name, for [`clear_cache`].
        model: the model before tuning or conversion; categories: the words, none of a converted model.
        size: in bytes. used: time of its last use, in seconds since the epoch. complete: whether it can be used.
    """

    folder: Path
    model: str
    categories: list[str]
    size: int
    used: float
    complete: bool

    @property
    def name(self) -> str:
        return self.folder.name.removesuffix(INCOMPLETE)

    @property
    def lock(self) -> Path:
        """The file that a process locks while it writes the model."""
        dot = "." if self.folder.parent.name == CONVERTED else ""
        return self.folder.with_name(f"{dot}{self.name}.lock")


def cache_folder() -> Path:
    """Returns `$IFSEG_CACHE`; without it `ifseg` in `$XDG_CACHE_HOME`, or else in `~/.cache`."""
    own = os.environ.get("IFSEG_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ifseg"


def entry_folder(model: Path, config: TrainingConfig) -> Path:
    """Returns the folder in the cache for the result of a tuning, whether it exists or not.

    Args:
        model: local folder of the model before tuning, recognised by the names, sizes and times of its files.
        config: the settings; those that do not change the result are not compared.
    """
    files = sorted(file for file in model.iterdir() if file.suffix in MODEL_FILES and file.is_file())
    states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    settings = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.metadata["recipe"] or not (field.metadata["private"] or field.metadata["may_change"])
    }
    digest = hashlib.sha256(json.dumps([states, settings]).encode()).hexdigest()
    words = re.sub(r"[^a-z0-9]+", "-", " ".join(config.categories or ()).lower())[:40].strip("-")
    return cache_folder() / "tuned" / f"{words or 'words'}-{digest[:16]}"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks a tuned model's folder until the block or the process ends; prints a message while it waits."""
    with _locked(folder.with_name(f"{folder.name}.lock"), "is tuning on these words: waiting for its result"):
        yield


@contextmanager
def _locked(lock: Path, reason: str) -> Iterator[None]:
    """Locks a file, and prints that another process has the `reason` to lock it."""
    from huggingface_hub.utils import WeakFileLock  # takes long to import, and few need it

    lock.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(WeakFileLock(lock, timeout=0.5))
        except TimeoutError:
            print(f"Another process {reason}.", file=sys.stderr, flush=True)
            stack.enter_context(WeakFileLock(lock))
        yield


def cache_entries() -> list[CacheEntry]:
    """Returns what is in the cache, last used first."""
    entries = []
    for folder in [*(cache_folder() / "tuned").glob("*"), *(cache_folder() / CONVERTED).glob("*")]:
        if not folder.is_dir() or folder.name.startswith("."):
            continue
        try:
            settings = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            settings = {}
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        model, categories = settings.get("model", "?"), list(settings.get("categories") or ())
        if folder.parent.name == CONVERTED:
            model = folder.name.rpartition("-")[0].replace("--", "/")
        complete = not folder.name.endswith(INCOMPLETE)
        entries.append(CacheEntry(folder, model, categories, size, folder.stat().st_mtime, complete))
    return sorted(entries, key=lambda entry: -entry.used)


def clear_cache(names: Iterable[str] = ()) -> list[CacheEntry]:
    """Deletes entries by their names, or all, and returns them. Waits for a process that writes one of them.

    Raises `ValueError`, before anything is deleted, for a name that is not in the cache.
    """
    entries, names = cache_entries(), list(names)
    for name in names:
        if name not in {entry.name for entry in entries}:
            raise ValueError(f'There is no "{name}" in the cache {cache_folder()}: `ifseg cache` lists the names.')
    chosen = [entry for entry in entries if not names or entry.name in names]
    for entry in chosen:
        with _locked(entry.lock, "writes this model: waiting for it"):
            shutil.rmtree(entry.folder, ignore_errors=True)
    return chosen


def shrink_cache(limit: int, keep: Container[Path] = ()) -> list[CacheEntry]:
    """Deletes tuned models, the one used longest ago first, until the rest has at most `limit` bytes; returns them.

    Args:
        keep: folders of models that are not deleted. Neither is one that a process writes now.
    """
    from huggingface_hub.utils import WeakFileLock  # takes long to import, and few need it

    entries = [entry for entry in cache_entries() if entry.folder.parent.name != CONVERTED]
    size, deleted = sum(entry.size for entry in entries), []
    for entry in reversed(entries):
        if size <= limit:
            break
        if entry.folder in keep:
            continue
        with suppress(TimeoutError), WeakFileLock(entry.lock, timeout=0.1):
            shutil.rmtree(entry.folder, ignore_errors=True)
            size -= entry.size
            deleted.append(entry)
    return deleted
