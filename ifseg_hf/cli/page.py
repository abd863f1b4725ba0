"""`ifseg app`: the page in which images are segmented into typed words."""

from typing import Annotated

import typer

from ifseg_hf.cli.app import CommandError
from ifseg_hf.cli.options import ImageModel, TrustRemoteCode, flag, option
from ifseg_hf.pretrained import EMBEDDED

__all__ = ["page"]


def _port(value: int | None) -> int | None:
    """Refuses what is no port."""
    if value is not None and not 1 <= value <= 65535:
        raise typer.BadParameter(f"{value}: must be from 1 to 65535")
    return value


def page(
    model: ImageModel = EMBEDDED,
    host: Annotated[
        str | None,
        option("address to listen on; 0.0.0.0: all of this machine (default: 127.0.0.1, this machine alone)"),
    ] = None,
    port: Annotated[int | None, option("port (default: the first free one from 7860)", callback=_port)] = None,
    open_browser: Annotated[bool, flag("open the page in a browser", "--open")] = False,
    public: Annotated[
        bool,
        flag(
            "list to each visitor only the vocabularies that they tuned, not all in the cache, and keep at most 5 GB "
            "of tuned models, those used last",
            "--public",
        ),
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> int:
    """Serves a page for the browser: choose an image, type words, see the mask.

    \b
    ifseg app
    ifseg app --model tuned --open

    Nothing leaves this machine. The page tunes on the words typed there, and keeps the result in the cache that `ifseg
    cache` lists. Needs the extra "app": pip install "ifseg-hf[app]".
    """
    from ifseg_hf.app.server import AppError, check_gradio, launch

    def started(address: str) -> None:
        print(f"The page is at {address} (Ctrl-C ends it).", flush=True)

    try:
        check_gradio()
        launch(model, host, port, open_browser, trust_remote_code, public, started)
    except (AppError, OSError, ValueError) as error:
        raise CommandError(error) from error
    return 0
