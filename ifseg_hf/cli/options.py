"""The arguments that several commands have, each declared once."""

import dataclasses
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ifseg_hf.data.image_files import ON_ERROR, OnErrorChoice
from ifseg_hf.training.config import TrainingConfig

__all__ = [
    "Adapter",
    "Background",
    "CardImage",
    "Cpu",
    "DataDir",
    "ImageModel",
    "NewFolder",
    "OnError",
    "SmoothingIterations",
    "SmoothingNeighbors",
    "Threshold",
    "TrustRemoteCode",
    "Untuned",
    "add_on_error",
    "at_least",
    "flag",
    "option",
]


def option(help: str, *names: str, **settings: Any) -> Any:
    """A typer option whose help names the default itself."""
    return typer.Option(*names, help=help, show_default=False, **settings)


def flag(help: str, name: str) -> Any:
    """A flag that is given or not, without its opposite."""
    return option(help, name)


def add_on_error(parser: ArgumentParser) -> None:
    """Adds --on-error, the argument that [`OnError`] is, to the parser of a script that is no command of `ifseg`."""
    parser.add_argument("--on-error", choices=ON_ERROR, default="fail", help=f"{_ON_ERROR_HELP} (default: %(default)s)")


def at_least(minimum: float) -> Callable[[Any], Any]:
    """A callback that refuses a number, or a list with a number, below a minimum."""

    def check(value: Any) -> Any:
        if any(number < minimum for number in (value if isinstance(value, list) else [value]) if number is not None):
            raise typer.BadParameter(f"must be at least {minimum}")
        return value

    return check


ImageModel = Annotated[str, option("folder or Hub id (default: ifseg-ofa-nano, the embedded model)")]
Adapter = Annotated[
    str | None,
    option(
        "folder or Hub id of an adapter of `ifseg tune --lora`, which is used with its words (its base model, unless "
        "--model names it, too)",
        metavar="ADAPTER",
    ),
]
DataDir = Annotated[str | None, option("folder that coco-stuff or ade20k was unpacked to")]
NewFolder = Annotated[Path, option("folder for the results")]
SmoothingNeighbors = Annotated[
    int | None,
    option(
        "number of patches to average, the patch itself included (default: the model's)",
        metavar="K",
        callback=at_least(1),
    ),
]
SmoothingIterations = Annotated[
    int | None,
    option(
        "how often to average; 0: no smoothing (default: the model's)",
        metavar="N",
        callback=at_least(0),
    ),
]


def _probability(value: float | None) -> float | None:
    """Refuses what is no probability."""
    if value is not None and not 0 <= value <= 1:
        raise typer.BadParameter(f"{value}: must be from 0 to 1")
    return value


Threshold = Annotated[
    float | None,
    option(
        "pixels whose best word has a lower probability belong to no word (default: every pixel has one)",
        metavar="P",
        callback=_probability,
    ),
]
Background = Annotated[
    str | None,
    option(
        "words that are merged into one label, background: default (sky, grass, wall, floor, ...), none, or words in "
        "the forms of the words to look for",
        metavar="WORDS",
    ),
]
TrustRemoteCode = Annotated[bool, flag("run the code saved with a model of another backbone", "--trust-remote-code")]
Untuned = Annotated[bool, flag("also use a model that was never tuned, such as the paper's baseline OFA", "--untuned")]
_ON_ERROR_HELP = "for images that can't be read"
OnError = Annotated[OnErrorChoice, option(f"{_ON_ERROR_HELP} (default: fail; of segment: skip)")]
Cpu = Annotated[bool, flag("compute on the CPU even where there is a GPU", "--cpu")]


def _help_of_setting(name: str) -> str:
    """The help of a setting of training, for a command that has an option of its name."""
    return next(field.metadata["help"] for field in dataclasses.fields(TrainingConfig) if field.name == name)


CardImage = Annotated[str | None, option(_help_of_setting("card_image"), metavar="IMAGE")]
