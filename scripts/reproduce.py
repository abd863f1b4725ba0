"""Tunes and evaluates the models of a table of the paper, and prints the paper's numbers beside ours.

    python scripts/reproduce.py --day-one --data COCO
    python scripts/reproduce.py --table 12 --data DATA --dry-run

DATA holds COCO-Stuff and ADE20K in their published layouts. A run that was stopped resumes when the same command is run
again. --day-one downloads OFA-base, tunes it on 15 words, evaluates Table 1 on COCO's val2017, and writes report.md.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from ifseg_hf.cli.options import add_on_error
from ifseg_hf.cli.output import escape_unprintable

SCRIPTS = Path(__file__).resolve().parent
TABLES = (*map(str, range(1, 15)), "appendix-b", "external-words")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--table", choices=TABLES, metavar="TABLE", help=f"table in the paper: {', '.join(TABLES)}")
    what.add_argument("--day-one", action="store_true", help="Table 1 from the published OFA-base, and a report")
    parser.add_argument("--model", default="OFA-Sys/ofa-base", help="OFA: folder or Hub id (default: %(default)s)")
    parser.add_argument("--data", required=True, type=Path, help="folder with COCO-Stuff, ADE20K, or both")
    parser.add_argument(
        "--clip",
        help="CLIP of the baselines: folder or Hub id (default: the paper's ViT-B/16 and ViT-B/32 in Tables 13 and 14; "
        "elsewhere the baselines are quoted)",
    )
    parser.add_argument("--clipcap", help="ClipCap of Table 14: folder from scripts/convert_clipcap.py")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/reproduction"), help="default: %(default)s")
    parser.add_argument("--steps", type=int, help="steps of every training run, for a trial (default: the paper's)")
    parser.add_argument("--limit", type=int, help="number of images to evaluate on, for a trial (default: all)")
    add_on_error(parser)
    parser.add_argument("--dry-run", action="store_true", help="only print the commands")
    options = parser.parse_args(arguments)
    if min(options.steps or 1, options.limit or 1) < 1:
        parser.error("--steps and --limit must be at least 1")
    options.table = options.table or "1"
    return options


def main(arguments: list[str] | None = None, run: Callable[[list[str]], None] | None = None) -> int:
    """Reproduces a table. `run`: runs a script, given its name and arguments; by default with `accelerate launch`."""
    escape_unprintable()
    options = parse_arguments(arguments)
    from ifseg_hf.experiments import reproduction
    from ifseg_hf.experiments.plan import ACCELERATE, run_plan, run_script

    run = run or (lambda command: run_script(command, SCRIPTS, ACCELERATE))
    settings = reproduction.TableSettings(
        table=options.table,
        ofa=options.model,
        data=options.data,
        out=options.output_dir,
        configs=Path(os.path.relpath(SCRIPTS / "configs")),
        clip=options.clip,
        clipcap=options.clipcap,
        steps=options.steps,
        limit=options.limit,
        on_error=options.on_error,
    )
    try:
        if not options.dry_run:
            settings.check()
        run_plan(reproduction.table_steps(settings), run, ACCELERATE, options.dry_run)
        if options.dry_run:
            return 0
        rows = reproduction.table_results(settings)
    except (OSError, RuntimeError, ValueError) as error:
        resume = ". Run the same command again to resume." if isinstance(error, RuntimeError) else ""
        print(f"reproduce.py: {' '.join(str(error).split())}{resume}", file=sys.stderr)
        return 1
    text = reproduction.comparison_table(options.table, rows)
    if options.steps or options.limit:
        text += f"\nA trial: steps {options.steps or 'as in the paper'}, images {options.limit or 'all'}.\n"
    file = options.output_dir / f"table-{options.table}"
    file.with_suffix(".md").write_text(text, encoding="utf-8")
    file.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if options.day_one:
        (options.output_dir / "report.md").write_text(reproduction.report(settings, text), encoding="utf-8")
    report = f", and the report to {options.output_dir / 'report.md'}" if options.day_one else ""
    print(f"\n{text}\nWritten to {file}.md and .json{report}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
