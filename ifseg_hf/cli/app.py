"""How the commands are run: errors of one line, and the same command as `ifseg NAME` and as a script."""

import gc
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from ifseg_hf.cli.output import escape_unprintable

__all__ = ["Command", "CommandError", "Program", "new_app", "one_line"]


class CommandError(Exception):
    """An error that ends a command, with a message for its user and an exit status."""

    def __init__(self, message: object, status: int = 1):
        super().__init__(one_line(message))
        self.status = status


def one_line(message: object) -> str:
    """The message with single spaces in place of line breaks."""
    return " ".join(str(message).split())


class _OneLineErrors:
    """Makes a command print wrong arguments in one line, without the usage, and end with status 2."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> int:
        escape_unprintable()
        # Imports create a million objects that stay; garbage collection would look through them again and again.
        gc.set_threshold(10_000)
        try:
            # The result of a command is its exit status.
            status = super().main(args, prog_name, standalone_mode=False, **extra) or 0  # type: ignore[misc]
        except Exception as error:
            if not hasattr(error, "format_message"):  # only errors in arguments have it
                raise
            context = getattr(error, "ctx", None)
            program = context.command_path if context else prog_name
            message = one_line(error.format_message()).removeprefix("Invalid value: ")
            print(f"{program}: {message}", file=sys.stderr)
            status = error.exit_code  # type: ignore[attr-defined]
            standalone_mode = True
        if standalone_mode:
            sys.exit(status)
        return status


class Command(_OneLineErrors, TyperCommand):
    """A command that returns its exit status, and may raise [`CommandError`]; `ctx.meta` has its `arguments`."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        ctx.meta["arguments"] = list(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: typer.Context) -> Any:
        try:
            return super().invoke(ctx)
        except CommandError as error:
            print(f"{ctx.command_path}: {error}", file=sys.stderr)
            raise typer.Exit(error.status) from error


class Program(_OneLineErrors, TyperGroup):
    """The program that has the commands."""


def new_app(help: str) -> typer.Typer:
    """An empty program. Without rich, whose import takes longer than printing the help."""
    return typer.Typer(
        cls=Program,
        help=help,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )


def as_script(app: typer.Typer, name: str, file: str, *first: str) -> Callable[..., int]:
    """The function `main` of a script that is one of the commands.

    Args:
        app, name: the program, and the command in it.
        file: the script; its name stands in messages.
        first: arguments before those of the script.

    Returns:
        A function of the arguments (default: those of the process) that returns the exit status. Wrong arguments raise
        `SystemExit`, as argparse does.
    """

    def main(arguments: list[str] | None = None) -> int:
        command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
        given = sys.argv[1:] if arguments is None else arguments
        return command.main([*first, *given], prog_name=Path(file).name, standalone_mode=False)

    return main
