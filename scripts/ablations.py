"""The paper's ablations on your own images with masks: ways of tuning, and smoothing.

    python scripts/ablations.py DATASET --output-dir OUT
    python scripts/ablations.py VOC --categories "bird, boat, cat" --rest background --only cosine tuned

Writes ablations.md, and a file for each row and seed. A run that was stopped resumes when the same command is run
again. Several runs may share OUT at the same time, each with other rows or seeds.
"""

import argparse
import os
import sys
from pathlib import Path

from ifseg_hf.cli.options import add_on_error
from ifseg_hf.cli.output import escape_unprintable

CONFIG = Path(__file__).resolve().parent / "configs" / "nano.yaml"
NAMES = (
    "cosine",
    "untuned",
    "tuned",
    "max-cells-4",
    "max-cells-8",
    "max-cells-16",
    "max-cells-full",
    "fixed-grid",
    "appendix-prompt",
    "no-unknown",
    "image-positions",
    "segmentation-positions",
    "lora-4",
    "lora-16",
    "lora-64",
    "no-cross-attention",
)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", metavar="DATASET", help="folder with a dataset.json, a benchmark, or a Hub id")
    parser.add_argument("--data-dir", help="folder that coco-stuff or ade20k was unpacked to")
    parser.add_argument("--split", help="split to evaluate on (default: the validation split)")
    parser.add_argument(
        "--categories",
        help="categories to keep, the words of tuning: comma-separated or a file (default: all). Pixels of other "
        "categories are ignored",
    )
    parser.add_argument(
        "--rest", metavar="NAME", help="a category for the pixels of other categories, in place of ignoring them"
    )
    parser.add_argument(
        "--model", default="ifseg-ofa-nano", help="folder or Hub id to start from (default: the embedded model)"
    )
    parser.add_argument(
        "--config", default=os.path.relpath(CONFIG), help="settings of the row tuned (default: %(default)s)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED", help="default: 0 1 2")
    parser.add_argument(
        "--only", nargs="+", choices=NAMES, metavar="NAME", help=f"rows to measure: {', '.join(NAMES)} (default: all)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="evaluate on the first N images only")
    add_on_error(parser)
    parser.add_argument("--keep-models", action="store_true", help="keep the tuned models, in OUT/work")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/ablations"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    if options.rest is not None and options.categories is None:
        parser.error("--rest is for the categories that --categories does not name: give --categories, too")
    if min(options.seeds) < 0 or (options.limit is not None and options.limit < 1):
        parser.error("--seeds must be at least 0, --limit at least 1")
    return options


def main(arguments: list[str] | None = None) -> int:
    escape_unprintable()
    options = parse_arguments(arguments)

    # Imports that take seconds come after the arguments, so that wrong arguments are reported at once.
    from ifseg_hf.data.segmentation import load_segmentation_dataset
    from ifseg_hf.data.vocabularies import read_categories
    from ifseg_hf.experiments.ablations import Ablations
    from ifseg_hf.training.config import read_settings
    from ifseg_hf.training.loop import TrainingError
    from ifseg_hf.training.recipes import complete_settings

    out = options.output_dir
    try:
        data = load_segmentation_dataset(options.dataset, options.data_dir, options.split)
        if options.categories is not None:
            data = data.select(read_categories(options.categories), options.rest)
        source = options.dataset if options.split is None else f"{options.dataset}, split {options.split}"
        settings = complete_settings({**read_settings(options.config), "model": options.model})
        ablations = Ablations(
            source, data, options.model, settings, out, options.limit, options.keep_models, options.on_error
        )
        report = ablations.run(ablations.check(options.only), options.seeds)
        print(f"\n{report}\nWritten to {out / 'ablations.md'}.")
    except (OSError, TrainingError, ValueError) as error:
        print(f"ablations.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped. The same command resumes.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
