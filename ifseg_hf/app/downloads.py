"""Files that visitors download: mask, overlay, and the tuned model."""

import json
import shutil
import tempfile
import zipfile
from pathlib import Path

from PIL import Image

from ifseg_hf.app.images import PageError, read_upload
from ifseg_hf.app.segmentation import PostProcessing, Segmentation
from ifseg_hf.hub.model_card import model_card
from ifseg_hf.hub.model_folder import public_settings, read_settings
from ifseg_hf.hub.publish import files_to_publish
from ifseg_hf.training.config import SETTINGS_FILE
from ifseg_hf.visualization.overlays import overlay, save_mask

__all__ = ["write_mask", "write_model", "write_overlay"]


def write_mask(segmentation: Segmentation, how: PostProcessing) -> Path:
    """Writes the mask of the image in its own size, as [`save_mask`] does, and returns the file."""
    file = _new_file(f"{Path(segmentation.path).stem}_mask.png")
    save_mask(segmentation.full_size_labels(how), file, segmentation.names)
    return file


def write_overlay(segmentation: Segmentation, how: PostProcessing) -> Path:
    """Writes the overlay of the image in its own size, with a legend, and returns the file.

    Raises [`PageError`] if the uploaded image was deleted since.
    """
    image = _uploaded(segmentation)
    file = _new_file(f"{Path(segmentation.path).stem}_overlay.png")
    overlay(image, segmentation.full_size_labels(how), segmentation.names).save(file)
    return file


def write_model(folder: Path) -> Path:
    """Writes a ZIP file with a tuned model: weights, configuration, processor, code, settings and a model card.

    Raises [`PageError`] if the model is not in the cache any more.
    """
    name = folder.name.rpartition("-")[0] or folder.name
    file = _new_file(f"{name}.zip")
    try:
        files = files_to_publish(folder)
        settings = public_settings(read_settings(folder))
        card = str(model_card(folder, name, base_model=settings.get("model")))
        with zipfile.ZipFile(file, "w") as archive:  # weights hardly get smaller by compression
            for part in files:
                archive.write(part, f"{name}/{part.name}")
            archive.writestr(f"{name}/{SETTINGS_FILE}", json.dumps(settings, indent=2, ensure_ascii=False))
            if not any(part.name == "README.md" for part in files):
                archive.writestr(f"{name}/README.md", card)
    except (OSError, ValueError) as error:
        shutil.rmtree(file.parent, ignore_errors=True)
        raise PageError("The tuned model is not in the cache any more: tune on the words once more.") from error
    return file


def _new_file(name: str) -> Path:
    """A file in a new temporary folder, from where Gradio copies it to its own."""
    return Path(tempfile.mkdtemp(prefix="ifseg-")) / name


def _uploaded(segmentation: Segmentation) -> Image.Image:
    if not Path(segmentation.path).is_file():
        raise PageError("The uploaded image was deleted after some time: upload it once more.")
    return read_upload(segmentation.path).image
