"""`ifseg cache`: the models that `ifseg segment` tuned, and those that were converted on the way."""

import time
from typing import Annotated

import typer

from ifseg_hf.cache import CONVERTED, CacheEntry, cache_entries, cache_folder, clear_cache
from ifseg_hf.cli.app import CommandError
from ifseg_hf.cli.options import flag

__all__ = ["cache"]


def cache(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME...", help="entries to clear (default: all)")
    ] = None,
    clear: Annotated[bool, flag("delete the entries", "--clear")] = False,
) -> int:
    """Lists or clears the tuned and converted models in the cache.

    \b
    ifseg cache
    ifseg cache --clear sky-road-car-0123456789abcdef
    ifseg cache --clear

    The cache is the folder IFSEG_CACHE, or ifseg in XDG_CACHE_HOME or in ~/.cache.
    """
    if names and not clear:
        raise typer.BadParameter("names are for --clear: without it, all entries are listed")
    try:
        entries = clear_cache(names or ()) if clear else cache_entries()
    except (OSError, ValueError) as error:
        raise CommandError(error) from error
    for entry in entries:
        print(describe(entry))
    size = sum(entry.size for entry in entries)
    done = "deleted from" if clear else "in"
    print(f"{len(entries)} models, {megabytes(size)}, {done} {cache_folder()}")
    return 0


def describe(entry: CacheEntry) -> str:
    """An entry in one line: name, model and words, size, and the day of its last use."""
    words = ", ".join(entry.categories[:8]) + (", ..." if len(entry.categories) > 8 else "")
    words = words or ("converted" if entry.folder.parent.name == CONVERTED else "?")
    state = time.strftime("%Y-%m-%d", time.localtime(entry.used)) if entry.complete else "interrupted"
    return f"{entry.name}  {entry.model}: {words}  {megabytes(entry.size)}  {state}"


def megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
