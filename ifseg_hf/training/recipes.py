"""Recipes: the settings with which a model is best tuned on words, carried by its configuration as `tuning`.

Without `tuning`, the published recipe is used: the defaults of [`TrainingConfig`].
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from ifseg_hf.data.vocabularies import read_background, read_categories
from ifseg_hf.pretrained import EMBEDDED, checkpoint_folder
from ifseg_hf.training.config import LORA_RATE, TrainingConfig, check_settings

__all__ = ["complete_settings", "model_recipe", "published_recipe", "training_config"]


def published_recipe() -> dict[str, Any]:
    """The published settings of tuning on words, by name."""
    fields = dataclasses.fields(TrainingConfig)
    return {field.name: field.default for field in fields if field.metadata["recipe"] and field.default is not None}


def model_recipe(model: str | Path) -> dict[str, Any]:
    """The settings in the configuration of a model, by name; {} if it has none.

    Args:
        model: folder or Hub id, or "ifseg-ofa-nano"; see [`checkpoint_folder`].

    Raises:
        `ValueError`: the configuration cannot be read, or its `tuning` holds something other than a recipe's settings.
    """
    file = checkpoint_folder(model) / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # `TrainingConfig.check` says what is wrong with the folder
    backbone = config.get("backbone_config") or config if isinstance(config, dict) else {}
    tuning = backbone.get("tuning") or {}
    source = f'In the tuning of "{file}": '
    if not isinstance(tuning, dict):
        raise ValueError(f'{source}expected settings by name, such as {{"steps": 2000}}, and not {tuning!r}.')
    settings = check_settings(tuning, source)
    allowed = {field.name for field in dataclasses.fields(TrainingConfig) if field.metadata["recipe"]}
    for name in settings:
        if name not in allowed:
            raise ValueError(f"{source}{name} is no setting of a recipe: give it when the model is tuned.")
    return settings


def complete_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The given settings over the recipe of their model, which is for tuning on words alone.

    Where fewer steps are asked for than the recipe has, its warm-up is at most half of them. The learning rate of a
    LoRA adapter is LORA_RATE times the recipe's.
    """
    if settings.get("stage", "word-maps") != "word-maps":
        return dict(settings)
    recipe = model_recipe(settings.get("model", EMBEDDED))
    if "warmup_steps" in recipe and "steps" in settings:
        recipe["warmup_steps"] = min(recipe["warmup_steps"], settings["steps"] // 2)
    if settings.get("lora"):
        recipe["learning_rate"] = LORA_RATE * recipe.get("learning_rate", TrainingConfig.learning_rate)
    return {**recipe, **settings}


def training_config(settings: dict[str, Any]) -> TrainingConfig:
    """The configuration of a run: settings over the model's recipe over the defaults.

    Args:
        settings: by name, as [`ifseg_hf.training.config.check_settings`] returns them. `categories` may be text, as
            [`read_categories`] reads it; without them, the categories of `dataset` are used. `background` may be text,
            as [`read_background`] reads it.

    Raises:
        `ValueError`: a model or the categories cannot be read. The values are not checked; see
            [`TrainingConfig.check`].
    """
    categories = settings.get("categories")
    settings = {**settings, "categories": None if categories is None else read_categories(categories)}
    if settings.get("background") is not None:
        settings["background"] = read_background(settings["background"])
    try:
        return TrainingConfig(**complete_settings(settings))
    except FileNotFoundError as error:
        raise ValueError(str(error)) from None
