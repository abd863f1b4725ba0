"""scripts/experiments.py, every row, with a tiny model and photos of coloured blocks."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from image_folders import save_masked_photos, save_tiny_segmenter

from ifseg_hf.experiments import image_experiments as experiments
from ifseg_hf.training.log import read_log

pytest.importorskip("kornia")
SCRIPTS = Path(__file__).parents[2] / "scripts"
SCRIPT = runpy.run_path(str(SCRIPTS / "experiments.py"))
main = SCRIPT["main"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "photos"
    save_masked_photos(folder, count=2)
    save_masked_photos(folder, count=2, split="val")
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_segmenter(tmp_path_factory.mktemp("model"))


@pytest.fixture
def here(monkeypatch):
    """Runs a script in this process: the same program without the seconds that starting one takes."""
    commands = []

    def run(command: list[str]) -> None:
        commands.append(command)
        arguments = [*command[1:], "--cpu"]
        if command[0] == "train.py":
            arguments += ["--steps", "2", "--warmup-steps", "0", "--max-cells", "3"]
        if "--short-side" in command:
            arguments += ["--short-side", "48", "--crop-size", "32"]
        monkeypatch.setattr(sys, "argv", [str(SCRIPTS / command[0]), *arguments])
        status = runpy.run_path(sys.argv[0])["main"]()
        if status:
            raise RuntimeError(f"{command[0]} ended with status {status}")

    run.commands = commands
    return run


@pytest.mark.slow
def test_every_row_is_made_once_and_told(data, model, tmp_path, here, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    command = [data, "--unseen", "sky, sea", "--output-dir", str(out), "--model", model, "--batch-size", "4"]
    assert main([*command, "--steps", "2", "--seeds", "0"], here) == 0
    assert len([x for x in here.commands if x[0] == "train.py"]) == len(SCRIPT["NAMES"])
    printed = capsys.readouterr().out
    assert "| photos and masks of the seen categories | 1 | " in printed
    assert (out / "curves.png").stat().st_size > 10000
    for name in ("self-training", "supervised", "from-scratch"):
        assert [line["step"] for line in read_log(out / f"{name}-0") if "mean_iou" in line] == [0, 1, 2]

    # Another seed joins the table; what was made is not made again.
    here.commands.clear()
    assert main([*command, "--steps", "2", "--seeds", "0,1", "--only", "from-scratch"], here) == 0
    assert [x[-1] for x in here.commands] == [str(out / "from-scratch-1"), str(out / "evaluations" / "from-scratch-1")]
    table = (out / "experiments.md").read_text()
    assert "| words alone, no photo (`nano.yaml`), smoothed | 1 | " in table
    both = [json.loads((out / "evaluations" / f"from-scratch-{x}" / "results.json").read_text()) for x in (0, 1)]
    mean = 50 * sum(told["results"][0]["mean_iou"] for told in both)
    assert f"(`--from-scratch`) | 2 | {mean:.1f} ± " in table

    assert main([*command, "--steps", "3"], here) == 1
    assert "holds experiments with other settings" in capsys.readouterr().err


def test_dry_run_prints_commands_that_can_be_typed(data, capsys):
    arguments = [data, "--unseen", "sky", "--seeds", "3", "--only", "self-training", "--dry-run"]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == [
        "scripts/train.py",
        "scripts/pseudo_label.py",
        "scripts/train.py",
        "scripts/eval.py",
    ]
    assert "--categories 'cat, cup, sky, sea'" in lines[0]
    made = [line.split("--output-dir ")[1] for line in lines]
    for number, line in enumerate(lines):  # nothing is used before it is made
        used = [x for x in line.split() if x.startswith("outputs/experiments/")]
        assert set(used) <= set(made[: number + 1])


def test_what_is_wrong_is_told(data, tmp_path, capsys):
    def run(command):
        raise RuntimeError(f"{command[0]} ended with status 1")

    assert main([data, "--unseen", "sky", "--output-dir", str(tmp_path / "out")], run) == 1
    assert (
        capsys.readouterr().err == "experiments.py: train.py ended with status 1. The same command goes on from here.\n"
    )
    lacking = shutil.copytree(data, tmp_path / "lacking")
    shutil.rmtree(lacking / "val")
    assert main([str(lacking), "--unseen", "sky"], run) == 1
    assert "has no val/images" in capsys.readouterr().err


def test_every_name_is_an_experiment():
    assert tuple(experiments.EXPERIMENTS) == SCRIPT["NAMES"]
    assert set(experiments.EXPERIMENTS) <= set(experiments.STEPS)
