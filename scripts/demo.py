"""Tunes the embedded checkpoint on words alone, and segments images before and after.

    python scripts/demo.py
    python scripts/demo.py --image cat.jpg --categories "cat, sofa, wall"
    python scripts/demo.py --picture ifseg_hf/nano/card_image.jpg     # the picture of the README (make pictures)

Without --image, the images are a palace and a flower (scikit-learn), a cat, a cup of coffee and a motorcycle
(scikit-image).
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from ifseg_hf.cli.options import add_on_error
from ifseg_hf.cli.output import escape_unprintable
from ifseg_hf.cli.segment import unique_stems

# Settings of the tuning, with words for the bundled images.
IN_PICTURE = ("palace", "coffee")  # the bundled images in the picture of the README
WIDTH = 400  # of an image in that picture
SETTINGS = Path(__file__).resolve().parent / "configs" / "nano.yaml"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Tunes the embedded checkpoint on words, then segments images.")
    parser.add_argument(
        "--image", action="append", help="an image file; may be repeated (default: five bundled images)"
    )
    parser.add_argument("--categories", help=f"comma-separated words, or a file of words (default: {SETTINGS.name}'s)")
    parser.add_argument("--steps", type=int, help=f"steps of tuning (default: {SETTINGS.name}'s)")
    parser.add_argument(
        "--output-dir", type=Path, default=Path("outputs/demo"), help="folder for the results (%(default)s)"
    )
    parser.add_argument("--picture", type=Path, help="write images, before and after, into one file, too")
    add_on_error(parser)
    options = parser.parse_args(arguments)
    if options.image and not options.categories:
        parser.error('give the words to look for in your image: --categories "cat, grass, sky"')
    return options


def bundled_images() -> dict:
    """Returns sample images of scikit-learn and scikit-image by name, as RGB arrays."""
    import skimage.data
    from sklearn.datasets import load_sample_image

    return {
        "palace": load_sample_image("china.jpg"),
        "flower": load_sample_image("flower.jpg"),
        "cat": skimage.data.chelsea(),
        "coffee": skimage.data.coffee(),
        "motorcycle": skimage.data.stereo_motorcycle()[0],
    }


def compared(pixels: Any, masks: dict[str, Any], names: list[str], width: int | None = None) -> Any:
    """Returns an image and its overlays with the masks, in a row below their titles, each `width` pixels wide."""
    import numpy as np
    from PIL import Image

    from ifseg_hf.visualization.overlays import overlay, side_by_side

    image = Image.fromarray(pixels)
    size = (width, round(image.height * width / image.width)) if width else image.size
    columns = {"image": image.resize(size)}
    for title, mask in masks.items():
        resized = Image.fromarray(np.asarray(mask, np.int32)).resize(size, Image.Resampling.NEAREST)
        columns[title] = overlay(columns["image"], np.asarray(resized), names)
    return side_by_side(list(columns.values()), list(columns))


def read_images(files: list[str], on_error: str) -> tuple[dict, bool]:
    """Returns RGB arrays by the names of the images, and whether an image was named and skipped.

    Raises `ValueError` for an image that cannot be read, unless `on_error` is "skip", and if none can.
    """
    from ifseg_hf.processing.image_reading_ifseg import read_image, to_array

    images, failed = {}, False
    for file, name in zip(files, unique_stems(files), strict=True):
        try:
            images[name] = to_array(read_image(file))
        except (OSError, ValueError) as error:
            if on_error == "fail":
                raise
            print(f"demo.py: {error}", file=sys.stderr)
            failed = True
    if not images:
        raise ValueError("None of the images can be read.")
    return images, failed


def main(arguments: list[str] | None = None) -> int:
    escape_unprintable()
    options = parse_arguments(arguments)

    # Imports that take seconds come after the arguments, so that wrong arguments are reported at once.
    from accelerate import PartialState
    from transformers import logging

    import ifseg_hf
    from ifseg_hf.data.vocabularies import read_categories
    from ifseg_hf.evaluation.segmenter import load_segmenter
    from ifseg_hf.training.config import read_settings
    from ifseg_hf.training.loop import SettingError, TrainingError, train
    from ifseg_hf.training.recipes import training_config
    from ifseg_hf.visualization.overlays import shares, stacked

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    started = time.perf_counter()
    folder = options.output_dir
    try:
        settings = {**read_settings(str(SETTINGS)), "checkpointing_steps": 0, "output_dir": str(folder / "model")}
        if options.steps is not None:
            settings["steps"] = options.steps
        categories = settings["categories"] = read_categories(options.categories or settings["categories"])
        if options.image:
            images, failed = read_images(options.image, options.on_error)
        else:
            images, failed = bundled_images(), False
        print(f"Words: {', '.join(categories)}.\nNo image and no mask is used for tuning, only these words:\n")
        train(training_config(settings))
    except (OSError, ValueError, SettingError, TrainingError) as error:
        print(f"demo.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 1

    names = list(categories)
    segmenters = {}
    for title, model in {"before tuning": ifseg_hf.NANO, "after tuning on words": folder / "model"}.items():
        segmenters[title] = load_segmenter(
            model, device=PartialState().device, seed=None, untuned=model == ifseg_hf.NANO
        )
        segmenters[title].set_words(categories)
    print("\nShare of each image that a word covers, after tuning, and the file that compares before and after:")
    rows = []
    for name, pixels in images.items():
        masks = {title: segmenter.segment([pixels])[0].cpu() for title, segmenter in segmenters.items()}
        compared(pixels, masks, names).save(folder / f"{name}.png")
        after = shares(masks["after tuning on words"], names)
        covered = ", ".join(f"{word} {100 * share:.0f} %" for word, share in after.items())
        print(f"  {name}: {covered}\n    {folder / name}.png")
        if options.image or name in IN_PICTURE:
            rows.append((pixels, masks))
    if options.picture:
        stacked([compared(*row, names, WIDTH) for row in rows]).save(options.picture, quality=88)
        print(f"All in one picture: {options.picture}")
    print(f"\nDone in {time.perf_counter() - started:.0f} s. The tuned model is in {folder / 'model'}.")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
