#!/usr/bin/env python
"""Mean IoU of a model on mosaics of held-out photos and on street photos: before and after tuning on words alone.

python scripts/evaluate_scenes.py --photos ../shared/data/photos --street ../shared/data/camvid

Tuning is as in configs/nano.yaml; for mosaics, which are coarse, with smaller and coarser word maps.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

SETTINGS = Path(__file__).resolve().parent / "configs" / "nano.yaml"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    def integers(text: str) -> list[int]:
        return [int(part) for part in text.split(",") if part.strip()]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ifseg-ofa-nano", help="folder or Hub id (default: the embedded model)")
    parser.add_argument("--photos", default="../shared/data/photos", help="folder of parquet files with photos")
    parser.add_argument("--street", default=None, help="folder of street photos with masks; left out without it")
    parser.add_argument("--words", type=integers, default=[10, 40, 100], help="numbers of words (default: 10,40,100)")
    parser.add_argument("--seeds", type=integers, default=[0, 1, 2], help="seeds of tuning (default: 0,1,2)")
    parser.add_argument("--scenes", type=int, default=500, help="mosaics for each number of words (default: 500)")
    parser.add_argument("--mosaic-size", type=int, default=128, help="short side of mosaics (default: 128, their own)")
    tuning = parser.add_argument_group("tuning for mosaics", f"(the rest is as {SETTINGS.name} says)")
    tuning.add_argument("--image-size", type=int, default=128, help="16 times the side of word maps (default: 128)")
    tuning.add_argument("--max-cells", type=int, default=3, help="most cells of a word map a side (default: 3)")
    parser.add_argument("--ablation", action="store_true", help="vary the tuning, on mosaics of the first of --words")
    parser.add_argument("--cache", default=None, help="folder that keeps the decoded photos (default: a temporary one)")
    parser.add_argument("--output", default=None, help="JSON file for all numbers")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if not list(Path(options.photos).glob("*.parquet")):
        print(f"Skipped: there are no photos in {options.photos}. Give the folder of the parquet files with --photos.")
        return 0
    if options.street and not (Path(options.street) / "dataset.json").is_file():
        print(f"Skipped: there is no dataset.json in {options.street}, the folder of street photos.")
        return 0

    from ifseg_hf import resolve_model
    from ifseg_hf.nano import scene_evaluation, scenes
    from ifseg_hf.training.config import read_settings
    from ifseg_hf.training.loop import TrainingConfig, train

    with tempfile.TemporaryDirectory() as scratch:
        original = resolve_model(options.model)
        small = scene_evaluation.at_size(original, options.image_size, options.mosaic_size, Path(scratch) / "mosaics")
        photos = scenes.load_photos(options.photos, options.cache or scratch)
        photos = photos.part(slice(len(photos) - scenes.HELD_OUT, len(photos)))

        def tune(folder: str | Path, words, seed: int, **settings) -> str:
            output = tempfile.mkdtemp(dir=scratch)
            told = {"categories": words, "output_dir": output, "model": str(folder), "seed": seed}
            train(TrainingConfig(**{**read_settings(str(SETTINGS)), "checkpointing_steps": 0, **settings, **told}))
            return output

        def tune_for_mosaics(folder: str | Path, words, seed: int, **settings) -> str:
            return tune(folder, words, seed, **{"max_cells": options.max_cells, **settings})

        results = (
            ablate(options, small, photos, tune_for_mosaics, scratch)
            if options.ablation
            else compare(options, small, photos, tune_for_mosaics, tune)
        )
    if options.output:
        Path(options.output).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


def compare(options: argparse.Namespace, folder: Path, photos, tune: Callable, tune_for_streets: Callable) -> dict:
    """Before and after tuning, and the cosine baseline: mosaics of each number of words, then street photos."""
    from ifseg_hf.data.segmentation import load_segmentation_dataset
    from ifseg_hf.nano import scene_evaluation, scenes

    results = {}
    for count, words in scene_evaluation.word_lists(photos, options.words).items():
        name = f"{options.scenes} mosaics, {count} words"
        data = scenes.mosaic_data(photos, words, options.scenes, seed=count)
        results[name] = scene_evaluation.evaluate(folder, data, tune, options.seeds)
        print(scene_evaluation.table({name: results[name]}), flush=True)
    if options.street:
        streets = load_segmentation_dataset(options.street, split="val")
        for words in (streets.names, list(scene_evaluation.LARGE_STREET_NAMES)):
            name = f"{len(streets.samples)} street photos, {len(words)} words"
            results[name] = scene_evaluation.evaluate(
                options.model, streets.select(words), tune_for_streets, options.seeds
            )
            print(f"{scene_evaluation.table({name: results[name]})}\n\n{scene_evaluation.word_table(results[name])}")
    print("\n" + scene_evaluation.table(results))
    return results


def ablate(options: argparse.Namespace, folder: Path, photos, tune: Callable, scratch: str) -> dict:
    """The paper's ablations on mosaics, and a hierarchical vocabulary."""
    from ifseg_hf.nano import scene_evaluation, scenes

    count = options.words[0]
    words = scene_evaluation.word_lists(photos, [count])[count]
    data = scenes.mosaic_data(photos, words, options.scenes, seed=count)
    ways = scene_evaluation.variants(options.max_cells, options.image_size // 16)
    results = scene_evaluation.ablate(folder, data, tune, ways, options.seeds, scratch)
    coarse = scene_evaluation.COARSE_NAMES
    fine = [name for names in coarse.values() for name in names]
    data = scenes.mosaic_data(photos, fine, options.scenes, seed=0).select(coarse)
    ways = {
        f"{len(coarse)} coarse words alone": scene_evaluation.Variant(),
        f"the same, with {len(fine)} fine words": scene_evaluation.Variant(words=coarse),
    }
    results |= scene_evaluation.ablate(folder, data, tune, ways, options.seeds, scratch)
    print("\n" + scene_evaluation.ablation_table(results))
    return results


if __name__ == "__main__":
    sys.exit(main())
