"""Plots loss and mean IoU of training runs over their steps.

    python scripts/plot_runs.py RUN [RUN ...] --labels checkpoint checkpoint scratch --level "image-free: 39.8"

    python scripts/plot_runs.py RUN [RUN ...] --report REPORTS

Runs with the same label, such as several seeds, share one line: their mean, with a band from the lowest to the highest.
With --report, one web page for each run is written instead: curves, settings, time and memory.
"""

import argparse
import sys
from pathlib import Path

from ifseg_hf.cli.output import escape_unprintable


def level(text: str) -> tuple[str, float]:
    """Name and mean IoU of `name: per cent`."""
    name, _, number = text.rpartition(":")
    if not name.strip():
        raise ValueError
    return name.strip(), float(number)


level.__name__ = '"name: per cent"'  # argparse names the type in its error message


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folder of a run of train.py")
    parser.add_argument("--labels", nargs="+", metavar="LABEL", help="one for each run (default: the folders' names)")
    parser.add_argument(
        "--level", action="append", type=level, default=[], help='a horizontal line, "name: mean IoU in per cent"'
    )
    parser.add_argument("--output", default="curves.png", help="image file (default: %(default)s)")
    parser.add_argument(
        "--report", metavar="DIR", help="folder for a web page RUN.html of each run, in place of --output"
    )
    options = parser.parse_args(arguments)
    options.labels = options.labels or [Path(run).name for run in options.runs]
    if len(options.labels) != len(options.runs):
        parser.error(f"--labels: {len(options.labels)} for {len(options.runs)} runs")
    return options


def main(arguments: list[str] | None = None) -> int:
    escape_unprintable()
    options = parse_arguments(arguments)
    if options.report is not None:
        return write_reports(options.runs, options.report)
    from ifseg_hf.training.log import read_log
    from ifseg_hf.visualization.curves import draw_curves

    runs: dict[str, list[str]] = {}
    for run, label in zip(options.runs, options.labels, strict=True):
        runs.setdefault(label, []).append(run)
    try:
        logs = {label: [read_log(run) for run in of_label] for label, of_label in runs.items()}
        draw_curves(logs, options.output, dict(options.level))
    except ImportError:
        print('plot_runs.py needs matplotlib: pip install "ifseg-hf[plot]"', file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:
        print(f"plot_runs.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(f"Written to {options.output}.")
    return 0


def write_reports(runs: list[str], folder: str) -> int:
    """Writes a web page of each run and returns the exit status."""
    from ifseg_hf.training.html_report import write_training_report

    try:
        for run in runs:
            print(f"Report: {write_training_report(run, folder)}")
    except (OSError, ValueError) as error:
        print(f"plot_runs.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
