"""scripts/plot_runs.py on logs that were written by hand."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ifseg_hf.training.log import LOG_FILE, read_log
from ifseg_hf.visualization.curves import common_steps, running_mean
from ifseg_hf.visualization.overlays import palette

main = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "plot_runs.py"))["main"]


@pytest.fixture
def runs(tmp_path):
    """Three of ten steps, of which the first, the fifth and the last are evaluated."""
    for number in range(3):
        (tmp_path / f"run-{number}").mkdir()
        lines = [{"step": step, "loss": 3 - step / 10 + number} for step in range(1, 11)]
        for step in (0, 4, 9):
            lines[step]["mean_iou"] = step / 20
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"run-{number}" / LOG_FILE).write_text(text)
    return [str(tmp_path / f"run-{number}") for number in range(3)]


def test_each_label_has_its_colour_in_the_picture(runs, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    file = tmp_path / "curves.png"
    labels = ["--labels", "one", "one", "two", "--level", "image-free: 39.8"]
    assert main([*runs, *labels, "--output", str(file)]) == 0
    assert capsys.readouterr().out == f"Written to {file}.\n"
    pixels = np.asarray(Image.open(file).convert("RGB")).reshape(-1, 3)
    drawn = [(pixels == color).all(1).sum() > 500 for color in palette(3)]
    assert drawn == [True, True, False]


def test_what_the_lines_show(runs):
    steps, values = common_steps([read_log(run) for run in runs[:2]], "mean_iou")
    assert steps == [1, 5, 10]
    assert values.tolist() == [[0, 0.2, 0.45]] * 2
    assert running_mean(np.array([[1.0, 3, 5, 7]]), 2).tolist() == [[1, 2, 4, 6]]
    assert running_mean(np.array([[1.0, 3]]), 5).tolist() == [[1, 2]]


def test_a_folder_without_a_log_is_told(capsys):
    pytest.importorskip("matplotlib")
    assert main(["nowhere"]) == 1
    assert '"nowhere" holds no training_log.jsonl' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["run", "--labels", "a", "b"], "--labels: 2 for 1 runs"),
        (["run", "--level", "image-free"], "\"name: per cent\" value: 'image-free'"),
    ],
)
def test_a_wrong_argument_is_told(arguments, told, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert told in capsys.readouterr().err
