"""The program `ifseg` with all its commands."""

from collections.abc import Callable

from ifseg_hf.cli.app import Command, as_script, new_app
from ifseg_hf.cli.cache import cache
from ifseg_hf.cli.convert import convert
from ifseg_hf.cli.evaluate import evaluate
from ifseg_hf.cli.export import export
from ifseg_hf.cli.page import page
from ifseg_hf.cli.pseudo_label import pseudo_label
from ifseg_hf.cli.push import push
from ifseg_hf.cli.segment import segment
from ifseg_hf.cli.tune import TuneCommand, tune

__all__ = ["app", "script"]

app = new_app("Semantic segmentation from category words alone (IFSeg).")
app.command(cls=Command)(segment)
app.command(cls=TuneCommand)(tune)
app.command("app", cls=Command)(page)
for _command in (convert, evaluate, pseudo_label, push, export, cache):
    app.command(cls=Command)(_command)


def script(name: str, file: str, *first: str) -> Callable[..., int]:
    """The function `main` of a script that is the command `name`; see [`as_script`]."""
    return as_script(app, name, file, *first)
