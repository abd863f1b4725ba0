"""Segments images into words: python scripts/segment.py cat.jpg --model tuned --output-dir out

Writes `<image>_mask.png` (pixel value = index of the word) and `<image>_overlay.png` (with a legend), and prints the
share of the image that each word covers. The exit code is 1 if an image could not be read; it does not stop the others.
"""

import argparse
import sys
from pathlib import Path


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Segments images into words.")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument(
        "--model",
        default="ifseg-ofa-nano",
        help="folder or Hub id of a model (default: the embedded model, which is not tuned on words)",
    )
    parser.add_argument("--categories", help="comma-separated words, or a file of words (default: the model's own)")
    parser.add_argument(
        "--prompt", help="question before the words, or a template with {categories} (default: the model's own)"
    )
    parser.add_argument(
        "--smoothing-neighbors",
        type=int,
        metavar="K",
        help="number of patches to average, the patch itself included (default: the model's, 3)",
    )
    parser.add_argument(
        "--smoothing-iterations",
        type=int,
        metavar="N",
        help="how often to average; 0: no smoothing (default: the model's, 25, or 0 if trained on images)",
    )
    parser.add_argument("--crf", action="store_true", help="fit the masks to the colours of the images (DenseCRF)")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the code saved with a model of another backbone"
    )
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"), help="folder for the results (outputs)")
    options = parser.parse_args(arguments)
    if options.smoothing_neighbors is not None and options.smoothing_neighbors < 1:
        parser.error("--smoothing-neighbors must be at least 1")
    if options.smoothing_iterations is not None and options.smoothing_iterations < 0:
        parser.error("--smoothing-iterations must not be negative")
    return options


def unique_stems(images: list[str]) -> list[str]:
    """Returns the stem of each image's file name, with a number appended where it would repeat an earlier one."""
    stems: list[str] = []
    for image in images:
        stem, number = Path(image).stem, 2
        while stem.lower() in (taken.lower() for taken in stems):
            stem, number = f"{Path(image).stem}-{number}", number + 1
        stems.append(stem)
    return stems


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)

    # Imports that take seconds come after the arguments, so that wrong arguments are reported at once.
    from accelerate import PartialState
    from PIL import Image
    from transformers.utils.logging import disable_progress_bar

    from ifseg_hf.data.vocabularies import read_categories
    from ifseg_hf.evaluation.segmenter import load_segmenter
    from ifseg_hf.processing.image_processing_ifseg import read_image, to_array
    from ifseg_hf.visualization.overlays import overlay, save_mask, shares

    disable_progress_bar()
    try:
        categories = None if options.categories is None else read_categories(options.categories)
        segmenter = load_segmenter(
            options.model, device=PartialState().device, trust_remote_code=options.trust_remote_code
        )
        if categories is None and segmenter.model.config.category_ids is None:
            raise ValueError(f'{options.model} was not tuned for any words: name some, --categories "cat, grass".')
        if categories is not None or options.prompt is not None:
            segmenter.set_words(categories, options.prompt)
        options.output_dir.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        print(f"segment.py: {_one_line(error)}", file=sys.stderr)
        return 1

    names = list(segmenter.model.config.id2label.values())
    failed = 0
    for source, stem in zip(options.images, unique_stems(options.images), strict=True):
        try:
            if "://" not in source and not Path(source).is_file():
                raise FileNotFoundError("there is no such file")
            pixels = to_array(read_image(source))
        except (OSError, ValueError) as error:
            message = _one_line(error)
            print(f"segment.py: {message if source in message else f'{source}: {message}'}", file=sys.stderr)
            failed = 1
            continue
        smoothing = options.smoothing_neighbors, options.smoothing_iterations
        (mask,) = segmenter.segment([pixels], *smoothing, crf=options.crf)
        image, mask = Image.fromarray(pixels), mask.cpu()
        save_mask(mask, options.output_dir / f"{stem}_mask.png", names)
        overlay(image, mask, names).save(options.output_dir / f"{stem}_overlay.png")
        covered = ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares(mask, names).items())
        print(f"{source}: {covered} -> {options.output_dir / stem}_overlay.png")
    return failed


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
