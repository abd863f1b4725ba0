"""Ablations on images of coloured blocks, with a small random model."""

import shutil

import numpy as np
import pytest
from image_folders import NAMES, save_masked_images, save_tiny_segmenter

from ifseg_hf.data.segmentation import load_segmentation_dataset
from ifseg_hf.evaluation.evaluate import evaluate_segmenter, load_segmenter
from ifseg_hf.experiments import ablations
from ifseg_hf.experiments.ablations import APPENDIX_PROMPT, ROWS, Ablations, ablation_table, read_results
from ifseg_hf.modeling import IFSegConfig

SETTINGS = {"steps": 1, "batch_size": 2, "learning_rate": 0.05, "max_cells": 3, "cpu": True}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return load_segmentation_dataset(save_masked_images(tmp_path_factory.mktemp("data") / "images", 2, split=None))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_segmenter(tmp_path_factory.mktemp("model"))


@pytest.fixture
def make(data, model, tmp_path):
    """Returns [`Ablations`] of the small model, with changes of their arguments."""

    def make(**changes) -> Ablations:
        given = {"source": "blocks", "data": data, "model": model, "settings": SETTINGS, "out": tmp_path / "out"}
        return Ablations(**{**given, "keep_models": True, **changes})

    return make


@pytest.mark.slow
def test_every_applicable_row_is_measured_once(make, data, monkeypatch, capsys):
    configs, train = {}, ablations.train

    def recorded(config):
        configs[config.output_dir] = config
        return train(config)

    monkeypatch.setattr(ablations, "train", recorded)
    experiment = make()
    rows = experiment.check()
    assert ROWS.keys() - rows.keys() == {"max-cells-8", "max-cells-16", "segmentation-positions"}
    assert "Without the row max-cells-8: a word map of this model has 4 cells" in capsys.readouterr().out
    experiment.run(rows, [0])
    few = {name: rows[name] for name in ("cosine", "untuned", "tuned")}
    report = experiment.run(few, [3, 0])
    results = read_results(experiment.out)
    assert {name: list(seeds) for name, seeds in results.items()} == {
        name: [0, 3] if name in ("untuned", "tuned") else [0] for name in rows
    }
    assert len(configs) == len(rows) - 1  # neither cosine nor untuned, and two runs of tuned

    work = experiment.out / "work"
    usual = configs[str(work / "tuned-3" / "tuned")]
    assert (usual.seed, usual.categories, usual.max_cells) == (3, NAMES, 3)
    assert configs[str(work / "max-cells-full-0" / "tuned")].max_cells is None
    names = ("tuned", "image-positions", "appendix-prompt", "no-unknown", "no-cross-attention")
    tuned = {name: IFSegConfig.from_pretrained(work / f"{name}-0" / "tuned") for name in names}
    assert tuned["image-positions"].backbone_config.decoder_positions == "image"
    attending = [tuned[name].backbone_config.decoder_cross_attention for name in ("tuned", "no-cross-attention")]
    assert attending == [True, False]
    assert tuned["appendix-prompt"].prompt.startswith(APPENDIX_PROMPT)
    assert tuned["tuned"].prompt.endswith(" unknown")
    assert not tuned["no-unknown"].prompt.endswith(" unknown")

    # The table agrees with an evaluation of the kept models.
    scores = [
        evaluate_segmenter(load_segmenter(work / f"tuned-{seed}" / "tuned"), data, [(5, 25)]).scores((5, 25))
        for seed in (0, 3)
    ]
    ious = [100 * x["mean_iou"] for x in scores]
    assert f" {np.mean(ious):.1f} ± {np.std(ious, ddof=1):.1f} " in next(
        line for line in report.splitlines() if line.startswith("| tuned | 2 |")
    )
    assert report == (experiment.out / "ablations.md").read_text()

    monkeypatch.setattr(ablations, "train", None)  # nothing is measured again
    monkeypatch.setattr(ablations, "evaluate_segmenter", None)
    assert experiment.run(few, [0, 3]) == report


def test_an_interrupted_evaluation_does_not_tune_again(make, monkeypatch):
    experiment = make(limit=1, keep_models=False)
    rows = {"tuned": ROWS["tuned"]}

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ablations, "evaluate_segmenter", interrupted)
        with pytest.raises(KeyboardInterrupt):
            experiment.run(rows, [0])
    assert read_results(experiment.out) == {}
    monkeypatch.setattr(ablations, "train", None)
    assert "blocks, 1 images, 4 categories" in experiment.run(rows, [0])
    assert not any((experiment.out / "work").iterdir())


def test_results_of_other_settings_are_an_error(make, model, tmp_path):
    experiment = make(limit=1)
    experiment.save_settings()
    make(limit=1, settings={**SETTINGS, "output_dir": "elsewhere", "seed": 9}).save_settings()
    for changes, name in [({"limit": 2}, "limit"), ({"settings": {**SETTINGS, "steps": 2}}, "training")]:
        with pytest.raises(ValueError, match=rf"holds ablations with other settings \({name} in ablations.json\)"):
            make(**{"limit": 1, **changes}).save_settings()
    with pytest.raises(ValueError, match=r"other settings \(categories, labels in"):
        make(limit=1, data=experiment.data.select(NAMES[:2], rest="other")).save_settings()
    copy = shutil.copytree(model, tmp_path / "model")
    experiment = make(limit=1, model=str(copy), out=tmp_path / "other")
    experiment.save_settings()
    (copy / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(ValueError, match=r"other settings \(weights in"):
        experiment.save_settings()


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("max-cells-16", {}, "a word map of this model has 4 cells a side at most"),
        ("max-cells-4", {"max_cells": None}, "it equals the row tuned"),
        ("max-cells-full", {"max_cells": 4}, "it equals the row tuned"),
        ("segmentation-positions", {}, "it equals the row tuned"),
        ("no-cross-attention", {}, None),
        ("no-cross-attention", {"decoder_cross_attention": False}, "it equals the row tuned"),
        ("image-positions", {}, None),
        ("lora-4", {}, None),
        ("lora-4", {"lora": True, "lora_rank": 4}, "it equals the row tuned"),
        ("max-cells-4", {}, None),
        ("fixed-grid", {"max_cells": None}, None),
    ],
)
def test_rows_that_cannot_be_measured_have_a_reason(name, settings, reason, make):
    experiment = make(settings={**SETTINGS, **settings})
    assert experiment.inapplicable(ROWS[name]) == reason
    if reason is None:
        assert experiment.check([name]) == {name: ROWS[name]}
    else:
        with pytest.raises(ValueError, match=f"There is no row {name} here: {reason}"):
            experiment.check([name])


def test_settings_and_data_are_checked(make, data):
    with pytest.raises(ValueError, match="One category is not enough"):
        make(data=data.select(["cat"])).check()
    with pytest.raises(ValueError, match="settings of stage word-maps"):
        make(settings={"stage": "supervised"}).check()


def test_an_undefined_metric_is_left_out_of_the_table():
    columns = len(ablations.SMOOTHING)
    seeds = {
        0: {"results": [{"mean_iou": 0.5, "overall_accuracy": 0.25}] * columns},
        1: {"results": [{"mean_iou": None, "overall_accuracy": None}] * columns},
    }
    row = ablation_table({"tuned": seeds, "cosine": {0: seeds[1]}}).splitlines()[2:]
    assert row[0] == f"| tuned | 2 |{' 50.0 |' * columns} 25.0 | 25.0 | 25.0 |"
    assert row[1] == f"| cosine of patches and words | 1 |{' - |' * (columns + 3)}"
