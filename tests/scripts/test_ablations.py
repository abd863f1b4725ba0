"""scripts/ablations.py with a tiny model and images of coloured blocks."""

import json

import pytest
from image_folders import save_masked_images, save_tiny_segmenter

from ifseg_hf.experiments.ablations import ROWS
from scripts import load_script

script = load_script("ablations")


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """Dataset and options for a tiny model."""
    folder = tmp_path_factory.mktemp("ablations")
    data, model = save_masked_images(folder / "images", 2, "val"), save_tiny_segmenter(folder / "model")
    settings = {"steps": 1, "batch_size": 2, "max_cells": 3, "cpu": True}
    (folder / "settings.json").write_text(json.dumps(settings))
    return [data, "--model", model, "--config", str(folder / "settings.json"), "--seeds", "1"]


def test_categories_and_the_rest_are_the_words(arguments, tmp_path, capsys):
    out = tmp_path / "out"
    command = [*arguments, "--categories", "sky, cup", "--rest", "background", "--output-dir", str(out), "--limit", "1"]
    assert script.main([*command, "--only", "cosine", "tuned"]) == 0
    printed = capsys.readouterr().out
    assert "| cosine of patches and words | 1 |" in printed
    assert "1 images, 3 categories" in (out / "ablations.md").read_text()
    assert sorted(x.name for x in (out / "results").iterdir()) == ["cosine-0.json", "tuned-1.json"]
    result = json.loads((out / "results" / "tuned-1.json").read_text())
    assert list(result["results"][0]["categories"]) == ["sky", "cup", "background"]
    assert result["tuning_seconds"] > 0

    # Another row joins the table.
    assert script.main([*command, "--only", "untuned"]) == 0
    assert [line.split(" | ")[0] for line in (out / "ablations.md").read_text().splitlines()[4:]] == [
        "| cosine of patches and words",
        "| before tuning",
        "| tuned",
    ]
    assert script.main([*command, "--model", "ifseg-ofa-nano"]) == 1
    assert "other settings (model, weights, training in ablations.json)" in capsys.readouterr().err


def test_errors_are_printed_in_one_line(arguments, tmp_path, capsys):
    command = [*arguments, "--output-dir", str(tmp_path)]
    for more, error in [
        (["--categories", "sky, dog"], 'The dataset has no category "dog".'),
        (["--only", "max-cells-8"], "There is no row max-cells-8 here: a word map of this model has 4 cells"),
        (["--model", "missing"], 'There is no model folder "missing"'),
        (["--config", "missing.yaml"], 'The settings file "missing.yaml" cannot be read'),
    ]:
        assert script.main([*command, *more]) == 1
        message = capsys.readouterr().err
        assert message.startswith(f"ablations.py: {error}")
        assert message.count("\n") == 1


@pytest.mark.parametrize("wrong", [["--rest", "other"], ["--limit", "0"], ["--seeds", "-1"], ["--only", "tune"]])
def test_wrong_arguments_are_refused(wrong, arguments, capsys):
    with pytest.raises(SystemExit):
        script.parse_arguments([*arguments, *wrong])
    assert wrong[0] in capsys.readouterr().err


def test_every_name_is_a_row():
    assert tuple(ROWS) == script.NAMES
