"""Settings: what may be set, in a file or by hand, and with what a run may go on. Nothing is trained here."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from ifseg_hf.data.vocabularies import read_categories
from ifseg_hf.training.config import (
    CHECKPOINT_FILE,
    SETTINGS_FILE,
    STAGES,
    TrainingConfig,
    checkpoints,
    read_settings,
    resolve_model,
)

CONFIGS = Path(__file__).parents[3] / "scripts" / "configs"


@pytest.fixture
def model(tmp_path):
    """As much of a model as settings are checked with."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "ifseg", "image_size": 64}')
    return str(tmp_path / "model")


@pytest.fixture
def settings(model, tmp_path):
    return TrainingConfig(["cat", "cup"], str(tmp_path / "out"), model)


def write_checkpoint(settings, step, folder=None):
    """What a checkpoint tells of itself, without the weights."""
    output = Path(settings.output_dir)
    folder = folder or output / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (output / SETTINGS_FILE).touch()
    (folder / CHECKPOINT_FILE).write_text(json.dumps({"step": step, "settings": settings.to_dict()}))
    return folder


def test_defaults_are_the_published_recipe():
    recipe = TrainingConfig(["a", "b"], "").to_dict()
    expected = {
        "steps": 2000,
        "batch_size": 16,
        "learning_rate": 5e-5,
        "warmup_steps": 0,
        "weight_decay": 0.1,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "max_grad_norm": 1.0,
        "dropout": 0.1,
        "drop_path": 0.1,
        "word_noise": 0.0,
    }
    assert {name: recipe[name] for name in expected} == expected


# Settings in a file ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["coco_stuff_unseen", "coco_stuff", "coco_stuff_coarse", "ade20k"])
def test_published_settings_are_the_recipe_with_their_words(name):
    given = read_settings(str(CONFIGS / f"{name}.yaml"))
    recipe = TrainingConfig(given["categories"], given["output_dir"], "ofa-base")
    assert TrainingConfig(**given) == recipe
    assert read_categories(given["categories"]) == read_categories(name.replace("_", "-"))


def test_the_embedded_models_settings():
    given = read_settings(str(CONFIGS / "nano.yaml"))
    assert given["model"] == "ifseg-ofa-nano"
    assert (given["batch_size"], given["learning_rate"], given["weight_decay"]) == (8, 2e-3, 0.01)
    assert len(read_categories(given["categories"])) >= 2


def test_a_file_of_settings(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("learning-rate: 5e-5\nbatch_size: 8\ncategories:\n  animal: [cat]\nprompt: null\ncpu: true\n")
    expected = {"learning_rate": 5e-5, "batch_size": 8, "categories": {"animal": ["cat"]}, "prompt": None, "cpu": True}
    assert read_settings(str(file)) == expected
    file.write_text(json.dumps(TrainingConfig(["a", "b"], "out").to_dict()))
    assert TrainingConfig(**read_settings(str(file))) == TrainingConfig(["a", "b"], "out")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "holds no settings"),
        ("- 1", "holds no settings"),
        ("a: [", "not YAML"),
        ("stepps: 5", 'no setting "stepps": steps?'),
        ("zzz: 5", 'no setting "zzz"'),
        ("steps: many", "steps is 'many', but must be a whole number"),
        ("steps: 1.5", "must be a whole number"),
        ("steps: true", "must be a whole number"),
        ("learning_rate: small", "must be a number"),
        ("learning_rate: false", "must be a number"),
        ("cpu: 1", "must be true or false"),
        ("model: 5", "must be text"),
        ("categories: 5", "must be text"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(text, told, tmp_path):
    (tmp_path / "settings.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"settings\.yaml") as caught:
        read_settings(str(tmp_path / "settings.yaml"))
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


# Models and folders ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["owner/name", "OFA-Sys/ofa-base", "a_b/c.d"])
def test_a_name_with_an_owner_is_on_the_hub(name):
    assert resolve_model(name) == name


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "~/nowhere", "/nowhere", "a/b/c", "a\\b", "", Path("a/b")])
def test_any_other_name_is_a_folder_that_must_be_there(name, settings):
    with pytest.raises(FileNotFoundError, match="no model folder"):
        resolve_model(name)
    with pytest.raises(ValueError, match="no model folder"):
        replace(settings, model=name).check()


def test_a_folder_that_looks_like_a_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert resolve_model("owner/name") == Path("owner/name")


