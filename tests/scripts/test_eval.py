"""scripts/eval.py: through accelerate, in two processes, and with wrong arguments."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from html_pages import Page
from PIL import Image
from tiny_model import save_tiny_model

from ifseg_hf.hub import publish as hub
from scripts import load_script

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "eval.py"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a model, `model`, and seven images of two sizes with masks, `streets`."""
    folder = tmp_path_factory.mktemp("work")
    save_tiny_model(folder / "model", tuned=True)
    rng = np.random.default_rng(0)
    for part in ("images", "masks"):
        (folder / "streets" / "val" / part).mkdir(parents=True)
    for i in range(7):
        size = (40, 56) if i % 3 else (56, 40)
        image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        image.save(folder / "streets" / "val" / "images" / f"{i}.png")
        Image.fromarray(rng.integers(0, 3, size, dtype=np.uint8)).save(
            folder / "streets" / "val" / "masks" / f"{i}.png"
        )
    (folder / "streets" / "dataset.json").write_text(json.dumps({"categories": ["cat", "grass", "sky"]}))
    return folder


def run(work: Path, launcher: list[str], *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", *launcher, str(SCRIPT), "--model", "model", "--dataset", "streets", "--cpu"]
    return subprocess.run([*command, *arguments], cwd=work, capture_output=True, text=True, timeout=600)


def test_through_accelerate(work):
    grid = ["--smoothing-neighbors", "2,3", "--smoothing-iterations", "0,1"]
    extra = ["--save-overlays", "1", "--save-predictions", "maps", "--output-dir", "out"]
    done = run(work, ["accelerate.commands.launch", "--cpu"], *grid, *extra)
    assert done.returncode == 0, done.stderr
    results = json.loads((work / "out" / "results.json").read_text())
    assert results["images"] == 7
    assert results["command"].startswith("scripts/eval.py --model model --dataset streets")
    assert set(results["versions"]) == {"python", "ifseg-hf", "torch", "transformers", "datasets", "accelerate"}
    settings = [(x["smoothing_neighbors"], x["smoothing_iterations"]) for x in results["results"]]
    assert settings == [(1, 0), (2, 1), (3, 1)]
    for result in results["results"]:
        ious = [category["iou"] for category in result["categories"].values()]
        assert result["mean_iou"] == pytest.approx(np.mean(ious), abs=1e-5)
    assert "| cat |" in (work / "out" / "results.md").read_text()
    assert "| k=3, n=1 |" in done.stdout
    assert "mIoU=" in done.stderr  # the bar
    assert (work / "out" / "overlays" / "0.png").is_file()
    assert len(list((work / "maps").iterdir())) == 7


def test_two_processes_count_what_one_does(work):
    counted = []
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for name, start in [("two", launcher), ("one", ["accelerate.commands.launch", "--cpu"])]:
        done = run(work, start, "--output-dir", name, "--batch-size", "2")
        assert done.returncode == 0, done.stderr
        parts = [np.load(file) for file in sorted((work / name / "state").glob("part-*.npz"))]
        counted.append(sum(part["matrix_3_25"] for part in parts))
        assert sum(len(part["images"]) for part in parts) == 7
        assert len(parts) == (2 if name == "two" else 1)
    assert (counted[0] == counted[1]).all()
    results = [json.loads((work / name / "results.json").read_text()) for name in ("one", "two")]
    assert results[0]["results"] == results[1]["results"]
    assert results[1]["processes"] == 2
    assert results[1]["images"] == 7


@pytest.fixture(scope="module")
def evaluate():
    return load_script("eval").main


def test_a_report_is_written_also_of_a_finished_evaluation(work, evaluate, tmp_path, capsys):
    arguments = ["--model", str(work / "model"), "--dataset", str(work / "streets"), "--cpu"]
    arguments += ["--threshold", "0.35", "--background", "sea", "--output-dir", str(tmp_path / "out")]
    assert evaluate(arguments) == 0
    printed = capsys.readouterr().out
    assert evaluate([*arguments, "--report", str(tmp_path / "report")]) == 0
    assert f"Report: {tmp_path / 'report' / 'report.html'}" in capsys.readouterr().out
    assert len(list((tmp_path / "out" / "state").glob("part-*.npz"))) == 2
    page = Page((tmp_path / "report" / "report.html").read_text())
    page.check_self_contained()
    assert len(page.images()) == 3 * 7  # each image once, since there are fewer than twice six
    for line in printed.splitlines():
        if line.startswith(("| cat |", "| grass |", "| sky |")):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            assert any([text for text in row if text][:3] == cells for row in page.rows), cells
    assert ["threshold", "0.35"] in page.rows


def test_the_former_name_still_works(work):
    command = [sys.executable, str(SCRIPT.with_name("evaluate.py")), "--help"]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True)
    assert "--smoothing-neighbors" in done.stdout, done.stderr


