"""`ifseg push`: a saved model on the Hub."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from ifseg_hf.cli.app import CommandError
from ifseg_hf.cli.options import CardImage, option
from ifseg_hf.pretrained import EMBEDDED

__all__ = ["push"]


def push(
    folder: Annotated[
        str | None, typer.Argument(help="folder of a trained or converted model or an adapter", metavar="FOLDER")
    ] = None,
    repo_id: Annotated[
        str | None,
        typer.Argument(help="owner/name of the repository, created if it does not exist", metavar="REPO_ID"),
    ] = None,
    private: Annotated[
        bool | None, option("whether a new repository is private (default: the owner's default)")
    ] = None,
    revision: Annotated[str | None, option("branch, created if it does not exist (default: main)")] = None,
    commit_message: Annotated[str | None, option("first line of the commit's message")] = None,
    base_model: Annotated[
        str | None, option("Hub id of the model that this one was trained or converted from", metavar="ID")
    ] = None,
    card_image: CardImage = None,
    space: Annotated[
        str | None, option("owner/name of a Space to publish: the page of `ifseg app` with this model", metavar="ID")
    ] = None,
    model: Annotated[
        str | None,
        option(
            "with --space and no FOLDER: Hub id of the model that the page opens with (default: the embedded model)",
            metavar="ID",
        ),
    ] = None,
) -> int:
    """Publishes a saved model or an adapter on the Hub, with its words and model card, or the page `ifseg app`.

    \b
    ifseg push tuned me/my-words
    ifseg push tuned me/my-words --space me/my-demo
    ifseg push --space me/ifseg-demo

    Needs a token with write permission: `hf auth login` or HF_TOKEN. The README.md of the folder is published as the
    model card; without one, a model card is generated.
    """
    if (folder is None) != (repo_id is None) or (folder is None and space is None):
        raise typer.BadParameter("give the folder of a model and a repository id (owner/name), or --space")
    if card_image is not None and folder is None:
        raise typer.BadParameter("--card-image is for the folder of a model")
    if model is not None and (folder is not None or space is None):
        raise typer.BadParameter("--model is for --space without a folder")
    # Imports that take seconds come after the arguments, so that wrong arguments are reported at once.
    from ifseg_hf.hub.publish import HubError, check_access, push_to_hub
    from ifseg_hf.hub.space import push_space

    try:
        if folder is not None:
            if card_image is not None:
                check_access(repo_id)
                draw(folder, card_image)
            commit = push_to_hub(folder, repo_id, private, revision, commit_message, base_model=base_model)
            print(f"Published: {commit.commit_url}")
            model = check_access(repo_id) if space is not None else None
        if space is not None:
            commit = push_space(space, model or EMBEDDED, private, commit_message)
            print(f"Published: {commit.commit_url}")
    except KeyboardInterrupt:
        print("Interrupted; run the same command to try again.", file=sys.stderr)
        return 130
    except HubError as error:
        raise CommandError(error) from error
    except (OSError, ValueError) as error:
        raise CommandError(error, 2) from error
    return 0


def draw(folder: str, image: str) -> None:
    """Writes the picture of the model card into the folder. Raises `ValueError`."""
    from ifseg_hf.card_image import draw_card_image

    picture = draw_card_image(Path(folder).expanduser(), image)
    card = picture.with_name("README.md")
    if card.is_file() and picture.name not in card.read_text(encoding="utf-8"):
        print(f"{card} does not show the picture: add ![segmented image]({picture.name}) to it.", file=sys.stderr)
