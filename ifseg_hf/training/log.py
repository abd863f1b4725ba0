"""The training log: a file with one JSON object per step."""

import json
import os
from pathlib import Path

from accelerate.tracking import GeneralTracker, on_main_process

LOG_FILE = "training_log.jsonl"
USAGE_FILE = "training_usage.jsonl"
"""One line for each part of a run, from its start or a checkpoint on: steps, time, memory and device."""


class TrainingLog(GeneralTracker):
    """An accelerate tracker that writes `{"step": 1, "loss": 2.3, ...}` lines to [`LOG_FILE`] in a folder.

    Args:
        folder: the output folder of the run.
        keep_until: the last step that an existing log keeps, for a resumed run: its log then equals that of an
            uninterrupted run. By default an existing log is overwritten.
    """

    name = "training_log"
    requires_logging_directory = False

    def __init__(self, folder: str | Path, keep_until: int = -1):
        super().__init__()
        self.file = Path(folder) / LOG_FILE
        self.keep_until = keep_until

    @property
    def tracker(self) -> Path:
        return self.file

    @on_main_process
    def start(self) -> None:
        lines = read_log(self.file.parent) if self.keep_until >= 0 and self.file.exists() else []
        incomplete = self.file.with_name(f"{LOG_FILE}.incomplete")
        kept = "".join(_line(line) for line in lines if line["step"] <= self.keep_until)
        incomplete.write_text(kept, encoding="utf-8")
        incomplete.replace(self.file)

    @on_main_process
    def log(self, values: dict, step: int | None = None, **kwargs) -> None:
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(_line({"step": step, **values}))


def read_log(folder: str | os.PathLike) -> list[dict]:
    """The logged steps of a training output folder, without a half-written last line.

    Raises `ValueError`, in one line, if there is no log.
    """
    return _read_lines(Path(folder) / LOG_FILE)


def write_usage(folder: str | os.PathLike, usage: dict, append: bool) -> None:
    """Writes a part of a run to [`USAGE_FILE`], after the earlier parts or in place of an earlier run."""
    with open(Path(folder) / USAGE_FILE, "a" if append else "w", encoding="utf-8") as file:
        file.write(_line(usage))


def read_usage(folder: str | os.PathLike) -> list[dict]:
    """The parts of a run: `first_step`, `last_step`, `seconds`, `peak_memory` in bytes, `device`, ...; [] if unknown.

    Raises `ValueError`, in one line, for a damaged file.
    """
    file = Path(folder) / USAGE_FILE
    return _read_lines(file) if file.is_file() else []


def _read_lines(file: Path) -> list[dict]:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f'"{file.parent}" holds no {file.name} that can be read: {error.strerror}.') from None
    complete = text[: text.rfind("\n") + 1]
    try:
        return [json.loads(line) for line in complete.splitlines()]
    except ValueError:
        raise ValueError(f'"{file}" is damaged: it has a line that is not JSON.') from None


def _line(values: dict) -> str:
    return json.dumps(values) + "\n"


__all__ = ["LOG_FILE", "USAGE_FILE", "TrainingLog", "read_log", "read_usage", "write_usage"]
