"""What photos add to words alone: trains and evaluates every row of the README's table on a data set of one's own.

    python scripts/experiments.py DATASET --unseen "tree, car, sign" --output-dir OUT
    python scripts/experiments.py DATASET --unseen "tree, car, sign" --output-dir OUT --only supervised --dry-run

DATASET is a folder with dataset.json, train/ and val/. Stopped and started again, it goes on where it was; started
twice with different seeds, the two share OUT. At the end it writes experiments.md and curves.png.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

NAMES = ("image-free", "self-training", "supervised", "from-scratch", "seen-only", "seen-and-unseen")

SCRIPTS = Path(__file__).resolve().parent


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", metavar="DATASET", help="photos with masks")
    parser.add_argument("--unseen", required=True, help="categories that some rows see no mask of, with commas")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/experiments"), help="default: %(default)s")
    parser.add_argument("--model", default="ifseg-ofa-nano", help="to start from (default: the embedded model)")
    parser.add_argument("--seeds", type=integers, default=[0, 1, 2], help="with commas (default: 0,1,2)")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--steps", type=int, default=600, help="of each run on photos (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="of each run on photos (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="only print the commands")
    options = parser.parse_args(arguments)
    if min(options.steps, options.batch_size) < 1 or min(options.seeds) < 0:
        parser.error("--steps and --batch-size must be at least 1, --seeds at least 0")
    return options


def launch(command: list[str]) -> None:
    """Runs a script of this folder."""
    done = subprocess.run([sys.executable, str(SCRIPTS / command[0]), *command[1:]])
    if done.returncode:
        raise RuntimeError(f"{command[0]} ended with status {done.returncode}")


def main(arguments: list[str] | None = None, run: Callable[[list[str]], None] = launch) -> int:
    options = parse_arguments(arguments)
    from ifseg_hf.experiments.image_experiments import (
        Experiments,
        draw,
        markdown,
        results,
        run_experiments,
        shell,
        write,
    )

    out, configs = options.output_dir, Path(os.path.relpath(SCRIPTS / "configs"))
    experiments = Experiments(
        options.dataset, options.unseen, out, configs, options.model, options.steps, options.batch_size
    )

    def told(command: list[str]) -> None:
        print(f"\n{shell(command)}", flush=True)
        run(command)

    try:
        experiments.check()
        if options.dry_run:
            print("\n".join(map(shell, experiments.plan(options.only, options.seeds))))
            return 0
        experiments.begin()
        run_experiments(experiments, options.only, options.seeds, told)
        found = results(out)
        text = markdown(found)
        write(out / "experiments.md", text)
        print(f"\nIn per cent, with the standard deviation over seeds:\n\n{text}\nWritten to {out / 'experiments.md'}.")
        draw(out, found)
    except ImportError:
        print('There is no curves.png: it needs matplotlib, pip install "ifseg-hf[plot]".')
    except (OSError, RuntimeError, ValueError) as error:
        more = ". The same command goes on from here." if isinstance(error, RuntimeError) else ""
        print(f"experiments.py: {' '.join(str(error).split())}{more}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
