"""The main job on the embedded checkpoint: tunes it on words alone, then segments photos, before and after.

    python scripts/demo.py
    python scripts/demo.py --photo cat.jpg --categories "cat, sofa, wall"

Without --photo, the photos are a palace (scikit-learn), a cat and a cup of coffee (scikit-image).
"""

import argparse
import sys
import time
from pathlib import Path

# How the embedded model is tuned, and words for what there is to see in the bundled photos.
SETTINGS = Path(__file__).resolve().parent / "configs" / "nano.yaml"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Tunes the embedded checkpoint on words, then segments photos.")
    parser.add_argument("--photo", action="append", help="an image file; again for more; default: three bundled ones")
    parser.add_argument("--categories", help=f"words with commas between them, or a file (default: {SETTINGS.name}'s)")
    parser.add_argument("--steps", type=int, help=f"of tuning (default: {SETTINGS.name}'s)")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/demo"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    if options.photo and not options.categories:
        parser.error('name what to look for in your photo: --categories "cat, grass, sky"')
    return options


def bundled_photos() -> dict:
    """Photos by name, RGB arrays, from packages that are installed anyway."""
    import skimage.data
    from sklearn.datasets import load_sample_image

    return {"palace": load_sample_image("china.jpg"), "cat": skimage.data.chelsea(), "coffee": skimage.data.coffee()}


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)

    # The heavy imports come after the arguments, whose mistakes so show at once.
    from PIL import Image
    from transformers import logging

    import ifseg_hf
    from ifseg_hf.data.vocabularies import read_categories
    from ifseg_hf.processing.image_processing_ifseg import read_image, to_array
    from ifseg_hf.training.config import read_settings
    from ifseg_hf.training.loop import SettingError, TrainingConfig, TrainingError, train
    from ifseg_hf.visualization.overlays import label_map, overlay, shares, side_by_side

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    started = time.perf_counter()
    folder = options.output_dir
    try:
        settings = {**read_settings(str(SETTINGS)), "checkpointing_steps": 0, "output_dir": str(folder / "model")}
        if options.steps is not None:
            settings["steps"] = options.steps
        settings["warmup_steps"] = min(settings["warmup_steps"], settings["steps"] // 2)
        categories = settings["categories"] = read_categories(options.categories or settings["categories"])
        if options.photo:
            photos = {Path(photo).stem: Image.fromarray(to_array(read_image(photo))) for photo in options.photo}
        else:
            photos = {name: Image.fromarray(photo) for name, photo in bundled_photos().items()}
        print(f"Words: {', '.join(categories)}.\nNo photo and no mask is used for tuning, only these words:\n")
        train(TrainingConfig(**settings))
    except (OSError, ValueError, SettingError, TrainingError) as error:
        print(f"demo.py: {error}", file=sys.stderr)
        return 1

    processor = ifseg_hf.IFSegProcessor.from_pretrained(ifseg_hf.NANO)
    names = list(categories)
    segmenters = {}
    for title, model in {"before tuning": ifseg_hf.NANO, "after tuning on words": folder / "model"}.items():
        model = ifseg_hf.IFSegForSemanticSegmentation.from_pretrained(model, dtype="float32")
        model.set_words(**processor.encode_categories(categories))
        segmenters[title] = processor.pipeline(model)
    print("\nShare of each photo that a word covers, after tuning, and a picture of it before and after:")
    for name, photo in photos.items():
        pictures, masks = {"photo": photo}, {}
        for title, segmenter in segmenters.items():
            masks[title] = label_map(segmenter(photo), photo.size, names)
            pictures[title] = overlay(photo, masks[title], names)
        side_by_side(list(pictures.values()), list(pictures)).save(folder / f"{name}.png")
        covered = ", ".join(f"{word} {100 * share:.0f} %" for word, share in shares(masks[title], names).items())
        print(f"  {name}: {covered}\n    {folder / name}.png")
    print(f"\nDone in {time.perf_counter() - started:.0f} s. The tuned model is in {folder / 'model'}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
