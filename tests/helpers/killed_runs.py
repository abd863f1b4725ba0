"""Runs of training that are killed at chosen moments, or run out of disk, and are resumed. Prints the outcomes as JSON.

    python killed_runs.py MODEL FOLDER

Each run is a forked process, so that torch is imported once. Forking needs a process without threads: therefore
`tests/ifseg_hf/training/test_interruptions.py` runs this file as a program.
"""

import itertools
import json
import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import accelerate.checkpointing
import torch

from ifseg_hf.training import checkpointing
from ifseg_hf.training.loop import TrainingConfig, TrainingError, TrainingRun, train


def settings(model: str, folder: Path, **changes) -> TrainingConfig:
    """8 steps with dropout and drop path, which draw random numbers; checkpoints after 3 and 6, one of them kept."""
    quick = {"steps": 8, "batch_size": 2, "learning_rate": 1e-2, "cpu": True}
    rare = {"checkpointing_steps": 3, "checkpoints_total_limit": 1}
    return TrainingConfig(["cat", "cup", "sky"], str(folder), model, **{**quick, **rare, **changes})


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def at(owner, name: str, call: int, then=die) -> None:
    """Calls `then` before the `call`-th call of a function."""
    function, calls = getattr(owner, name), itertools.count(1)

    def wrapper(*args, **kwargs):
        if next(calls) == call:
            then(*args)
        return function(*args, **kwargs)

    setattr(owner, name, wrapper)


def write_half(state, path, *_):
    torch.save(state, path)
    os.truncate(path, path.stat().st_size // 2)
    die()


def delete_half(folder):
    (folder / "optimizer.bin").unlink()
    die()


def fill_the_disk(*_):
    """Limits the size of files, which has the effect of a full disk on a process."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


# A checkpoint takes three calls of accelerate's save (weights, optimiser, schedule) and seven of flush_to_disk: for
# five files, their folder and its parent.
MOMENTS = {
    "before the first checkpoint": lambda: at(TrainingRun, "check_finite", 2),
    "in a step": lambda: at(TrainingRun, "check_finite", 5),
    "in the first checkpoint": lambda: at(accelerate.checkpointing, "save", 2),
    "weights written, optimiser not": lambda: at(accelerate.checkpointing, "save", 5),
    "half the optimiser written": lambda: at(accelerate.checkpointing, "save", 5, write_half),
    "all written, not yet renamed": lambda: at(checkpointing, "flush_to_disk", 13),
    "renamed, old one not deleted": lambda: at(checkpointing, "flush_to_disk", 14),
    "half the old one deleted": lambda: at(shutil, "rmtree", 1, delete_half),
    "no file of the result moved": lambda: at(Path, "replace", 1),
    "some files of the result moved": lambda: at(Path, "replace", 4),
    "disk full at the weights": lambda: at(TrainingRun, "check_finite", 4, fill_the_disk),
    "disk full at the optimiser": lambda: at(accelerate.checkpointing, "save", 5, fill_the_disk),
    "disk full at the result": lambda: at(TrainingRun, "save", 1, fill_the_disk),
}


def in_a_process(work) -> dict:
    """Runs `work` in a forked process. Returns the signal that killed it, or 0, and its error message."""
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        try:
            work()
            message = ""
        except TrainingError as error:
            message = f"TrainingError: {error}"
        except BaseException as error:
            message = repr(error)
        os.write(writer, message.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        message = pipe.read()
    _, status = os.waitpid(process, 0)
    return {"signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0, "message": message}


def main(model: str, folder: str) -> None:
    torch.set_num_threads(1)
    outcomes = {"uninterrupted": in_a_process(lambda: train(settings(model, Path(folder) / "uninterrupted")))}
    for number, (moment, arrange) in enumerate(MOMENTS.items()):
        output = Path(folder) / str(number) / "out"

        def interrupted(output=output, arrange=arrange):
            arrange()
            train(settings(model, output))

        ended = in_a_process(interrupted)
        left = sorted(path.name for path in output.iterdir())
        resumed = in_a_process(lambda output=output: train(settings(model, output, resume="latest")))
        outcomes[moment] = {**ended, "left": left, "output": str(output), "resumed": resumed}
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(*sys.argv[1:])
