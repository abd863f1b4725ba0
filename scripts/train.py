"""Tunes a model on words alone: `accelerate launch scripts/train.py --categories "cat, coffee" --output-dir OUT`."""

import argparse
import dataclasses
import importlib.util
import runpy
import sys
import typing
from pathlib import Path


def parse_arguments() -> dict:
    """The settings by name, all of them checked: a wrong one ends the program with one line and status 2."""
    # The package as a whole brings torch and transformers along, which takes seconds. These two files need neither, so
    # that a wrong argument is told at once.
    package = Path(importlib.util.find_spec("ifseg_hf").submodule_search_locations[0])
    read_categories = runpy.run_path(str(package / "vocabularies.py"))["read_categories"]
    settings = runpy.run_path(str(package / "recipe.py"))["WordMapTraining"]

    parser = Parser(description=__doc__, usage="%(prog)s --categories WORDS --output-dir FOLDER [settings]")
    for field in dataclasses.fields(settings):
        add_flag(parser, field)
    arguments = parser.parse_args()
    try:
        arguments.categories = read_categories(arguments.categories)
        settings(**vars(arguments)).check()
    except ValueError as error:
        parser.error(str(error))
    return vars(arguments)


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line."""

    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def add_flag(parser: argparse.ArgumentParser, field: dataclasses.Field) -> None:
    """`--learning-rate` for the field `learning_rate`, with its type, default and help."""
    flag = "--" + field.name.replace("_", "-")
    help = field.metadata["help"]
    if field.default is dataclasses.MISSING:
        parser.add_argument(flag, required=True, metavar="TEXT", help=help)
        return
    if field.default is not None:
        help += f" (default: {field.default})"
    if field.type is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default, help=help)
        return
    kind = next((kind for kind in (int, float) if kind in (field.type, *typing.get_args(field.type))), str)
    metavar = "TEXT" if kind is str else "NUMBER"
    parser.add_argument(flag, type=kind, default=field.default, metavar=metavar, help=help)


def main() -> int:
    arguments = parse_arguments()
    try:
        from ifseg_hf.training import SettingError, TrainingError, WordMapTraining, train

        train(WordMapTraining(**arguments))
    except KeyboardInterrupt:
        return 130
    except (SettingError, TrainingError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, SettingError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
