"""Mean IoU of a model before and after tuning on words alone, on mosaics of held-out images and on street images.

    python scripts/evaluate_scenes.py --images IMAGES --street CAMVID

The settings of the tuning are those of configs/nano.yaml; for mosaics, word maps are smaller and have fewer cells.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

SETTINGS = Path(__file__).resolve().parent / "configs" / "nano.yaml"


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part.strip()]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ifseg-ofa-nano", help="folder or Hub id (default: the embedded model)")
    parser.add_argument("--images", required=True, help="folder of parquet files with named images")
    parser.add_argument("--street", default=None, help="folder of street images with masks (default: none)")
    parser.add_argument("--words", type=integers, default=[10, 40, 100], help="numbers of words (default: 10,40,100)")
    parser.add_argument("--seeds", type=integers, default=[0, 1, 2], help="seeds of tuning (default: 0,1,2)")
    parser.add_argument("--scenes", type=int, default=500, help="mosaics for each number of words (default: 500)")
    parser.add_argument(
        "--mosaic-size", type=int, default=128, help="short side of mosaics (default: 128, not resized)"
    )
    tuning = parser.add_argument_group("tuning for mosaics", f"(other settings: {SETTINGS.name})")
    tuning.add_argument("--image-size", type=int, default=128, help="16 times the side of word maps (default: 128)")
    tuning.add_argument("--max-cells", type=int, default=3, help="largest side of the random grids (default: 3)")
    parser.add_argument("--ablation", action="store_true", help="vary the tuning, on mosaics of the first of --words")
    parser.add_argument("--cache", default=None, help="folder that keeps the decoded images (default: a temporary one)")
    parser.add_argument("--output", default=None, help="JSON file for all numbers")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if not list(Path(options.images).glob("*.parquet")):
        print(f"Skipped: there are no parquet files in {options.images}. Give the folder of images with --images.")
        return 0
    if options.street and not (Path(options.street) / "dataset.json").is_file():
        print(f"Skipped: there is no dataset.json in {options.street}, the folder of street images.")
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        results = evaluate(options, scratch)
    if options.output:
        Path(options.output).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


def evaluate(options: argparse.Namespace, scratch: str) -> dict:
    """Returns the results as JSON values, and prints their tables. `scratch`: folder for tuned models."""
    from ifseg_hf import resolve_model
    from ifseg_hf.data.segmentation import load_segmentation_dataset
    from ifseg_hf.nano import scene_evaluation, scenes
    from ifseg_hf.training.config import read_settings
    from ifseg_hf.training.loop import TrainingConfig, train

    def tune(folder: str | Path, words, seed: int, **settings) -> str:
        output = tempfile.mkdtemp(dir=scratch)
        given = {"categories": words, "output_dir": output, "model": str(folder), "seed": seed}
        train(TrainingConfig(**{**read_settings(str(SETTINGS)), "checkpointing_steps": 0, **settings, **given}))
        return output

    def tune_for_mosaics(folder: str | Path, words, seed: int, **settings) -> str:
        return tune(folder, words, seed, **{"max_cells": options.max_cells, **settings})

    original = resolve_model(options.model)
    small = scene_evaluation.at_size(original, options.image_size, options.mosaic_size, Path(scratch) / "mosaics")
    images = scenes.load_named_images(options.images, options.cache or scratch)
    images = images.part(slice(len(images) - scenes.HELD_OUT, len(images)))
    if options.ablation:
        count = options.words[0]
        words = scene_evaluation.word_lists(images, [count])[count]
        tunings = scene_evaluation.variants(options.max_cells, options.image_size // 16)
        results = scene_evaluation.run_ablations(
            small, images, words, options.scenes, tune_for_mosaics, tunings, options.seeds, scratch
        )
        print("\n" + scene_evaluation.ablation_table(results))
        return results
    results = scene_evaluation.compare_on_mosaics(
        small, images, options.words, options.scenes, tune_for_mosaics, options.seeds
    )
    if options.street:
        streets = load_segmentation_dataset(options.street, split="val")
        results |= scene_evaluation.compare_on_streets(options.model, streets, tune, options.seeds)
    print("\n" + scene_evaluation.scene_table(results))
    return results


if __name__ == "__main__":
    sys.exit(main())
