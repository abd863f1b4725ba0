"""`ifseg tune`: training, whose options are the settings of [`TrainingConfig`]."""

import dataclasses
import inspect
import os
import signal
from contextlib import suppress
from typing import Annotated, Any

import typer

from ifseg_hf.cli.app import Command, CommandError
from ifseg_hf.cli.options import option
from ifseg_hf.pretrained import EMBEDDED
from ifseg_hf.training.config import TrainingConfig, read_settings
from ifseg_hf.training.recipes import training_config
from ifseg_hf.training.settings import setting_types

__all__ = ["TuneCommand", "tune"]

FIELDS = dataclasses.fields(TrainingConfig)


def flag_name(name: str) -> str:
    """`--learning-rate` for the setting `learning_rate`."""
    return "--" + name.replace("_", "-")


BARE_FLAGS = {
    flag_name(field.name): field.metadata["bare_flag"] for field in FIELDS if field.metadata["bare_flag"] is not None
}


class TuneCommand(Command):
    """The command, with values for the flags that may stand alone, such as --resume."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        complete: list[str] = []
        for position, argument in enumerate(args):
            complete.append(argument)
            if argument in BARE_FLAGS and (position + 1 == len(args) or args[position + 1].startswith("-")):
                complete.append(BARE_FLAGS[argument])
        return super().parse_args(ctx, complete)


def tune(words: str | None, config: str | None, **flags: Any) -> int:
    """Tunes a model on category words alone, or trains it on images.

    \b
    ifseg tune "cat, coffee" --output-dir OUT
    ifseg tune --config scripts/configs/ade20k.yaml
    ifseg tune --stage supervised --dataset FOLDER --output-dir OUT
    accelerate launch -m ifseg_hf tune "cat, coffee" --output-dir OUT

    Settings that are not given are those of the model's recipe. To continue an interrupted run, repeat the command with
    --resume.
    """
    settings = parse_settings(words, config, flags)
    try:
        # Imports that take seconds come after the arguments, so that wrong arguments are reported at once.
        from accelerate import PartialState

        from ifseg_hf.hub.publish import HubError
        from ifseg_hf.training.loop import SettingError, TrainingError, train

        train(settings)
        if settings.card_image and PartialState().is_main_process:
            draw_picture(settings)
        if settings.push_to_hub and PartialState().is_main_process:
            publish(settings)
    except KeyboardInterrupt as error:
        return 128 + getattr(error, "signal_number", signal.SIGINT)
    except SettingError as error:
        raise CommandError(error, 2) from error
    except (TrainingError, HubError) as error:
        raise CommandError(error) from error
    return 0


def parse_settings(words: str | None, config: str | None, flags: dict[str, Any]) -> TrainingConfig:
    """Returns the checked settings: flags over the file over the model's recipe. Raises `CommandError`, status 2."""
    flags = {name: value for name, value in flags.items() if value is not None}
    try:
        if words is not None:
            if "categories" in flags:
                raise ValueError("The words are given twice: leave out --categories.")
            flags["categories"] = words
        settings = {**({} if config is None else read_settings(config)), **flags}
        for field in FIELDS:
            required = field.default is dataclasses.MISSING and type(None) not in setting_types(field)
            if required and settings.get(field.name) is None:
                raise ValueError(f"{flag_name(field.name)} is required, as a flag or in the --config file.")
        checked = training_config(settings)
        checked.check()
    except ValueError as error:
        raise CommandError(error, 2) from error
    check_picture(checked)
    if checked.push_to_hub and os.environ.get("RANK", "0") == "0":  # one request to the Hub, not one per process
        from ifseg_hf.hub.adapter_repository import check_base
        from ifseg_hf.hub.publish import HubError, check_access

        try:
            if checked.lora:
                check_base(checked.model)
            check_access(checked.push_to_hub)
        except (ValueError, HubError) as error:
            raise CommandError(error, 2) from error
    if checked.model != EMBEDDED:
        convert_published(checked.model)
    return checked


def convert_published(model: str) -> None:
    """Converts a published OFA, once. Raises `CommandError` for one that cannot be converted."""
    from ifseg_hf.hub.checkpoint_reader import ConversionError  # imports torch
    from ifseg_hf.hub.published import resolve_checkpoint

    try:
        with suppress(FileNotFoundError):  # of which the check of the settings says more
            resolve_checkpoint(model)
    except ConversionError as error:
        raise CommandError(error) from error


def check_picture(config: TrainingConfig) -> None:
    """Reads the image for the model card, before a long run starts. Raises `CommandError`, status 2."""
    if config.card_image is None:
        return
    from ifseg_hf.card_image import read_card_image  # imports torch

    try:
        read_card_image(config.card_image)
    except ValueError as error:
        raise CommandError(error, 2) from error


def draw_picture(config: TrainingConfig) -> None:
    """Draws the picture of the model card with the trained model. Raises `CommandError`."""
    from ifseg_hf.card_image import draw_card_image

    try:
        picture = draw_card_image(config.output_dir, config.card_image, config.trust_remote_code)
    except (OSError, ValueError) as error:
        raise CommandError(error) from error
    print(f"The picture for the model card is {picture}.")


def publish(config: TrainingConfig) -> None:
    """Pushes the trained model to the Hub. Raises `HubError`."""
    from ifseg_hf.hub.publish import push_to_hub

    commit = push_to_hub(
        config.output_dir, config.push_to_hub, config.hub_private, config.hub_revision, config.hub_commit_message
    )
    print(f"Published: {commit.commit_url}")


def setting_option(field: dataclasses.Field) -> Any:
    """The annotation of a setting's option, with its type, help and default. None: not given."""
    help, types = field.metadata["help"], setting_types(field)
    if field.default not in (None, dataclasses.MISSING):
        help += (
            f" (default: the recipe's, or {field.default})"
            if field.metadata["recipe"]
            else f" (default: {field.default})"
        )
    if bool in types:
        return Annotated[bool | None, option(help)]
    kind = next((kind for kind in (int, float) if kind in types), str)
    return Annotated[kind | None, option(help, metavar="TEXT" if kind is str else "NUMBER")]


def _options() -> dict[str, Any]:
    """The annotations of the command's arguments by name."""
    words = Annotated[str | None, typer.Argument(help="the words, in place of --categories", metavar='["WORDS"]')]
    config = Annotated[
        str | None, option("YAML or JSON file with any of these settings; flags override", metavar="FILE")
    ]
    return {"words": words, "config": config, **{field.name: setting_option(field) for field in FIELDS}}


tune.__annotations__ = {**_options(), "return": int}
tune.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in _options().items()
    ]
)
