"""Trainings that are killed at chosen moments, or run out of disk, and are gone on with. Prints what came of each.

    python killed_runs.py MODEL FOLDER

Every training is a forked process of its own, so that torch is imported once; forking wants a process without threads,
hence this file beside `tests/ifseg_hf/test_interruptions.py`, which runs it.
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

from ifseg_hf.training import loop as training
from ifseg_hf.training.loop import TrainingConfig, TrainingError, train


def settings(model: str, folder: Path, **changes) -> TrainingConfig:
    """8 steps with checkpoints after 3 and 6, of which one is kept; dropout and drop path as published,
    and noise on word maps, which is drawn from the same generator."""
    quick = {"steps": 8, "batch_size": 2, "learning_rate": 1e-2, "word_noise": 0.5, "cpu": True}
    rare = {"checkpointing_steps": 3, "checkpoints_total_limit": 1}
    return TrainingConfig(["cat", "cup", "sky"], str(folder), model, **{**quick, **rare, **changes})


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def at(owner, name: str, call: int, then=die) -> None:
    """Lets `then` happen before a function is called for the `call`-th time."""
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
    """No file may grow beyond this size any more, which is what a full disk is to a process."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


# A checkpoint is three calls of accelerate's save (weights, optimiser, schedule), and seven of flush_to_disk: five
# files, their folder, the folder around it.
MOMENTS = {
    "before the first checkpoint": lambda: at(training, "check_finite", 2),
    "in a step": lambda: at(training, "check_finite", 5),
    "in the first checkpoint": lambda: at(accelerate.checkpointing, "save", 2),
    "weights written, optimiser not": lambda: at(accelerate.checkpointing, "save", 5),
    "half the optimiser written": lambda: at(accelerate.checkpointing, "save", 5, write_half),
    "all written, without its name": lambda: at(training, "flush_to_disk", 13),
    "named, with the old one there": lambda: at(training, "flush_to_disk", 14),
    "half the old one deleted": lambda: at(shutil, "rmtree", 1, delete_half),
    "no file of the result in place": lambda: at(Path, "replace", 1),
    "some files of the result in place": lambda: at(Path, "replace", 4),
    "disk full at the weights": lambda: at(training, "check_finite", 4, fill_the_disk),
    "disk full at the optimiser": lambda: at(accelerate.checkpointing, "save", 5, fill_the_disk),
    "disk full at the result": lambda: at(training, "save", 1, fill_the_disk),
}


def in_a_process(work) -> dict:
    """How the process ended that did it: the signal that killed it, and what it had to say."""
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        try:
            work()
            said = ""
        except TrainingError as error:
            said = f"TrainingError: {error}"
        except BaseException as error:
            said = repr(error)
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    _, status = os.waitpid(process, 0)
    return {"signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0, "said": said}


def main(model: str, folder: str) -> None:
    torch.set_num_threads(1)
    told = {"whole": in_a_process(lambda: train(settings(model, Path(folder) / "whole")))}
    for number, (moment, arrange) in enumerate(MOMENTS.items()):
        output = Path(folder) / str(number) / "out"

        def disturbed(output=output, arrange=arrange):
            arrange()
            train(settings(model, output))

        ended = in_a_process(disturbed)
        left = sorted(path.name for path in output.iterdir())
        resumed = in_a_process(lambda output=output: train(settings(model, output, resume="latest")))
        told[moment] = {**ended, "left": left, "output": str(output), "resumed": resumed}
    print(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
