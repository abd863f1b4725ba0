"""Training settings: values, files, stages and resuming. Nothing is trained here."""

import json
import os
import shlex
from dataclasses import fields, replace
from pathlib import Path

import pytest

from ifseg_hf.data.vocabularies import read_categories
from ifseg_hf.experiments.paper_tables import CHANGES, COMMANDS
from ifseg_hf.training.config import (
    CHECKPOINT_FILE,
    SETTINGS_FILE,
    STAGES,
    TrainingConfig,
    checkpoints,
    private_settings,
    read_settings,
    resolve_model,
)

CONFIGS = Path(__file__).parents[3] / "scripts" / "configs"


@pytest.fixture
def model(tmp_path):
    """The part of a model folder that settings are checked against."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "ifseg", "image_size": 64}')
    return str(tmp_path / "model")


@pytest.fixture
def settings(model, tmp_path):
    return TrainingConfig(["cat", "cup"], str(tmp_path / "out"), model)


def write_checkpoint(settings, step, folder=None):
    """Writes a checkpoint without weights."""
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
    }
    assert {name: recipe[name] for name in expected} == expected


def test_every_setting_has_its_metadata():
    """Metadata of a plain dataclass field would be empty."""
    for field in fields(TrainingConfig):
        assert field.metadata["help"]
        assert set(field.metadata["stages"]) <= set(STAGES)


def test_private_settings_are_not_those_of_the_recipe():
    assert {"output_dir", "model", "data_dir", "report_to", "push_to_hub"} <= private_settings()
    assert not {"categories", "steps", "learning_rate", "mixed_precision", "stage"} & private_settings()


# Settings in a file ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["coco_stuff_unseen", "coco_stuff", "coco_stuff_coarse", "ade20k"])
def test_published_settings_are_the_recipe_with_its_words(name):
    given = read_settings(str(CONFIGS / f"{name}.yaml"))
    recipe = TrainingConfig(given["categories"], given["output_dir"], "OFA-Sys/ofa-base")
    assert TrainingConfig(**given) == recipe
    assert read_categories(given["categories"]) == read_categories(name.replace("_", "-"))


def test_no_number_of_a_recipe_is_declared_twice():
    """Files leave out the defaults and each other's numbers, and commands those of their files."""
    numbers = {field.name: field.default for field in fields(TrainingConfig) if field.metadata["recipe"]}
    declared = []
    for file in sorted(CONFIGS.glob("*.yaml")):
        if file.stem.startswith(("accelerate", "images_nano")):
            continue
        given = read_settings(str(file))
        declared += [(name, x) for name, x in given.items() if name in numbers]
        assert not [name for name, x in given.items() if name in numbers and x == numbers[name]], file.name
    assert declared
    assert len(set(declared)) == len(declared)
    for name, command in COMMANDS.items():
        parts = shlex.split(command)
        if parts[0] == "train.py":
            assert parts[1] == "--config"
            changed = {part for part in parts if part.startswith("--")} - {"--config", "--model", "--dataset"}
            allowed = {"--data-dir", "--categories"}
            assert len(changed - allowed) == (name.removeprefix("unseen-") in CHANGES), command


def test_settings_for_the_embedded_model():
    given = read_settings(str(CONFIGS / "nano.yaml"))
    assert given["model"] == "ifseg-ofa-nano"
    assert len(read_categories(given["categories"])) >= 2


