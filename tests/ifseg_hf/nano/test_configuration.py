"""Size and recipe of the nano OFA."""

import json
from pathlib import Path

import torch

from ifseg_hf import NANO
from ifseg_hf.modeling import OFAForConditionalGeneration
from ifseg_hf.nano.configuration import RECIPE, nano_config
from ifseg_hf.training.config import read_settings
from ifseg_hf.training.recipes import model_recipe

CONFIG = Path(__file__).parents[3] / "scripts" / "configs" / "nano.yaml"


def test_the_nano_model_has_under_32_megabytes():
    with torch.device("meta"):
        model = OFAForConditionalGeneration(nano_config(9000))
    assert 2 * sum(parameter.numel() for parameter in model.parameters()) < 32e6


def test_the_checkpoint_has_the_recipe_and_the_file_does_not():
    settings = read_settings(str(CONFIG))
    assert set(settings) == {"model", "categories", "output_dir"}
    assert model_recipe(NANO) == RECIPE
    assert json.loads((NANO / "config.json").read_text())["dtype"] == "float32"  # whose weights are stored in float16
