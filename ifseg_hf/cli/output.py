"""Standard output and standard error with escapes for characters that their encoding lacks."""

import sys

__all__ = ["escape_unprintable"]


def escape_unprintable() -> None:
    r"""
    Makes standard output and standard error write what their encoding lacks as an escape, such as "\u732b".

    Otherwise a name or a path in another script ends the program, where the encoding is not UTF-8, as in a file to
    which Windows redirects the output.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a stream in its place, as in a notebook, may lack it
            stream.reconfigure(errors="backslashreplace")
