"""scripts/plot_runs.py on invented logs."""

import json

import numpy as np
import pytest
from html_pages import Page
from PIL import Image

from ifseg_hf.training.config import SETTINGS_FILE
from ifseg_hf.training.log import LOG_FILE, USAGE_FILE, read_log
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


def test_a_report_has_curves_settings_time_and_memory(runs, tmp_path, capsys):
    run = tmp_path / "run-0"
    words = ["cat", "<script>alert(1)</script>"]
    settings = {"categories": words, "model": "/home/me/nano", "output_dir": "/home/me/out", "steps": 10, "seed": 3}
    settings |= {"dataset": "/home/me/streets"}
    (run / SETTINGS_FILE).write_text(json.dumps({**settings, "prompt": None}))
    part = {"first_step": 1, "last_step": 4, "seconds": 2.0, "peak_memory": 2**30, "device": "cpu"}
    part |= {"processes": 1, "mixed_precision": "no"}
    later = {**part, "first_step": 5, "last_step": 10, "seconds": 120.0, "processes": 2, "mixed_precision": "bf16"}
    (run / USAGE_FILE).write_text("".join(json.dumps(line) + "\n" for line in (part, later)))
    assert main([*runs[:2], "--report", str(tmp_path / "reports")]) == 0
    files = [tmp_path / "reports" / f"run-{number}.html" for number in range(2)]
    assert capsys.readouterr().out == "".join(f"Report: {file}\n" for file in files)
    page = Page(files[0].read_text())
    page.check_self_contained()
    assert [x["aria-label"] for x in page.all("svg")] == [
        "running mean: 2.9 at step 1, 2 at step 10",
        "mean IoU: 0 at step 1, 45 at step 10",
    ]
    assert ["1 to 4", "2.0 s", "2.00", "1.00 GiB", "cpu"] in page.rows
    assert ["5 to 10", "2.0 min", "0.05", "1.00 GiB", "2 x cpu, bf16"] in page.rows
    for row in (["1", "0.0"], ["5", "20.0"], ["10", "45.0"], ["seed", "3"], ["dataset", "streets"]):
        assert row in page.rows
    text = " ".join(page.texts)
    assert "Words: cat, <script>alert(1)</script>." in text
    assert "from nano" in text
    assert "/home/me" not in text
    assert {"2.0 min", "1.00 GiB", "45.0"} <= set(page.texts)
    page = Page(files[1].read_text())  # a run of an earlier version, without settings and usage
    assert any(text.startswith("The folder has no record of time") for text in page.texts)


def test_reports_of_folders_without_a_log_are_errors(tmp_path, capsys):
    assert main([str(tmp_path), "--report", str(tmp_path / "reports")]) == 1
    assert "holds no training_log.jsonl" in capsys.readouterr().err
    (tmp_path / LOG_FILE).write_text("")
    assert main([str(tmp_path), "--report", str(tmp_path / "reports")]) == 1
    assert "has no step yet" in capsys.readouterr().err
    assert not (tmp_path / "reports").exists()


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
