"""What training says at each step, in a file that any program can read: a JSON object a line."""

import json
import os
from pathlib import Path

from accelerate.tracking import GeneralTracker, on_main_process

LOG_FILE = "training_log.jsonl"


class TrainingLog(GeneralTracker):
    """A tracker of accelerate that writes `{"step": 1, "loss": 2.3, ...}` lines to [`LOG_FILE`] in a folder.

    What the file has of steps up to `start` stays, if it is of the run that goes on from there (`goes_on`): a run that
    was killed and resumed then leaves the same file as one that was left alone.
    """

    name = "training_log"
    requires_logging_directory = False

    def __init__(self, folder: str | Path, start: int = 0, goes_on: bool = False):
        super().__init__()
        self.file = Path(folder) / LOG_FILE
        self.kept = start if goes_on else -1

    @property
    def tracker(self) -> Path:
        return self.file

    @on_main_process
    def start(self) -> None:
        lines = read_log(self.file.parent) if self.kept >= 0 and self.file.exists() else []
        incomplete = self.file.with_name(f"{LOG_FILE}.incomplete")
        incomplete.write_text("".join(_line(line) for line in lines if line["step"] <= self.kept), encoding="utf-8")
        incomplete.replace(self.file)

    @on_main_process
    def log(self, values: dict, step: int | None = None, **kwargs) -> None:
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(_line({"step": step, **values}))


def read_log(folder: str | os.PathLike) -> list[dict]:
    """The steps that training has logged in its output folder, without one that a kill has left half written.

    Raises `ValueError`, in one line, if there is no log.
    """
    file = Path(folder) / LOG_FILE
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f'"{folder}" holds no {LOG_FILE} that can be read: {error.strerror}.') from None
    whole = text[: text.rfind("\n") + 1]
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except ValueError:
        raise ValueError(f'"{file}" is damaged: it has a line that is not JSON.') from None


def _line(values: dict) -> str:
    return json.dumps(values) + "\n"


__all__ = ["LOG_FILE", "TrainingLog", "read_log"]
