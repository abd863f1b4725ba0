"""A table of the paper: tunes what it needs, evaluates it, prints the paper's numbers, ours and the difference.

    python scripts/reproduce.py --table 1 --model ofa-base --data DATA
    python scripts/reproduce.py --table 12 --model ofa-base --data DATA --dry-run

DATA holds COCO-Stuff and ADE20K as they are distributed. Stopped and started again, it goes on where it was.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = [*map(str, range(1, 13)), "external-words"]
    parser.add_argument("--table", required=True, choices=tables, help="of the paper")
    parser.add_argument("--model", required=True, help="OFA: folder (scripts/convert_ofa.py makes it) or Hub id")
    parser.add_argument("--data", required=True, type=Path, help="folder with COCO-Stuff, ADE20K, or both")
    parser.add_argument("--clip", default="openai/clip-vit-base-patch16", help="CLIP (default: %(default)s)")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/reproduction"), help="default: %(default)s")
    parser.add_argument("--steps", type=int, help="of every training, for a trial (default: the paper's)")
    parser.add_argument("--limit", type=int, help="photos to evaluate on, for a trial (default: all)")
    parser.add_argument("--dry-run", action="store_true", help="only print the commands")
    options = parser.parse_args(arguments)
    if min(options.steps or 1, options.limit or 1) < 1:
        parser.error("--steps and --limit must be at least 1")
    return options


def launch(command: list[str]) -> None:
    """Runs a script of this folder as `accelerate launch` does."""
    script = Path(__file__).resolve().parent / command[0]
    done = subprocess.run([sys.executable, "-m", "accelerate.commands.launch", str(script), *command[1:]])
    if done.returncode:
        raise RuntimeError(f"{command[0]} ended with status {done.returncode}")


def main(arguments: list[str] | None = None, run: Callable[[list[str]], None] = launch) -> int:
    options = parse_arguments(arguments)
    from ifseg_hf.experiments.paper_tables import Reproduction, markdown, reproduce, shell

    reproduction = Reproduction(
        options.model, options.data, options.output_dir, options.clip, options.steps, options.limit
    )
    if options.dry_run:
        print("\n".join(map(shell, reproduction.plan(options.table))))
        return 0
    if not options.data.is_dir():
        print(f'reproduce.py: there is no folder "{options.data}".', file=sys.stderr)
        return 1

    def told(command: list[str]) -> None:
        print(f"\n{shell(command)}", flush=True)
        run(command)

    try:
        results = reproduce(reproduction, options.table, told)
    except (OSError, RuntimeError) as error:
        print(f"reproduce.py: {error}. The same command goes on from here.", file=sys.stderr)
        return 1
    text = markdown(options.table, results)
    if options.steps or options.limit:
        text += f"\nA trial: steps {options.steps or 'as in the paper'}, photos {options.limit or 'all'}.\n"
    file = options.output_dir / f"table-{options.table}"
    file.with_suffix(".md").write_text(text, encoding="utf-8")
    file.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"\n{text}\nWritten to {file}.md and .json.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
