"""Tunes a model on words alone or, where there are some, on photos.

    accelerate launch scripts/train.py --categories "cat, coffee" --output-dir OUT
    accelerate launch scripts/train.py --config scripts/configs/ade20k.yaml
    accelerate launch scripts/train.py --stage supervised --dataset FOLDER --output-dir OUT

A run that was stopped, or lost its machine, goes on when it is started again with --resume.
"""

import argparse
import dataclasses
import os
import signal
import sys
import typing

from ifseg_hf.data.vocabularies import read_categories
from ifseg_hf.training.config import TrainingConfig, read_settings


def parse_arguments() -> dict:
    """The settings by name, all of them checked: a wrong one ends the program with one line and status 2."""
    parser = Parser(
        description=__doc__,
        usage="%(prog)s [--config FILE] [--categories WORDS] [--dataset DATA] --output-dir FOLDER [settings]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # what is not given is left to the file, then to the recipe
    )
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON with any of these settings; flags go before it")
    for field in dataclasses.fields(TrainingConfig):
        add_flag(parser, field)
    given = vars(parser.parse_args())
    try:
        settings = {**(read_settings(given.pop("config")) if "config" in given else {}), **given}
        for name in ("categories", "output_dir"):
            if name not in settings and (name != "categories" or settings.get("dataset") is None):
                raise ValueError(f"--{name.replace('_', '-')} is needed, here or in a file for --config.")
        given_categories = settings.setdefault("categories", None)
        settings["categories"] = None if given_categories is None else read_categories(given_categories)
        TrainingConfig(**settings).check()
    except ValueError as error:
        parser.error(str(error))
    if settings.get("push_to_hub") and os.environ.get("RANK", "0") == "0":  # one question to the Hub, not one a process
        from ifseg_hf.hub.publish import HubError, check_access

        try:
            check_access(settings["push_to_hub"])
        except (ValueError, HubError) as error:
            parser.error(str(error))
    return settings


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line."""

    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def add_flag(parser: argparse.ArgumentParser, field: dataclasses.Field) -> None:
    """`--learning-rate` for the field `learning_rate`, with its type and help."""
    flag = "--" + field.name.replace("_", "-")
    help = field.metadata["help"]
    if field.name == "resume":  # alone, the latest
        parser.add_argument(flag, nargs="?", const="latest", metavar="FOLDER", help=help)
        return
    if field.default not in (None, dataclasses.MISSING):
        help += f" (default: {field.default})"
    if bool in (field.type, *typing.get_args(field.type)):
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=help)
        return
    kind = next((kind for kind in (int, float) if kind in (field.type, *typing.get_args(field.type))), str)
    parser.add_argument(flag, type=kind, metavar="TEXT" if kind is str else "NUMBER", help=help)


def main() -> int:
    settings = parse_arguments()
    try:
        from ifseg_hf.hub.publish import HubError
        from ifseg_hf.training.loop import SettingError, TrainingError, train

        train(TrainingConfig(**settings))
    except KeyboardInterrupt as error:
        return 128 + getattr(error, "signal_number", signal.SIGINT)
    except (SettingError, TrainingError, HubError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, SettingError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
