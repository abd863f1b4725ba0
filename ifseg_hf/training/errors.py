"""Errors of training, each with a message of one line."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError

from ifseg_hf.data.image_files import SampleError

__all__ = ["SettingError", "TrainingError", "TrainingStopped", "on_every_process", "sample_errors", "writing_errors"]


class SettingError(ValueError):
    """A wrong setting that is found only after data, devices or the model are loaded."""


class TrainingError(RuntimeError):
    """Training that cannot continue."""


class TrainingStopped(KeyboardInterrupt):
    """Training that Ctrl-C or SIGTERM stopped after a complete step."""

    def __init__(self, signal_number: int):
        super().__init__(signal_number)
        self.signal_number = signal_number


@contextmanager
def sample_errors() -> Iterator[None]:
    """Turns a `SampleError`, of this process or a loader worker, into a `TrainingError`."""
    try:
        yield
    except SampleError as error:
        # The message of a worker's error starts with its traceback.
        reason = str(error).strip().splitlines()[-1]
        reason = reason.removeprefix(f"{SampleError.__module__}.{SampleError.__qualname__}: ")
        raise TrainingError(f"{reason} Continue from the last checkpoint, if there is one, with --resume.") from error


@contextmanager
def writing_errors(failure: str, incomplete: Path | None = None) -> Iterator[None]:
    """Turns errors of writing files into a `TrainingError` that begins with `failure`.

    Args:
        failure: what could not be written; the reason is appended.
        incomplete: the folder that is being written, deleted on an error.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        if isinstance(error, RuntimeError):
            if "inline_container" not in reason:  # in the message of every file error of torch.save
                raise
            reason = "a file could not be written to its end (is the disk full?)"
        if incomplete:
            shutil.rmtree(incomplete, ignore_errors=True)
        raise TrainingError(f"{failure}: {reason}.") from error


@contextmanager
def on_every_process(accelerator: Accelerator) -> Iterator[None]:
    """Raises a `TrainingError` of one process in all processes, since the others would wait for it forever."""
    failed = None
    try:
        yield
    except TrainingError as error:
        failed = error
    count = accelerator.reduce(torch.tensor(float(failed is not None), device=accelerator.device), "sum").item()
    if failed is not None:
        raise failed
    if count:
        raise TrainingError("Another process could not write its part of the checkpoint.")
