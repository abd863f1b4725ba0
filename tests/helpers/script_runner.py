"""Runs scripts in the process of the test: the same program without the seconds that starting one takes."""

import sys
from collections.abc import Callable
from pathlib import Path

from scripts import SCRIPTS, load_script


class ScriptRunner:
    """What scripts/reproduce.py and scripts/experiments.py take to run other scripts; records the commands.

    Args:
        monkeypatch: pytest's fixture.
        smaller: returns arguments that make a command cheaper; they are added to the command's own.
    """

    def __init__(self, monkeypatch, smaller: Callable[[list[str]], list[str]] = lambda command: []):
        self.monkeypatch, self.smaller = monkeypatch, smaller
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str]) -> None:
        self.commands.append(command)
        arguments = [*command[1:], "--cpu", *self.smaller(command)]
        self.monkeypatch.setattr(sys, "argv", [str(SCRIPTS / command[0]), *arguments])
        status = load_script(Path(command[0]).stem).main()
        if status:
            raise RuntimeError(f"{command[0]} ended with status {status}")


def fail(command: list[str]) -> None:
    """In place of a [`ScriptRunner`], a script that always fails."""
    raise RuntimeError(f"{command[0]} ended with status 1")
