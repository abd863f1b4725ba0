"""scripts/plot_runs.py on invented logs."""

import json

import numpy as np
import pytest
from PIL import Image

from ifseg_hf.training.log import LOG_FILE, read_log
from ifseg_hf.visualization.colors import palette
from ifseg_hf.visualization.curves import common_steps, running_mean
from scripts import load_script

main = load_script("plot_runs").main


@pytest.fixture
def runs(tmp_path):
    """Three runs of ten steps; the first, the fifth and the last step have a mean IoU."""
    for number in range(3):
        (tmp_path / f"run-{number}").mkdir()
        lines = [{"step": step, "loss": 3 - step / 10 + number} for step in range(1, 11)]
        for step in (0, 4, 9):
            lines[step]["mean_iou"] = step / 20
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"run-{number}" / LOG_FILE).write_text(text)
    return [str(tmp_path / f"run-{number}") for number in range(3)]


def test_each_label_has_its_colour_in_the_plot(runs, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    file = tmp_path / "curves.png"
    labels = ["--labels", "one", "one", "two", "--level", "image-free: 39.8"]
    assert main([*runs, *labels, "--output", str(file)]) == 0
    assert capsys.readouterr().out == f"Written to {file}.\n"
    pixels = np.asarray(Image.open(file).convert("RGB")).reshape(-1, 3)
    drawn = [(pixels == color).all(1).sum() > 500 for color in palette(3)]
    assert drawn == [True, True, False]


def test_lines_show_common_steps_and_running_means(runs):
    steps, values = common_steps([read_log(run) for run in runs[:2]], "mean_iou")
    assert steps == [1, 5, 10]
    assert values.tolist() == [[0, 0.2, 0.45]] * 2
    assert running_mean(np.array([[1.0, 3, 5, 7]]), 2).tolist() == [[1, 2, 4, 6]]
    assert running_mean(np.array([[1.0, 3]]), 5).tolist() == [[1, 2]]


def test_a_folder_without_a_log_is_an_error(capsys):
    pytest.importorskip("matplotlib")
    assert main(["nowhere"]) == 1
    assert '"nowhere" holds no training_log.jsonl' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["run", "--labels", "a", "b"], "--labels: 2 for 1 runs"),
        (["run", "--level", "image-free"], "\"name: per cent\" value: 'image-free'"),
    ],
)
def test_wrong_arguments_are_errors(arguments, error, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert error in capsys.readouterr().err
