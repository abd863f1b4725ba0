"""Tunes and evaluates the models of a table of the paper, and prints the paper's numbers beside ours.

    python scripts/reproduce.py --table 1 --model ofa-base --data DATA
    python scripts/reproduce.py --table 12 --model ofa-base --data DATA --dry-run

DATA holds COCO-Stuff and ADE20K in their published layouts. A run that was stopped resumes when the same command is run
again.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from ifseg_hf.cli.output import escape_unprintable

SCRIPTS = Path(__file__).resolve().parent


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = [*map(str, range(1, 13)), "external-words"]
    parser.add_argument("--table", required=True, choices=tables, help="number of the table in the paper")
    parser.add_argument("--model", required=True, help="OFA: folder (from scripts/convert_ofa.py) or Hub id")
    parser.add_argument("--data", required=True, type=Path, help="folder with COCO-Stuff, ADE20K, or both")
    parser.add_argument("--clip", default="openai/clip-vit-base-patch16", help="CLIP (default: %(default)s)")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/reproduction"), help="default: %(default)s")
    parser.add_argument("--steps", type=int, help="steps of every training run, for a trial (default: the paper's)")
    parser.add_argument("--limit", type=int, help="number of images to evaluate on, for a trial (default: all)")
    parser.add_argument("--dry-run", action="store_true", help="only print the commands")
    options = parser.parse_args(arguments)
    if min(options.steps or 1, options.limit or 1) < 1:
        parser.error("--steps and --limit must be at least 1")
    return options


def main(arguments: list[str] | None = None, run: Callable[[list[str]], None] | None = None) -> int:
    """Reproduces a table. `run`: runs a script, given its name and arguments; by default with `accelerate launch`."""
    escape_unprintable()
    options = parse_arguments(arguments)
    from ifseg_hf.experiments.paper_tables import TableSettings, comparison_table, table_results, table_steps
    from ifseg_hf.experiments.plan import ACCELERATE, run_plan, run_script

    run = run or (lambda command: run_script(command, SCRIPTS, ACCELERATE))
    settings = TableSettings(
        options.model, options.data, options.output_dir, options.clip, options.steps, options.limit
    )
    if not options.dry_run and not options.data.is_dir():
        print(f'reproduce.py: there is no folder "{options.data}".', file=sys.stderr)
        return 1
    try:
        run_plan(table_steps(options.table, settings), run, ACCELERATE, options.dry_run)
        if options.dry_run:
            return 0
        rows = table_results(options.table, settings)
    except (OSError, RuntimeError) as error:
        print(f"reproduce.py: {error}. Run the same command again to resume.", file=sys.stderr)
        return 1
    text = comparison_table(options.table, rows)
    if options.steps or options.limit:
        text += f"\nA trial: steps {options.steps or 'as in the paper'}, images {options.limit or 'all'}.\n"
    file = options.output_dir / f"table-{options.table}"
    file.with_suffix(".md").write_text(text, encoding="utf-8")
    file.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(f"\n{text}\nWritten to {file}.md and .json.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
