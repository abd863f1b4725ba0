"""Tuning on words in a process, with progress and a stop, so that it neither slows nor ends the page."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ifseg_hf.cache import entry_folder
from ifseg_hf.pretrained import checkpoint_folder
from ifseg_hf.training.config import INCOMPLETE
from ifseg_hf.training.log import read_log
from ifseg_hf.training.recipes import training_config

__all__ = ["Progress", "Tuning", "TuningRuns"]

ROOT = Path(__file__).resolve().parents[2]  # the folder that has ifseg_hf, for the worker's path
_KILL_AFTER = 30.0  # seconds between the request to stop and the end of a worker that does not


@dataclass(frozen=True)
class Progress:
    """How far a tuning is: completed steps of all, the loss of each step, and seconds since the first step's end."""

    step: int
    steps: int
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def seconds_left(self) -> float | None:
        """Estimate from the steps so far; `None` before the second step."""
        return None if self.step < 2 else self.seconds / (self.step - 1) * (self.steps - self.step)


class Tuning:
    """A tuning in a process of its worker.

    Args:
        settings: of [`TrainingConfig`], with `model` and `categories`; the recipe of the model completes them.

    Raises:
        `ValueError`: a setting is wrong. Nothing was started.
    """

    def __init__(self, settings: dict[str, Any]):
        self.settings = settings
        self.config = config = training_config({"output_dir": "", **settings})
        self.steps = config.steps
        self.entry = entry_folder(checkpoint_folder(config.model), config)
        with tempfile.TemporaryDirectory() as empty:  # the worker's own folder may hold an interrupted tuning
            replace(config, output_dir=empty).check()
        self.stopping = False
        self._process: subprocess.Popen | None = None
        self._first_step: float | None = None
        self._deadline: float | None = None

    def start(self) -> None:
        """Starts the worker, unless the tuning was stopped before."""
        if self.stopping:
            return
        self._answer = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-m", "ifseg_hf.app.tuning_worker", json.dumps(self.settings)]
        self._process = subprocess.Popen(
            command, stdout=self._answer, stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": path}
        )

    def stop(self) -> None:
        """Asks the worker to stop after its step, with a checkpoint from which the next tuning continues."""
        if not self.stopping:
            self.stopping = True
            self._deadline = time.monotonic() + _KILL_AFTER
            if self._process is not None and self._process.poll() is None:
                self._process.send_signal(signal.SIGTERM)

    def is_running(self) -> bool:
        """Whether the worker still runs; one that does not stop in time is killed."""
        if self._process is None or self._process.poll() is not None:
            return False
        if self._deadline is not None and time.monotonic() > self._deadline:
            self._process.kill()
        return True

    def progress(self) -> Progress:
        """The progress, read from the training log."""
        lines: list[dict] = []
        for folder in (self.entry.with_name(self.entry.name + INCOMPLETE), self.entry):
            try:
                lines = read_log(folder)
                break
            except ValueError:  # there is none yet
                continue
        losses = [line["loss"] for line in lines if "loss" in line]
        if losses and self._first_step is None:
            self._first_step = time.monotonic()
        seconds = 0.0 if self._first_step is None else time.monotonic() - self._first_step
        return Progress(len(losses), self.steps, losses, seconds)

    def result(self) -> dict[str, Any]:
        """What the worker answered, once it has ended: `folder`, `stopped` or `error`."""
        if self._process is None:
            return {"stopped": True}
        status = self._process.wait()
        self._answer.seek(0)
        lines = self._answer.read().splitlines()
        self._answer.close()
        try:
            return json.loads(lines[-1])
        except (IndexError, ValueError):
            if self.stopping:
                return {"stopped": True}
            return {"error": f"The tuning ended without a result (exit status {status}): is there enough memory?"}


class TuningRuns:
    """The tunings of all visitors, by session; as many at a time as there are slots, the others wait."""

    def __init__(self, slots: int = 1):
        self.slots = threading.Semaphore(slots)
        self._running: dict[str, Tuning] = {}
        self._lock = threading.Lock()

    def add(self, session: str, tuning: Tuning) -> None:
        """Registers a tuning of a session. Raises `ValueError` if the session has one already."""
        with self._lock:
            if session in self._running:
                raise ValueError("This page is tuning already: stop it first, or wait for its end.")
            self._running[session] = tuning

    def remove(self, session: str) -> None:
        """Forgets the tuning of a session."""
        with self._lock:
            self._running.pop(session, None)

    def folders(self) -> set[Path]:
        """The folders of the cache that tunings write to."""
        with self._lock:
            entries = [tuning.entry for tuning in self._running.values()]
        return {folder for entry in entries for folder in (entry, entry.with_name(entry.name + INCOMPLETE))}

    def stop(self, session: str) -> None:
        """Stops the tuning of a session, if it has one."""
        with self._lock:
            tuning = self._running.get(session)
        if tuning is not None:
            tuning.stop()

    def stop_all(self) -> None:
        """Stops the tunings of all sessions."""
        with self._lock:
            tunings = list(self._running.values())
        for tuning in tunings:
            tuning.stop()