def test_other_words_and_damaged_images(work, evaluate, tmp_path, capsys):
    folder = shutil.copytree(work / "streets", tmp_path / "streets")
    (folder / "val" / "images" / "2.png").write_bytes(b"")
    words = tmp_path / "words.yaml"
    words.write_text("animal: [cat]\nbackground: [grass, sky]\n")
    arguments = ["--model", str(work / "model"), "--dataset", str(folder), "--categories", str(words), "--cpu"]
    assert evaluate([*arguments, "--output-dir", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "2.png" in error.splitlines()[-1]
    assert evaluate([*arguments, "--output-dir", str(tmp_path / "skipped"), "--on-error", "skip"]) == 0
    results = json.loads((tmp_path / "skipped" / "results.json").read_text())
    assert results["images"] == 6
    assert len(results["skipped"]) == 1
    assert list(results["results"][0]["categories"]) == ["animal", "background"]
    assert "1 images were left out" in (tmp_path / "skipped" / "results.md").read_text()


def test_a_model_never_tuned_is_refused_unless_it_is_meant(work, evaluate, tmp_path, capsys):
    data = ["--dataset", str(work / "streets"), "--model", save_tiny_model(tmp_path / "model"), "--cpu", "--limit", "1"]
    capsys.readouterr()
    assert evaluate([*data, "--output-dir", str(tmp_path / "out")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "never tuned on words" in line
    assert "--untuned" in line
    assert evaluate([*data, "--untuned", "--output-dir", str(tmp_path / "out")]) == 0


def test_other_categories_count_as_the_rest(work, evaluate, tmp_path):
    data = ["--dataset", str(work / "streets"), "--model", str(work / "model"), "--cpu", "--limit", "1"]
    assert evaluate([*data, "--categories", "sky", "--rest", "other", "--output-dir", str(tmp_path / "out")]) == 0
    (result,) = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert list(result["categories"]) == ["sky", "other"]
    assert result["categories"]["other"]["iou"] is not None


def test_background_and_threshold_are_recorded(work, evaluate, tmp_path, capsys):
    data = ["--dataset", str(work / "streets"), "--model", str(work / "model"), "--cpu", "--limit", "1"]
    data += ["--categories", "sky", "--rest", "background", "--output-dir", str(tmp_path / "out")]
    assert evaluate([*data, "--background", "sea, sky, wall", "--threshold", "0.3"]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["background"] == ["sea", "wall"]
    assert results["threshold"] == 0.3
    assert list(results["results"][0]["categories"]) == ["sky", "background"]
    assert evaluate([*data, "--background", "sea"]) == 1
    assert "another threshold, background" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--dataset", "nowhere"], "no folder, no dataset of the Hub"),
        (["--dataset", "coco-stuff"], "has to be unpacked"),
        (["--dataset", "{streets}", "--categories", "cat, gras"], "Similar: grass"),
        (["--dataset", "{streets}", "--model", "nowhere"], "no model folder"),
        (["--dataset", "{streets}", "--baseline", "clip", "--model", "{model}"], "is no CLIP"),
        (["--dataset", "{streets}", "--background", "cat, cat"], '"cat" is given twice'),
    ],
)
def test_errors_are_one_line(work, evaluate, tmp_path, capsys, arguments, complaint):
    places = {"streets": work / "streets", "model": work / "model"}
    arguments = [argument.format(**places) for argument in arguments]
    if "--model" not in arguments:
        arguments += ["--model", str(work / "model")]
    assert evaluate([*arguments, "--output-dir", str(tmp_path / "out"), "--cpu"]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("eval.py:")]
    assert complaint in line


def test_means_of_seen_and_unseen_categories(work, evaluate, tmp_path, capsys):
    data = ["--dataset", str(work / "streets"), "--model", str(work / "model"), "--cpu", "--limit", "2"]
    assert evaluate([*data, "--unseen", "sky", "--output-dir", str(tmp_path / "out")]) == 0
    (result,) = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    ious = {name: category["iou"] for name, category in result["categories"].items()}
    seen, unseen = (ious["cat"] + ious["grass"]) / 2, ious["sky"]
    assert result["mean_iou_seen"] == pytest.approx(seen, abs=1e-5)
    assert result["mean_iou_unseen"] == pytest.approx(unseen, abs=1e-5)
    harmonic = 2 * seen * unseen / (seen + unseen) if seen + unseen else 0
    assert result["harmonic_mean_iou"] == pytest.approx(harmonic, abs=1e-5)
    assert "harmonic mean IoU" in capsys.readouterr().out
    assert evaluate([*data, "--unseen", "sea", "--output-dir", str(tmp_path / "other")]) == 1
    assert 'no category "sea"' in capsys.readouterr().err


def test_results_go_to_a_model_card(work, evaluate, tmp_path, capsys, monkeypatch):
    pushed = []
    monkeypatch.setattr(hub, "check_access", lambda repo: repo)
    monkeypatch.setattr(hub, "add_results", lambda repo, results: pushed.append((repo, results)) or "a commit")
    data = ["--dataset", str(work / "streets"), "--model", str(work / "model"), "--output-dir", str(tmp_path / "out")]
    assert evaluate([*data, "--cpu", "--push-to-hub", "alice/streets"]) == 0
    assert "Published: a commit" in capsys.readouterr().out
    assert pushed == [("alice/streets", json.loads((tmp_path / "out" / "results.json").read_text()))]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--smoothing-neighbors", "0"], "at least 1"),
        (["--batch-size", "0"], "at least 1"),
        (["--limit", "0"], "at least 1"),
        (["--push-to-hub", "a/b", "--limit", "3"], "--push-to-hub is for whole datasets"),
        (["--rest", "background"], "give --categories"),
    ],
)
def test_wrong_arguments(evaluate, capsys, arguments, complaint):
    with pytest.raises(SystemExit):
        evaluate(["--dataset", "streets", *arguments])
    assert complaint in capsys.readouterr().err
