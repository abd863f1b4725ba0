"""Segments photos into words: python scripts/segment.py cat.jpg --model tuned --output-dir out

Writes `<photo>_mask.png` (pixel value = index of the word) and `<photo>_overlay.png` (with a legend), and prints how
much of the photo each word covers. Exit code 1 if a photo could not be read, after the others are done.
"""

import argparse
import sys
from pathlib import Path


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Segments photos into words.")
    parser.add_argument("photos", nargs="+", metavar="PHOTO", help="image files")
    parser.add_argument(
        "--model",
        default="ifseg-ofa-nano",
        help="folder or Hub name of a model; the default is the embedded one, which is not tuned for any words",
    )
    parser.add_argument(
        "--categories", help="words with commas between them, or a file of them; default: the model's own"
    )
    parser.add_argument("--prompt", help="the question before the words; default: the model's own")
    parser.add_argument(
        "--smoothing-neighbors", type=int, metavar="K", help="patches averaged, itself included (the model's: 3)"
    )
    parser.add_argument(
        "--smoothing-iterations",
        type=int,
        metavar="N",
        help="times they are averaged; 0 for none (the model's: 25, or 0 after training on photos)",
    )
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"), help="folder for the results (outputs)")
    options = parser.parse_args(arguments)
    if options.smoothing_neighbors is not None and options.smoothing_neighbors < 1:
        parser.error("--smoothing-neighbors must be at least 1")
    if options.smoothing_iterations is not None and options.smoothing_iterations < 0:
        parser.error("--smoothing-iterations must not be negative")
    return options


def unique_stems(photos: list[str]) -> list[str]:
    """Returns a file name without ending for each photo: its own, with a number where several would be the same."""
    stems: list[str] = []
    for photo in photos:
        stem, number = Path(photo).stem, 2
        while stem.lower() in (taken.lower() for taken in stems):
            stem, number = f"{Path(photo).stem}-{number}", number + 1
        stems.append(stem)
    return stems


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)

    # The heavy imports come after the arguments, whose mistakes so show at once.
    from PIL import Image
    from transformers import pipeline
    from transformers.utils.logging import disable_progress_bar

    from ifseg_hf import resolve_model
    from ifseg_hf.data.vocabularies import read_categories
    from ifseg_hf.processing.image_processing_ifseg import read_image, to_array
    from ifseg_hf.visualization.overlays import label_map, overlay, save_mask, shares

    disable_progress_bar()
    try:
        words: dict = {} if options.prompt is None else {"prompt": options.prompt}
        if options.categories is not None:
            words["categories"] = read_categories(options.categories)
        model = str(resolve_model(options.model))
        pipe = pipeline(
            "image-segmentation",
            model=model,
            dtype="float32",
            smoothing_neighbors=options.smoothing_neighbors,
            smoothing_iterations=options.smoothing_iterations,
            **words,
        )
        if options.categories is None and pipe.model.config.category_ids is None:
            raise ValueError(f'{options.model} was not tuned for any words: name some, --categories "cat, grass".')
        options.output_dir.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        print(f"segment.py: {_one_line(error)}", file=sys.stderr)
        return 1

    names = list(words.get("categories") or pipe.model.config.id2label.values())
    failed = 0
    for photo, stem in zip(options.photos, unique_stems(options.photos), strict=True):
        try:
            if "://" not in photo and not Path(photo).is_file():
                raise FileNotFoundError("there is no such file")
            picture = Image.fromarray(to_array(read_image(photo)))
        except (OSError, ValueError) as error:
            message = _one_line(error)
            print(f"segment.py: {message if photo in message else f'{photo}: {message}'}", file=sys.stderr)
            failed = 1
            continue
        mask = label_map(pipe(picture), picture.size, names)
        save_mask(mask, options.output_dir / f"{stem}_mask.png", names)
        overlay(picture, mask, names).save(options.output_dir / f"{stem}_overlay.png")
        covered = ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares(mask, names).items())
        print(f"{photo}: {covered} -> {options.output_dir / stem}_overlay.png")
    return failed


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
