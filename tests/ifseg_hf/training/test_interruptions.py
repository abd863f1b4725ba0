"""Runs of training that are killed at any moment, in real processes, and resumed to the same weights."""

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
    "all written, not yet renamed",
    "renamed, old one not deleted",
    "half the old one deleted",
    "no file of the result moved",
    "some files of the result moved",
]
FULL_DISK = ["disk full at the weights", "disk full at the optimiser", "disk full at the result"]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The outcome of every run of `killed_runs.py`, and of an uninterrupted one."""
    folder = tmp_path_factory.mktemp("runs")
    model = save_tiny_model(folder / "model")
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "helpers")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "killed_runs.py"), model, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    assert outcomes["uninterrupted"] == {"signal": 0, "message": ""}
    outcomes["uninterrupted"]["output"] = str(folder / "uninterrupted")
    return outcomes


def weights(output: str) -> dict[str, bytes]:
    with safe_open(f"{output}/model.safetensors", "np") as file:
        return {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118


def assert_resumed_like_uninterrupted(run: dict, runs: dict) -> None:
    assert run["resumed"] == {"signal": 0, "message": ""}
    assert weights(run["output"]) == weights(runs["uninterrupted"]["output"])  # bit for bit
    assert sorted(os.listdir(run["output"])) == sorted(os.listdir(runs["uninterrupted"]["output"]))


@pytest.mark.parametrize("moment", KILLED)
def test_a_killed_run_resumes_to_the_same_weights(runs, moment):
    run = runs[moment]
    assert run["signal"] == signal.SIGKILL
    assert_resumed_like_uninterrupted(run, runs)


@pytest.mark.parametrize("moment", FULL_DISK)
def test_a_full_disk_is_reported_and_spares_earlier_checkpoints(runs, moment):
    run = runs[moment]
    last = "checkpoint-6" if "result" in moment else "checkpoint-3"
    assert run["signal"] == 0
    assert run["message"].startswith("TrainingError")
    assert run["output"] in run["message"]
    assert "File too large" in run["message"] or "is the disk full?" in run["message"]
    assert last in run["left"]
    assert last in run["message"]
    assert not any(name.endswith(".incomplete") for name in run["left"])  # they would keep the disk full
    assert_resumed_like_uninterrupted(run, runs)


def test_one_checkpoint_is_kept(runs):
    assert "checkpoint-6" in os.listdir(runs["uninterrupted"]["output"])
    assert "checkpoint-3" not in os.listdir(runs["uninterrupted"]["output"])
