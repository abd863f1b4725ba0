"""Starting the page from the command line, where that fails."""

import pytest
from typer.testing import CliRunner

from ifseg_hf.app import server
from ifseg_hf.cli.main import app


def ifseg(*arguments):
    return CliRunner().invoke(app, ["app", *arguments], prog_name="ifseg")


def test_without_gradio_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr(server.importlib.util, "find_spec", lambda name: None)
    done = ifseg()
    assert done.exit_code == 1
    message = 'The page needs Gradio: pip install "ifseg-hf[app]" (in a checkout: pip install -e ".[app]").'
    assert done.stderr == f"ifseg app: {message}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere"], 'There is no model folder "nowhere"'),
        (["--model", "{tmp}"], "no IFSeg model that can be loaded"),
    ],
)
def test_a_wrong_model_is_one_line(monkeypatch, tmp_path, arguments, message):
    monkeypatch.setattr(server, "check_gradio", lambda: None)
    done = ifseg(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("ifseg app: ")
    assert message in line
