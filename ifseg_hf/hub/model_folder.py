"""Reading the folder of a saved model: its configuration, training settings and results."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from ifseg_hf.training.config import SETTINGS_FILE, private_settings

RESULTS_FILE = "evaluation_results.json"
"""Optional file in a model's folder: a list with the keyword arguments of one `huggingface_hub.EvalResult` per item."""
CARD_IMAGE = "card_image.jpg"
"""Optional file in a model's folder: the picture at the top of its model card."""


def read_json(file: Path) -> Any:
    """The content of a JSON file in a model's folder. Raises `ValueError`, in one line, if it cannot be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f'"{file.parent}" is not a model folder: {file.name} cannot be read ({error.strerror}).'
        ) from None
    except ValueError:
        raise ValueError(f'"{file}" is not valid JSON.') from None


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings that the model was trained with, by name; {} if it was not trained by this package."""
    file = folder / SETTINGS_FILE
    return read_json(file) if file.is_file() else {}


def public_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings without private ones and without paths of this machine."""

    def is_path(name: str, value: Any) -> bool:
        if not isinstance(value, str):
            return False
        # Datasets given by name, such as ade20k, are published; folders are not.
        return Path(value).expanduser().is_absolute() or (name == "dataset" and value != "" and Path(value).is_dir())

    private = private_settings()
    return {name: value for name, value in settings.items() if name not in private and not is_path(name, value)}


def read_results(folder: Path) -> list[EvalResult]:
    """The results in [`RESULTS_FILE`]; [] without that file. Raises `ValueError` if it is not a list of results."""
    file = folder / RESULTS_FILE
    if not file.is_file():
        return []
    try:
        return [EvalResult(**result) for result in read_json(file)]
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(f'"{file}" is not a list of evaluation results: {reason}.') from error
