"""Trains with and without images, and evaluates every row of the table in scripts/README.md on your own dataset.

    python scripts/experiments.py DATASET --unseen "tree, car, sign" --output-dir OUT
    python scripts/experiments.py DATASET --unseen "tree, car, sign" --output-dir OUT --only supervised --dry-run

DATASET is a folder with dataset.json, train/ and val/. A run that was stopped resumes when the same command is run
again. Several runs may share OUT at the same time, each with other seeds. Writes experiments.md and curves.png.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from ifseg_hf.cli.options import add_on_error
from ifseg_hf.cli.output import escape_unprintable

SCRIPTS = Path(__file__).resolve().parent
NAMES = ("image-free", "self-training", "supervised", "from-scratch", "seen-only", "seen-and-unseen")


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", metavar="DATASET", help="folder with dataset.json, train/ and val/")
    parser.add_argument("--unseen", required=True, help="comma-separated categories whose masks some rows do not use")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/experiments"), help="default: %(default)s")
    parser.add_argument(
        "--model", default="ifseg-ofa-nano", help="folder or Hub id to start from (default: the embedded model)"
    )
    parser.add_argument("--seeds", type=integers, default=[0, 1, 2], help="comma-separated (default: 0,1,2)")
    parser.add_argument(
        "--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=f"rows to run: {', '.join(NAMES)}"
    )
    parser.add_argument("--steps", type=int, default=600, help="steps of each run on images (default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=int, default=8, help="batch size of each run on images (default: %(default)s)"
    )
    add_on_error(parser)
    parser.add_argument("--dry-run", action="store_true", help="only print the commands")
    options = parser.parse_args(arguments)
    if min(options.steps, options.batch_size) < 1 or min(options.seeds) < 0:
        parser.error("--steps and --batch-size must be at least 1, --seeds at least 0")
    return options


def main(arguments: list[str] | None = None, run: Callable[[list[str]], None] | None = None) -> int:
    """Runs the experiments. `run`: runs a script, given its name and arguments; by default in a new process."""
    escape_unprintable()
    options = parse_arguments(arguments)
    from ifseg_hf.experiments.image_experiments import ImageExperiments, draw_experiments, read_results, seeds_table
    from ifseg_hf.experiments.plan import run_plan, run_script, write_text

    run = run or (lambda command: run_script(command, SCRIPTS))
    out, configs = options.output_dir, Path(os.path.relpath(SCRIPTS / "configs"))
    experiments = ImageExperiments(
        options.dataset,
        options.unseen,
        out,
        configs,
        options.model,
        options.steps,
        options.batch_size,
        options.on_error,
    )
    try:
        experiments.check()
        if not options.dry_run:
            experiments.save_settings()
        run_plan(experiments.steps_of(options.only, options.seeds), run, dry_run=options.dry_run)
        if options.dry_run:
            return 0
        results = read_results(out)
        table = seeds_table(results)
        write_text(out / "experiments.md", table)
        print(f"\nIn per cent, with the standard deviation over seeds:\n\n{table}")
        print(f"Written to {out / 'experiments.md'}.")
        draw_experiments(out, results)
    except ImportError:
        print('There is no curves.png: it needs matplotlib, pip install "ifseg-hf[plot]".')
    except (OSError, RuntimeError, ValueError) as error:
        resume = ". Run the same command again to resume." if isinstance(error, RuntimeError) else ""
        print(f"experiments.py: {' '.join(str(error).split())}{resume}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
