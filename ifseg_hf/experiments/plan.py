"""Workflows of many commands: steps run in the order of their dependencies, and only those that are not complete.

A workflow is a dict of commands by the names of their steps. [`Plan`] adds the flag `--output-dir`, with a folder for
each step:

    COMMANDS = {
        "tuned": "train.py --model {ofa} --categories coco-stuff",
        "labels": "pseudo_label.py --model {tuned} --dataset coco-stuff",
    }

`{tuned}` is the folder of the step "tuned", which therefore runs first; `{ofa}` is a value given to the [`Plan`].
"""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ifseg_hf.training.config import read_settings
from ifseg_hf.training.settings import ON_IMAGES

MARKERS = {"train.py": "config.json", "pseudo_label.py": "dataset.json"}  # what each script writes last
PYTHON = ("python",)
ACCELERATE = ("accelerate", "launch")


@dataclass(frozen=True)
class Step:
    """A script of this project that fills one folder.

    Args:
        script: its file name in scripts/; arguments: all but `--output-dir`.
        output_dir: the folder that the script fills.
        marker: file in `output_dir` that exists only when the step is complete. `None`: the step runs every time.
        needs: the steps whose folders this step reads.
    """

    script: str
    arguments: tuple[str, ...]
    output_dir: Path
    marker: str | None = None
    needs: tuple["Step", ...] = ()

    @property
    def command(self) -> list[str]:
        """Script and arguments."""
        return [self.script, *self.arguments, "--output-dir", str(self.output_dir)]

    @property
    def complete(self) -> bool:
        """Whether the folder is filled."""
        return self.marker is not None and (self.output_dir / self.marker).is_file()


@dataclass
class Plan:
    """Makes the steps of a workflow from its commands.

    Args:
        commands: by the name of the step; see the top of this file.
        values: values of the placeholders that are not names of steps.
        out: folder of the steps' folders.
        suffix: added to the name of every folder, such as "-0" for seed 0.
        on_error: the `--on-error` of the steps that read images.
    """

    commands: dict[str, str]
    values: dict[str, str]
    out: Path
    suffix: str = ""
    on_error: str = "fail"

    def folder(self, name: str) -> Path:
        """The folder of the step `name`."""
        return self.out / f"{name}{self.suffix}"

    def step(self, name: str) -> Step:
        """The step `name`, with all the steps that it needs. A training run resumes if it was stopped."""
        command = self.commands[name]
        needs = tuple(self.step(placeholder) for placeholder in _placeholders(command) if placeholder in self.commands)
        script, *arguments = shlex.split(command)
        arguments = self.fill_in(arguments)
        if script == "train.py":
            arguments.append("--resume")
        if self.on_error != "fail" and reads_images(script, arguments):
            arguments += on_error_flag(self.on_error)
        return Step(script, tuple(arguments), self.folder(name), MARKERS[script], needs)

    def fill_in(self, arguments: Iterable[str]) -> list[str]:
        """The arguments with values and folders in place of their placeholders."""
        folders = {name: str(self.folder(name)) for name in self.commands}
        return [argument.format_map({**self.values, **folders}) for argument in arguments]


def _placeholders(command: str) -> list[str]:
    """Names in braces, each once."""
    return list(dict.fromkeys(re.findall(r"\{([\w-]+)\}", command)))


def reads_images(script: str, arguments: Sequence[str]) -> bool:
    """Whether a script reads images with these arguments: train.py does not if it tunes on word maps."""
    if script != "train.py":
        return True
    if "--stage" in arguments:
        return arguments[arguments.index("--stage") + 1] in ON_IMAGES
    file = arguments[arguments.index("--config") + 1] if "--config" in arguments else None
    return file is not None and read_settings(file).get("stage") in ON_IMAGES


def on_error_flag(on_error: str) -> list[str]:
    """The flag `--on-error` and its value; nothing for "fail", the default of the scripts."""
    return [] if on_error == "fail" else ["--on-error", on_error]


def with_flag(command: str, flag: str, value: str, only_replace: bool = False) -> str:
    """The command with another value of a flag. A flag that is not there is added, unless `only_replace`."""
    parts = shlex.split(command)
    if flag in parts:
        parts[parts.index(flag) + 1] = value
    elif not only_replace:
        parts += [flag, value]
    return shlex.join(parts)


def in_order(steps: Iterable[Step]) -> list[Step]:
    """The steps and all that they need, each once and after the steps that it needs."""
    ordered: dict[Step, None] = {}
    for step in steps:
        ordered |= dict.fromkeys([*in_order(step.needs), step])
    return list(ordered)


def run_plan(
    steps: Iterable[Step],
    run: Callable[[list[str]], None],
    launcher: Sequence[str] = PYTHON,
    dry_run: bool = False,
) -> None:
    """Runs the steps that are not complete, and those that they need, in order; prints each command first.

    Args:
        run: runs a script by its name with arguments, and raises if it fails; see [`run_script`].
        launcher: starts a script in the printed commands.
        dry_run: only print the commands, of complete steps too.
    """
    for step in in_order(steps):
        if dry_run:
            print(shell(step.command, launcher))
        elif not step.complete:
            print(f"\n{shell(step.command, launcher)}", flush=True)
            run(step.command)


def shell(command: Sequence[str], launcher: Sequence[str] = PYTHON) -> str:
    """A command line for a shell, quoted."""
    return shlex.join([*launcher, f"scripts/{command[0]}", *command[1:]])


def run_script(command: Sequence[str], scripts: Path, launcher: Sequence[str] = PYTHON) -> None:
    """Runs a script of the folder `scripts` in a new process, by this Python. Raises `RuntimeError` if it fails."""
    accelerate = ["-m", "accelerate.commands.launch"] if launcher == ACCELERATE else []
    result = subprocess.run([sys.executable, *accelerate, str(scripts / command[0]), *command[1:]])
    if result.returncode:
        raise RuntimeError(f"{command[0]} ended with status {result.returncode}")


def write_text(file: Path, text: str) -> None:
    """Writes a file completely or not at all, since another process may write it at the same time."""
    incomplete = file.with_name(f"{file.name}.{os.getpid()}.incomplete")
    incomplete.write_text(text, encoding="utf-8")
    incomplete.replace(file)


def save_settings(file: Path, settings: dict) -> None:
    """Writes the settings of a workflow as JSON into its folder. Raises `ValueError` if `file` has other settings."""
    text = json.dumps(settings, indent=1, ensure_ascii=False)
    if file.is_file():
        before, now = json.loads(file.read_text(encoding="utf-8")), json.loads(text)
        changed = [name for name in {**before, **now} if name not in before or before[name] != now.get(name)]
        if changed:
            raise ValueError(
                f'"{file.parent}" holds {file.stem} with other settings ({", ".join(changed)} in {file.name}): choose '
                "another folder."
            )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, f"{text}\n")
