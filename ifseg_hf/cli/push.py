"""`ifseg push`: a saved model on the Hub."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from ifseg_hf.cli.app import CommandError
from ifseg_hf.cli.options import CardImage, option

__all__ = ["push"]


def push(
    folder: Annotated[
        str, typer.Argument(help="folder of a trained or converted model or an adapter", metavar="FOLDER")
    ],
    repo_id: Annotated[
        str, typer.Argument(help="owner/name of the repository, created if it does not exist", metavar="REPO_ID")
    ],
    private: Annotated[
        bool | None, option("whether a new repository is private (default: the owner's default)")
    ] = None,
    revision: Annotated[str | None, option("branch, created if it does not exist (default: main)")] = None,
    commit_message: Annotated[str | None, option("first line of the commit's message")] = None,
    base_model: Annotated[
        str | None, option("Hub id of the model that this one was trained or converted from", metavar="ID")
    ] = None,
    card_image: CardImage = None,
) -> int:
    """Publishes a saved model on the Hub, with its processor, code and model card, or an adapter with its words.

    \b
    ifseg push tuned me/my-words

    Needs a token with write permission: `hf auth login` or HF_TOKEN. The README.md of the folder is published as the
    model card; without one, a model card is generated.
    """
    # Imports that take seconds come after the arguments, so that wrong arguments are reported at once.
    from ifseg_hf.hub.publish import HubError, check_access, push_to_hub

    try:
        if card_image is not None:
            check_access(repo_id)
            draw(folder, card_image)
        commit = push_to_hub(folder, repo_id, private, revision, commit_message, base_model=base_model)
    except KeyboardInterrupt:
        print("Interrupted; run the same command to try again.", file=sys.stderr)
        return 130
    except HubError as error:
        raise CommandError(error) from error
    except (OSError, ValueError) as error:
        raise CommandError(error, 2) from error
    print(f"Published: {commit.commit_url}")
    return 0


def draw(folder: str, image: str) -> None:
    """Writes the picture of the model card into the folder. Raises `ValueError`."""
    from ifseg_hf.card_image import draw_card_image

    picture = draw_card_image(Path(folder).expanduser(), image)
    card = picture.with_name("README.md")
    if card.is_file() and picture.name not in card.read_text(encoding="utf-8"):
        print(f"{card} does not show the picture: add ![segmented image]({picture.name}) to it.", file=sys.stderr)
