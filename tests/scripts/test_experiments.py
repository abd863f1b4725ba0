"""scripts/experiments.py, every row, with a tiny model and images of coloured blocks."""

import json
import shutil

import pytest
from image_folders import save_masked_images, save_tiny_segmenter
from script_runner import ScriptRunner, fail

from ifseg_hf.experiments import image_experiments
from ifseg_hf.training.log import read_log
from scripts import load_script

pytest.importorskip("kornia")
script = load_script("experiments")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "images"
    save_masked_images(folder, count=2)
    save_masked_images(folder, count=2, split="val")
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_segmenter(tmp_path_factory.mktemp("model"))


@pytest.fixture
def run(monkeypatch):
    def smaller(command: list[str]) -> list[str]:
        arguments = ["--steps", "2", "--warmup-steps", "0", "--max-cells", "3"] if command[0] == "train.py" else []
        return [
            *arguments,
            *(["--short-side", "48", "--crop-size", "32"] if "images_nano" in " ".join(command) else []),
        ]

    return ScriptRunner(monkeypatch, smaller)


@pytest.mark.slow
def test_every_row_is_trained_and_evaluated_once(data, model, tmp_path, run, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    command = [data, "--unseen", "sky, sea", "--output-dir", str(out), "--model", model, "--batch-size", "4"]
    assert script.main([*command, "--steps", "2", "--seeds", "0"], run) == 0
    assert len([x for x in run.commands if x[0] == "train.py"]) == len(script.NAMES)
    printed = capsys.readouterr().out
    assert "| images and masks of the seen categories | 1 | " in printed
    assert (out / "curves.png").stat().st_size > 10000
    for name in ("self-training", "supervised", "from-scratch"):
        assert [line["step"] for line in read_log(out / f"{name}-0") if "mean_iou" in line] == [0, 1, 2]

    # Another seed joins the table; complete steps do not run again.
    run.commands.clear()
    assert script.main([*command, "--steps", "2", "--seeds", "0,1", "--only", "from-scratch"], run) == 0
    assert [x[-1] for x in run.commands] == [str(out / "from-scratch-1"), str(out / "evaluations" / "from-scratch-1")]
    table = (out / "experiments.md").read_text()
    assert "| words alone, no image (`nano.yaml`), smoothed | 1 | " in table
    both = [json.loads((out / "evaluations" / f"from-scratch-{x}" / "results.json").read_text()) for x in (0, 1)]
    mean = 50 * sum(evaluation["results"][0]["mean_iou"] for evaluation in both)
    assert f"(`--from-scratch`) | 2 | {mean:.1f} ± " in table

    assert script.main([*command, "--steps", "3"], run) == 1
    assert "holds experiments with other settings" in capsys.readouterr().err


def test_dry_run_prints_shell_commands_in_order(data, capsys):
    arguments = [data, "--unseen", "sky", "--seeds", "3", "--only", "self-training", "--dry-run"]
    assert script.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == [
        "scripts/train.py",
        "scripts/pseudo_label.py",
        "scripts/train.py",
        "scripts/eval.py",
    ]
    assert "--categories 'cat, cup, sky, sea'" in lines[0]
    made = [line.split("--output-dir ")[1] for line in lines]
    for number, line in enumerate(lines):  # every folder is made before it is read
        used = [x for x in line.split() if x.startswith("outputs/experiments/")]
        assert set(used) <= set(made[: number + 1])


def test_steps_that_read_images_skip_damaged_ones(data, capsys):
    arguments = [data, "--unseen", "sky", "--seeds", "0", "--dry-run"]
    assert script.main([*arguments, "--on-error", "skip"]) == 0
    lines = capsys.readouterr().out.splitlines()
    without = [line for line in lines if "--on-error skip" not in line]
    assert len(lines) == 14
    assert [line.rpartition("/")[2] for line in without] == ["image-free-0"]
    assert "nano.yaml" in without[0]


@pytest.mark.slow
def test_a_row_is_measured_without_a_damaged_image(data, model, tmp_path, run, capsys):
    folder = shutil.copytree(data, tmp_path / "data")
    for split in ("train", "val"):
        file = folder / split / "images" / "1.png"
        file.write_bytes(file.read_bytes()[:60])
    out = tmp_path / "out"
    command = [str(folder), "--unseen", "sky", "--output-dir", str(out), "--model", model, "--batch-size", "4"]
    command += ["--steps", "2", "--seeds", "0", "--only", "seen-and-unseen"]
    assert script.main(command, run) == 1  # which the same command with --on-error resumes
    assert str(folder / "train" / "images" / "1.png") in capsys.readouterr().err
    assert script.main([*command, "--on-error", "skip"], run) == 0
    results = json.loads((out / "evaluations" / "seen-and-unseen-0" / "results.json").read_text())
    assert results["images"] == 1
    (skipped,) = results["skipped"]
    assert str(folder / "val" / "images" / "1.png") in skipped


def test_errors_are_printed_in_one_line(data, tmp_path, capsys):
    assert script.main([data, "--unseen", "sky", "--output-dir", str(tmp_path / "out")], fail) == 1
    assert capsys.readouterr().err == (
        "experiments.py: train.py ended with status 1. Run the same command again to resume.\n"
    )
    lacking = shutil.copytree(data, tmp_path / "lacking")
    shutil.rmtree(lacking / "val")
    assert script.main([str(lacking), "--unseen", "sky"], fail) == 1
    assert "has no val/images" in capsys.readouterr().err


def test_every_name_is_an_experiment():
    assert tuple(image_experiments.TITLES) == script.NAMES
    assert set(image_experiments.TITLES) <= set(image_experiments.COMMANDS)