def test_an_output_folder_that_cannot_be_written_to_is_refused(settings, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(ValueError, match="cannot be written to"):
        settings.check()


# Stages ---------------------------------------------------------------------------------------------------------------


def test_what_a_stage_freezes_unless_told(settings):
    assert [replace(settings, stage=stage).frozen for stage in STAGES] == ["trunk", "nothing", "words"]
    assert replace(settings, stage="supervised", freeze="trunk").frozen == "trunk"


@pytest.mark.parametrize("stage", STAGES[1:])
def test_photos_need_no_categories_but_a_data_set(stage, settings):
    replace(settings, stage=stage, dataset="photos", categories=None).check()
    replace(settings, dataset="photos", categories=None).check()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"stage": "tuning"}, 'stage="tuning": choose word-maps, supervised or self-training.'),
        ({"stage": "supervised"}, "needs photos: give a dataset"),
        ({"categories": None}, "There are no categories: give a dataset"),
        ({"freeze": "nothing"}, "freeze belongs to stage=supervised or self-training, not to word-maps"),
        ({"unseen": "cat"}, "unseen belongs to stage=supervised"),
        ({"from_scratch": True}, "from_scratch belongs to"),
        ({"stage": "supervised", "dataset": "d", "refresh_every": 5}, "refresh_every belongs to stage=self-training"),
        ({"stage": "self-training", "dataset": "d", "unseen": "cat"}, "unseen belongs to stage=supervised"),
        ({"stage": "self-training", "dataset": "d", "refresh_every": 5}, '"d" is no folder of scripts/pseudo_label.py'),
        ({"stage": "self-training", "dataset": "d", "refresh_every": -1}, "refresh_every=-1"),
        ({"stage": "supervised", "dataset": "d", "freeze": "all"}, 'freeze="all": choose nothing, words, trunk.'),
        ({"stage": "supervised", "dataset": "d", "word_map_ratio": 1.0}, "word_map_ratio=1.0"),
        ({"stage": "supervised", "dataset": "d", "crop_size": 24}, "crop_size=24: must be a multiple"),
        ({"stage": "supervised", "dataset": "d", "short_side": 0}, "short_side=0"),
    ],
)
def test_settings_that_do_not_fit_the_stage_are_told(changes, told, settings):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        replace(settings, **changes).check()
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("photos_*.yaml")), ids=lambda file: file.stem)
def test_published_settings_for_photos(file, tmp_path, monkeypatch):
    """They pass every check, with a model and pseudo-labels in the places that they name."""
    given = read_settings(str(file))
    monkeypatch.chdir(tmp_path)
    for folder in (given["model"], given["dataset"]):
        Path(folder).mkdir(parents=True, exist_ok=True)
    (tmp_path / given["model"] / "config.json").write_text('{"model_type": "ifseg"}')
    (tmp_path / given["dataset"] / "dataset.json").write_text('{"pseudo_labels": {}}')
    given.setdefault("categories", None)
    TrainingConfig(**given).check()
    assert given["stage"] in STAGES[1:]


# Going on -------------------------------------------------------------------------------------------------------------


def test_the_latest_checkpoint_is_the_one_of_the_last_step(settings):
    latest = replace(settings, resume="latest")
    latest.check()  # with none there
    assert latest.checkpoint() is None
    for step in (9, 10, 100):
        write_checkpoint(settings, step)
    output = Path(settings.output_dir)
    (output / "checkpoint-200").mkdir()  # what is not whole does not count
    write_checkpoint(settings, 300, output / "checkpoint-300.incomplete")
    assert list(checkpoints(output)) == [9, 10, 100]
    assert latest.checkpoint() == output / "checkpoint-100"
    latest.check()
    assert replace(settings, resume=str(output)).checkpoint() == output / "checkpoint-100"
    assert replace(settings, resume=str(output / "checkpoint-9")).checkpoint() == output / "checkpoint-9"


def test_checkpoints_of_an_earlier_run_are_not_overwritten(settings):
    write_checkpoint(settings, 9)
    with pytest.raises(ValueError, match="go on from them with --resume"):
        settings.check()


def test_a_folder_without_checkpoints_is_refused_by_name(settings, tmp_path):
    with pytest.raises(ValueError, match=r"nothing-here.*no checkpoint"):
        replace(settings, resume=str(tmp_path / "nothing-here")).check()


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"step": 5}', '{"step": "x", "settings": {}}'])
def test_a_damaged_checkpoint_is_told(text, settings):
    (write_checkpoint(settings, 9) / CHECKPOINT_FILE).write_text(text)
    with pytest.raises(ValueError, match=r"checkpoint-9.*damaged"):
        replace(settings, resume="latest").check()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("categories", ["cup", "cat"]),
        ("categories", {"cat": ["kitten"], "cup": ["mug"]}),
        ("model", "owner/other"),
        ("prompt", "what?"),
        ("append_unknown", False),
        ("max_cells", 3),
        ("seed", 1),
        ("steps", 1999),
        ("batch_size", 32),
        ("learning_rate", 1e-4),
        ("warmup_steps", 1),
        ("weight_decay", 0.2),
        ("adam_beta1", 0.8),
        ("adam_beta2", 0.9),
        ("adam_epsilon", 1e-7),
        ("max_grad_norm", 2.0),
        ("dropout", 0.0),
        ("drop_path", 0.0),
        ("word_noise", 0.5),
        ("dataset", "others"),
    ],
)
def test_a_changed_setting_is_refused_by_name(name, value, settings):
    write_checkpoint(settings, 9)
    with pytest.raises(ValueError, match=f"cannot go on with other settings: {name} \\(was ") as caught:
        replace(settings, resume="latest", **{name: value}).check()
    assert "\n" not in str(caught.value)


def test_every_changed_setting_is_named(settings):
    write_checkpoint(replace(settings, categories={"a": ["b"], "c": ["d"]}), 9)
    changed = replace(settings, categories={"c": ["d"], "a": ["b"]}, seed=7, resume="latest")
    with pytest.raises(ValueError, match=r"categories \(was 2: a, c, is 2: c, a\), seed \(was 0, is 7\)"):
        changed.check()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gradient_accumulation_steps", 4),
        ("dataloader_workers", 2),
        ("report_to", "tensorboard"),
        ("cpu", True),
        ("checkpointing_steps", 7),
        ("checkpoints_total_limit", 5),
    ],
)
def test_what_changes_nothing_that_is_learnt_may_change(name, value, settings):
    write_checkpoint(settings, 9)
    replace(settings, resume="latest", **{name: value}).check()


def test_a_run_may_go_on_in_another_folder_and_with_another_path_to_its_model(settings, tmp_path, monkeypatch):
    checkpoint = write_checkpoint(settings, 9)
    monkeypatch.chdir(tmp_path)
    replace(settings, resume=str(checkpoint), output_dir=str(tmp_path / "other"), model="model").check()
