"""The recipe of a model: the settings in its configuration, under files and flags."""

import json
from dataclasses import fields

import pytest
from checkpoints import SMALL
from tiny_model import save_tiny_model

from ifseg_hf.modeling import IFSegConfig, IFSegForSemanticSegmentation, OFAConfig, OFAForConditionalGeneration
from ifseg_hf.processing import IFSegProcessor
from ifseg_hf.training.config import TrainingConfig
from ifseg_hf.training.loop import train
from ifseg_hf.training.recipes import complete_settings, model_recipe, published_recipe, training_config
from ifseg_hf.training.setup import SettingError, load_model

RECIPE = {"steps": 20, "warmup_steps": 5, "learning_rate": 1e-5, "max_cells": 2, "batch_size": 2}


def write_tuning(folder, tuning) -> str:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config.get("backbone_config", config)["tuning"] = tuning
    file.write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(params=[IFSegForSemanticSegmentation, OFAForConditionalGeneration])
def model(request, tmp_path):
    """The folder of a model with a recipe, of IFSeg or of its backbone."""
    save_tiny_model(tmp_path / "model", request.param)
    return write_tuning(tmp_path / "model", RECIPE)


def test_the_recipe_is_under_the_given_settings(model):
    assert model_recipe(model) == RECIPE
    assert IFSegConfig.from_pretrained(model).tuning == RECIPE
    settings = complete_settings({"model": model, "learning_rate": 0.5, "seed": 3})
    assert settings == {**RECIPE, "model": model, "learning_rate": 0.5, "seed": 3}
    config = training_config({"model": model, "output_dir": "out", "categories": "cat, cup", "max_cells": None})
    assert (config.steps, config.max_cells, config.categories) == (20, None, ["cat", "cup"])
    assert config.weight_decay == 0.1  # the recipe is silent about it


def test_warm_up_fits_into_fewer_steps(model):
    for steps, warmup in [(4, 2), (1, 0), (100, 5)]:
        assert complete_settings({"model": model, "steps": steps})["warmup_steps"] == warmup
    assert complete_settings({"model": model, "steps": 9, "warmup_steps": 8})["warmup_steps"] == 8


def test_a_recipe_is_for_word_maps(model):
    settings = {"model": model, "stage": "supervised"}
    assert complete_settings(settings) == settings


def test_a_model_without_a_recipe_has_the_published_one(tmp_path):
    model = save_tiny_model(tmp_path)
    assert model_recipe(model) == {}
    config = training_config({"model": model, "output_dir": "out", "categories": "cat, cup"})
    assert config == TrainingConfig(["cat", "cup"], "out", model)
    recipe = published_recipe()
    assert recipe["steps"] == 2000
    assert TrainingConfig(["cat", "cup"], "out", model, **recipe) == config
    assert set(recipe) <= {field.name for field in fields(TrainingConfig) if field.metadata["recipe"]}


@pytest.mark.parametrize(
    ("tuning", "message"),
    [
        ({"stepz": 5}, 'no setting "stepz": steps?'),
        ({"steps": "many"}, "steps is 'many', but must be a whole number"),
        ({"output_dir": "/"}, "output_dir is no setting of a recipe"),
        ([1], "expected settings by name"),
        ("fast", "expected settings by name"),
    ],
)
def test_a_wrong_recipe_is_named(tuning, message, tmp_path):
    save_tiny_model(tmp_path)
    write_tuning(tmp_path, tuning)
    with pytest.raises(ValueError, match=r"In the tuning of .*config\.json") as caught:
        model_recipe(tmp_path)
    assert message in str(caught.value)


def test_a_missing_model_is_named():
    with pytest.raises(ValueError, match='no model folder "nowhere"'):
        training_config({"model": "nowhere", "output_dir": "out", "categories": "cat, cup"})


def test_a_tuned_model_keeps_its_recipe(model, tmp_path):
    train(training_config({"model": model, "output_dir": str(tmp_path / "out"), "categories": "cat, cup", "steps": 2}))
    assert model_recipe(tmp_path / "out") == RECIPE


# Settings of the backbone ---------------------------------------------------------------------------------------------


def test_image_size_changes_word_maps_and_images(model, tmp_path):
    before = IFSegProcessor.from_pretrained(model).image_processor.size
    settings = {"model": model, "output_dir": str(tmp_path / "out"), "categories": "cat, cup", "cpu": True}
    config = training_config({**settings, "image_size": 32, "decoder_positions": "image", "steps": 2})
    train(config)
    tuned = IFSegForSemanticSegmentation.from_pretrained(tmp_path / "out")
    assert (tuned.config.image_size, tuned.config.grid_size) == (32, 2)
    assert tuned.config.backbone_config.decoder_positions == "image"
    after = IFSegProcessor.from_pretrained(tmp_path / "out").image_processor.size
    assert {name: 2 * pixels for name, pixels in dict(after).items()} == dict(before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 40}, "image_size=40: must be a multiple of the model's patch size 16"),
        ({"image_size": 32, "max_cells": 3}, "at most 2 cells a side"),
        ({"decoder_positions": "none"}, "choose segmentation or image"),
    ],
)
def test_wrong_sizes_are_named_before_the_weights_are_loaded(changes, message, tmp_path):
    model = save_tiny_model(tmp_path / "model")
    config = training_config({"model": model, "output_dir": str(tmp_path), "categories": "cat, cup", **changes})
    with pytest.raises(ValueError, match=message):
        config.check()


def test_sizes_without_positions_are_named(tmp_path):
    model = save_tiny_model(tmp_path / "model")
    side = 16 * (SMALL["image_bucket_size"] + 1)
    config = TrainingConfig(["cat", "cup"], str(tmp_path / "out"), model, image_size=side)
    with pytest.raises(SettingError, match=f"image_size={side}.*more than image_bucket_size"):
        load_model(config)
    tuned = save_tiny_model(tmp_path / "tuned", tuned=True)
    config = TrainingConfig(["cat", "cup"], str(tmp_path / "out"), tuned, image_size=32)
    with pytest.raises(SettingError, match="image_size=32: the model was tuned with decoder positions for 64 pixels"):
        load_model(config)


def test_the_recipe_is_saved_with_the_configuration(tmp_path):
    OFAConfig(**SMALL, tuning=RECIPE).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tuning"] == RECIPE
    assert IFSegConfig.from_pretrained(tmp_path).tuning == RECIPE
