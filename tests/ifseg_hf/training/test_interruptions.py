"""Trainings that die at any moment and go on as if nothing had happened: real processes, real kills."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from tiny_model import save_tiny_model

ROOT = Path(__file__).parents[3]
KILLED = [
    "before the first checkpoint",
    "in a step",
    "in the first checkpoint",
    "weights written, optimiser not",
    "half the optimiser written",
    "all written, without its name",
    "named, with the old one there",
    "half the old one deleted",
    "no file of the result in place",
    "some files of the result in place",
]
FULL_DISK = ["disk full at the weights", "disk full at the optimiser", "disk full at the result"]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What became of every run of `killed_runs.py`; "whole" is the one that nothing happened to."""
    folder = tmp_path_factory.mktemp("runs")
    model = save_tiny_model(folder / "model")
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "helpers")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "killed_runs.py"), model, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["whole"] == {"signal": 0, "said": ""}
    told["whole"]["output"] = str(folder / "whole")
    return told


def weights(output: str) -> dict[str, bytes]:
    with safe_open(f"{output}/model.safetensors", "np") as file:
        return {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118


def assert_went_on_as_if_nothing_had_happened(run: dict, runs: dict) -> None:
    assert run["resumed"] == {"signal": 0, "said": ""}
    assert weights(run["output"]) == weights(runs["whole"]["output"])  # every bit
    assert sorted(os.listdir(run["output"])) == sorted(os.listdir(runs["whole"]["output"]))


@pytest.mark.parametrize("moment", KILLED)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(runs, moment):
    run = runs[moment]
    assert run["signal"] == signal.SIGKILL
    assert_went_on_as_if_nothing_had_happened(run, runs)


@pytest.mark.parametrize("moment", FULL_DISK)
def test_a_full_disk_is_told_and_leaves_the_checkpoint_before_it(runs, moment):
    run = runs[moment]
    last = "checkpoint-6" if "result" in moment else "checkpoint-3"
    assert run["signal"] == 0
    assert run["said"].startswith("TrainingError")
    assert run["output"] in run["said"]
    assert "File too large" in run["said"] or "is the disk full?" in run["said"]
    assert last in run["left"]
    assert last in run["said"]
    assert not any(name.endswith(".incomplete") for name in run["left"])  # a full disk is not left full
    assert_went_on_as_if_nothing_had_happened(run, runs)


def test_one_checkpoint_is_kept(runs):
    assert "checkpoint-6" in os.listdir(runs["whole"]["output"])
    assert "checkpoint-3" not in os.listdir(runs["whole"]["output"])
