"""Files that visitors download: mask, overlay, and the tuned model."""

import json
import shutil
import tempfile
import time
import zipfile
from pathlib import Path

from PIL import Image

from ifseg_hf.app.images import PageError, read_upload
from ifseg_hf.app.segmentation import PostProcessing, Segmentation
from ifseg_hf.hub.model_card import model_card
from ifseg_hf.hub.model_folder import public_settings, read_settings
from ifseg_hf.hub.publish import files_to_publish
from ifseg_hf.pretrained import EMBEDDED
from ifseg_hf.training.config import SETTINGS_FILE
from ifseg_hf.visualization.overlays import overlay, save_mask

__all__ = ["new_folder", "write_mask", "write_model", "write_overlay"]

_KEPT_SECONDS = 600  # of files that the server has long copied to where it sends them from


def new_folder(root: Path) -> Path:
    """Returns a new folder for a download in `root`, and deletes those of earlier downloads."""
    for old in root.iterdir():
        if time.time() - old.stat().st_mtime > _KEPT_SECONDS:
            shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(dir=root))


def write_mask(segmentation: Segmentation, how: PostProcessing, folder: Path) -> Path:
    """Writes the mask of the image in its own size to a folder, as [`save_mask`] does, and returns the file."""
    file = folder / f"{Path(segmentation.path).stem}_mask.png"
    save_mask(segmentation.full_size_labels(how), file, segmentation.names)
    return file


def write_overlay(segmentation: Segmentation, how: PostProcessing, folder: Path) -> Path:
    """Writes the overlay of the image in its own size, with a legend, to a folder, and returns the file.

    Raises [`PageError`] if the uploaded image was deleted since.
    """
    image = _uploaded(segmentation)
    file = folder / f"{Path(segmentation.path).stem}_overlay.png"
    overlay(image, segmentation.full_size_labels(how), segmentation.names).save(file)
    return file


def write_model(model: Path, folder: Path) -> Path:
    """Writes a ZIP file with a tuned model to a folder, and returns the file.

    It has weights, configuration, processor, code, settings and a model card.

    Raises [`PageError`] if the model is not in the cache any more.
    """
    name = model.name.rpartition("-")[0] or model.name
    file = folder / f"{name}.zip"
    try:
        files = files_to_publish(model)
        settings = public_settings(read_settings(model))
        start = read_settings(model).get("model")
        card = str(model_card(model, name, base_model=start if start == EMBEDDED else None))
        with zipfile.ZipFile(file, "w") as archive:  # weights hardly get smaller by compression
            for part in files:
                archive.write(part, f"{name}/{part.name}")
            archive.writestr(f"{name}/{SETTINGS_FILE}", json.dumps(settings, indent=2, ensure_ascii=False))
            if not any(part.name == "README.md" for part in files):
                archive.writestr(f"{name}/README.md", card)
    except (OSError, ValueError) as error:
        raise PageError("The tuned model was deleted from the cache: tune on the words again.") from error
    return file


def _uploaded(segmentation: Segmentation) -> Image.Image:
    if not Path(segmentation.path).is_file():
        raise PageError("The uploaded image was deleted after some time: upload it again.")
    return read_upload(segmentation.path).image
