"""The embedded model for small images, with a short recipe."""

import json
import shutil
from pathlib import Path

from ifseg_hf.pretrained import NANO

SIDE = 128  # of images


def save_small_nano(folder: Path, steps: int = 10) -> str:
    """Saves the embedded model for images of 128 pixels, with a recipe of `steps` steps. Returns the folder."""
    shutil.copytree(NANO, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__", "words"), dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    config |= {"image_size": SIDE}
    config["tuning"] |= {"steps": steps, "warmup_steps": 1, "mixed_precision": "no", "max_cells": 4}
    (folder / "config.json").write_text(json.dumps(config))
    processor = json.loads((folder / "processor_config.json").read_text())
    processor["image_processor"]["size"] = {"shortest_edge": SIDE, "longest_edge": 4 * SIDE}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    return str(folder)
