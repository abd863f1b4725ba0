"""The checkpoints in the folder of a training run, and their metadata. Imports the standard library only."""

import json
import re
from pathlib import Path

__all__ = ["CHECKPOINT_FILE", "checkpoints", "read_checkpoint"]

CHECKPOINT_FILE = "checkpoint.json"  # in every checkpoint: its step and the settings of its run


def checkpoints(folder: str | Path) -> dict[int, Path]:
    """The complete checkpoints in `folder` by step, in ascending order."""
    names = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in Path(folder).glob("checkpoint-*")}
    found = {int(name[1]): path for path, name in names.items() if name and (path / CHECKPOINT_FILE).is_file()}
    return dict(sorted(found.items()))


def read_checkpoint(checkpoint: Path) -> dict:
    """The metadata of a checkpoint: `step`, `settings`, ... Raises `ValueError`, in one line, if it is damaged."""
    try:
        metadata = json.loads((checkpoint / CHECKPOINT_FILE).read_text(encoding="utf-8"))
        return {**metadata, "step": int(metadata["step"]), "settings": dict(metadata["settings"])}
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f'The checkpoint "{checkpoint}" is damaged: its {CHECKPOINT_FILE} cannot be read.') from None
