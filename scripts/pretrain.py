"""Pre-trains the nano OFA that comes with the package, from images, names and boxes.

    python scripts/pretrain.py --images IMAGES --street CAMVID --output-dir OUT

A run that was stopped resumes when the same command is run again.
"""

import argparse
import sys
from pathlib import Path


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="folder of parquet files: images of 64 x 64 with class names")
    parser.add_argument(
        "--street", default=None, help="folder of street images with masks, from which named boxes are made"
    )
    parser.add_argument(
        "--output-dir", required=True, help="folder for the checkpoint, and for the state of its stages"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the steps of every phase (default: 1)")
    parser.add_argument("--model", default=None, help="an earlier checkpoint of this script to start from")
    parser.add_argument("--workers", type=int, default=2, help="processes that train together (default: 2)")
    options = parser.parse_args(arguments)
    if not list(Path(options.images).glob("*.parquet")):
        parser.error(f"--images: there are no parquet files in {options.images}")
    if options.street and not (Path(options.street) / "dataset.json").is_file():
        parser.error(f"--street: there is no dataset.json in {options.street}")
    if not options.scale > 0 or options.workers < 1:
        parser.error("--scale must be more than 0, and --workers at least 1")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    from ifseg_hf.nano.pretraining import pretrain

    folder = pretrain(options.images, options.street, options.output_dir, options.scale, options.model, options.workers)
    print(f"The checkpoint is in {folder}. The state of its stages, in {folder / 'stages'}, can be deleted.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
