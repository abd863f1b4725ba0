"""Train a segmentation model on category words alone, or on images.

    accelerate launch scripts/train.py --categories "cat, coffee" --output-dir OUT
    accelerate launch scripts/train.py --config scripts/configs/ade20k.yaml
    accelerate launch scripts/train.py --stage supervised --dataset FOLDER --output-dir OUT

To continue an interrupted run, repeat the command with --resume.
"""

import argparse
import dataclasses
import os
import signal
import sys
import typing

from ifseg_hf.data.vocabularies import read_categories
from ifseg_hf.training.config import TrainingConfig, read_settings, setting_types


def parse_arguments(arguments: list[str] | None = None) -> TrainingConfig:
    """Returns the checked settings. A wrong setting ends the program with a message of one line and status 2."""
    parser = Parser(
        description=__doc__,
        usage="%(prog)s [--config FILE] [--categories WORDS] [--dataset DATASET] --output-dir FOLDER [settings]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # a setting without a flag comes from the file or has its default
    )
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON file with any of these settings; flags override")
    for field in dataclasses.fields(TrainingConfig):
        add_flag(parser, field)
    flags = vars(parser.parse_args(arguments))
    try:
        settings = {**(read_settings(flags.pop("config")) if "config" in flags else {}), **flags}
        for field in dataclasses.fields(TrainingConfig):
            if field.default is dataclasses.MISSING and field.name not in settings:
                if type(None) not in setting_types(field):
                    raise ValueError(f"{flag_name(field)} is required, as a flag or in the --config file.")
                settings[field.name] = None
        if settings["categories"] is not None:
            settings["categories"] = read_categories(settings["categories"])
        config = TrainingConfig(**settings)
        config.check()
    except ValueError as error:
        parser.error(str(error))
    if config.push_to_hub and os.environ.get("RANK", "0") == "0":  # one request to the Hub, not one per process
        from ifseg_hf.hub.publish import HubError, check_access

        try:
            check_access(config.push_to_hub)
        except (ValueError, HubError) as error:
            parser.error(str(error))
    return config


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors have one line, without the usage."""

    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def flag_name(field: dataclasses.Field) -> str:
    """`--learning-rate` for the field `learning_rate`."""
    return "--" + field.name.replace("_", "-")


def add_flag(parser: argparse.ArgumentParser, field: dataclasses.Field) -> None:
    """Adds the flag of a setting, with the type, help and default of its field."""
    help, types = field.metadata["help"], setting_types(field)
    if field.default not in (None, dataclasses.MISSING):
        help += f" (default: {field.default})"
    if bool in types:
        parser.add_argument(flag_name(field), action=argparse.BooleanOptionalAction, help=help)
        return
    kind = next((kind for kind in (int, float) if kind in types), str)
    bare = field.metadata["bare_flag"]
    alone = {} if bare is None else {"nargs": "?", "const": bare}
    metavar = "TEXT" if kind is str else "NUMBER"
    parser.add_argument(flag_name(field), type=kind, metavar=metavar, help=help, **alone)


def publish(config: TrainingConfig) -> None:
    """Pushes the trained model to the Hub. Raises `HubError`."""
    from ifseg_hf.hub.publish import push_to_hub

    commit = push_to_hub(
        config.output_dir, config.push_to_hub, config.hub_private, config.hub_revision, config.hub_commit_message
    )
    print(f"Published: {commit.commit_url}")


def main(arguments: list[str] | None = None) -> int:
    config = parse_arguments(arguments)
    try:
        # Imports that take seconds come after the arguments, so that wrong arguments are reported at once.
        from accelerate import PartialState

        from ifseg_hf.hub.checkpoint_reader import ConversionError
        from ifseg_hf.hub.publish import HubError
        from ifseg_hf.hub.published import resolve_checkpoint
        from ifseg_hf.training.loop import SettingError, TrainingError, train

        resolve_checkpoint(config.model)
        train(config)
        if config.push_to_hub and PartialState().is_main_process:
            publish(config)
    except KeyboardInterrupt as error:
        return 128 + getattr(error, "signal_number", signal.SIGINT)
    except (ConversionError, SettingError, TrainingError, HubError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, SettingError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