def test_settings_are_read_from_a_file(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("learning-rate: 5e-5\nbatch_size: 8\ncategories:\n  animal: [cat]\nprompt: null\ncpu: true\n")
    expected = {"learning_rate": 5e-5, "batch_size": 8, "categories": {"animal": ["cat"]}, "prompt": None, "cpu": True}
    assert read_settings(str(file)) == expected
    file.write_text(json.dumps(TrainingConfig(["a", "b"], "out").to_dict()))
    assert TrainingConfig(**read_settings(str(file))) == TrainingConfig(["a", "b"], "out")


@pytest.mark.parametrize(
    ("text", "expected"),
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
def test_a_wrong_setting_in_a_file_is_named(text, expected, tmp_path):
    (tmp_path / "settings.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"settings\.yaml") as caught:
        read_settings(str(tmp_path / "settings.yaml"))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


# Models and folders ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["owner/name", "OFA-Sys/ofa-base", "a_b/c.d"])
def test_a_name_with_an_owner_is_a_hub_id(name):
    assert resolve_model(name) == name


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "~/nowhere", "/nowhere", "a/b/c", "a\\b", "", Path("a/b")])
def test_any_other_name_must_be_an_existing_folder(name, settings):
    with pytest.raises(FileNotFoundError, match="no model folder"):
        resolve_model(name)
    with pytest.raises(ValueError, match="no model folder"):
        replace(settings, model=name).check()


def test_an_existing_folder_precedes_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert resolve_model("owner/name") == Path("owner/name")


def test_an_output_folder_without_write_access_is_rejected(settings, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(ValueError, match="cannot be written to"):
        settings.check()


# Stages ---------------------------------------------------------------------------------------------------------------


def test_the_stage_decides_what_is_frozen_by_default(settings):
    assert [replace(settings, stage=stage).frozen for stage in STAGES] == ["trunk", "nothing", "words"]
    assert replace(settings, stage="supervised", freeze="trunk").frozen == "trunk"


@pytest.mark.parametrize("stage", STAGES[1:])
def test_a_dataset_replaces_the_categories(stage, settings):
    replace(settings, stage=stage, dataset="images", categories=None).check()
    replace(settings, dataset="images", categories=None).check()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"stage": "tuning"}, 'stage="tuning": choose word-maps, supervised or self-training.'),
        ({"stage": "supervised"}, "needs images: give a dataset"),
        ({"categories": None}, "There are no categories: give some"),
        ({"freeze": "nothing"}, "freeze belongs to stage=supervised or self-training, not to word-maps"),
        ({"unseen": "cat"}, "unseen belongs to stage=supervised"),
        ({"from_scratch": True}, "from_scratch belongs to"),
        ({"stage": "supervised", "dataset": "d", "refresh_every": 5}, "refresh_every belongs to stage=self-training"),
        ({"stage": "self-training", "dataset": "d", "unseen": "cat"}, "unseen belongs to stage=supervised"),
        ({"stage": "self-training", "dataset": "d", "refresh_every": 5}, '"d" is no folder of `ifseg pseudo-label`'),
        ({"stage": "self-training", "dataset": "d", "refresh_every": -1}, "refresh_every=-1"),
        ({"stage": "supervised", "dataset": "d", "freeze": "all"}, 'freeze="all": choose nothing, words or trunk.'),
        ({"stage": "supervised", "dataset": "d", "word_map_ratio": 1.0}, "word_map_ratio=1.0"),
        ({"stage": "supervised", "dataset": "d", "crop_size": 24}, "crop_size=24: must be a multiple"),
        ({"stage": "supervised", "dataset": "d", "short_side": 0}, "short_side=0"),
    ],
)
def test_a_setting_that_does_not_fit_the_stage_is_rejected(changes, expected, settings):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        replace(settings, **changes).check()
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("images_*.yaml")), ids=lambda file: file.stem)
def test_published_settings_for_images_are_valid(file, tmp_path, monkeypatch):
    given = read_settings(str(file))
    monkeypatch.chdir(tmp_path)
    for folder in (given["model"], given["dataset"]):
        Path(folder).mkdir(parents=True, exist_ok=True)
    (tmp_path / given["model"] / "config.json").write_text('{"model_type": "ifseg"}')
    (tmp_path / given["dataset"] / "dataset.json").write_text('{"pseudo_labels": {}}')
    given.setdefault("categories", None)
    TrainingConfig(**given).check()
    assert given["stage"] in STAGES[1:]


# Resuming -------------------------------------------------------------------------------------------------------------


def test_resume_finds_the_checkpoint_of_the_last_step(settings):
    latest = replace(settings, resume="latest")
    latest.check()  # without any checkpoint
    assert latest.find_checkpoint() is None
    for step in (9, 10, 100):
        write_checkpoint(settings, step)
    output = Path(settings.output_dir)
    (output / "checkpoint-200").mkdir()  # incomplete, and so ignored
    write_checkpoint(settings, 300, output / "checkpoint-300.incomplete")
    assert list(checkpoints(output)) == [9, 10, 100]
    assert latest.find_checkpoint() == output / "checkpoint-100"
    latest.check()
    assert replace(settings, resume=str(output)).find_checkpoint() == output / "checkpoint-100"
    assert replace(settings, resume=str(output / "checkpoint-9")).find_checkpoint() == output / "checkpoint-9"


def test_checkpoints_of_an_earlier_run_are_not_overwritten(settings):
    write_checkpoint(settings, 9)
    with pytest.raises(ValueError, match="continue from them with --resume"):
        settings.check()


def test_resuming_from_a_folder_without_checkpoints_is_rejected(settings, tmp_path):
    with pytest.raises(ValueError, match=r"nothing-here.*no checkpoint"):
        replace(settings, resume=str(tmp_path / "nothing-here")).check()


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"step": 5}', '{"step": "x", "settings": {}}'])
def test_a_damaged_checkpoint_is_rejected(text, settings):
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
        ("dataset", "others"),
    ],
)
def test_a_changed_setting_is_rejected_by_name(name, value, settings):
    write_checkpoint(settings, 9)
    with pytest.raises(ValueError, match=f"cannot be resumed with other settings: {name} \\(was ") as caught:
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
def test_a_setting_that_does_not_affect_the_weights_may_change(name, value, settings):
    write_checkpoint(settings, 9)
    replace(settings, resume="latest", **{name: value}).check()


def test_resuming_with_other_output_dir_and_model_path(settings, tmp_path, monkeypatch):
    checkpoint = write_checkpoint(settings, 9)
    monkeypatch.chdir(tmp_path)
    replace(settings, resume=str(checkpoint), output_dir=str(tmp_path / "other"), model="model").check()
