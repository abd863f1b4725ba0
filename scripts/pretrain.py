#!/usr/bin/env python
"""Pre-train the nano OFA that comes with the package, from photos, names and boxes.

    python scripts/pretrain.py --photos ../shared/data/photos --street ../shared/data/camvid --output-dir OUT

Stopped and started again with the same arguments, it goes on where it was.
"""

import argparse
import sys
from pathlib import Path


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", required=True, help="folder of parquet files: photos of 64 x 64 with class names")
    parser.add_argument("--street", default=None, help="folder of street photos with masks, which choose named boxes")
    parser.add_argument("--output-dir", required=True, help="folder for the checkpoint and the stages before it")
    parser.add_argument("--scale", type=float, default=1.0, help="steps of every phase, as part of the recipe's")
    parser.add_argument("--model", default=None, help="an earlier checkpoint of this script, to go on from")
    parser.add_argument("--workers", type=int, default=2, help="processes that train together (default: 2)")
    options = parser.parse_args(arguments)
    if not list(Path(options.photos).glob("*.parquet")):
        parser.error(f"there are no parquet files in {options.photos}")
    if options.street and not (Path(options.street) / "dataset.json").is_file():
        parser.error(f"there is no dataset.json in {options.street}")
    if not options.scale > 0 or options.workers < 1:
        parser.error("--scale and --workers must be more than 0")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    from ifseg_hf.nano.pretraining import pretrain

    folder = pretrain(options.photos, options.street, options.output_dir, options.scale, options.model, options.workers)
    print(f"The checkpoint is in {folder}; its stages, no longer needed, in {folder / 'stages'}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
