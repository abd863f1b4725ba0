"""Locations of models: the embedded checkpoint, folders and Hub ids. Imports the standard library only."""

import re
from pathlib import Path

EMBEDDED = "ifseg-ofa-nano"
NANO = Path(__file__).resolve().parent / "nano"
"""Folder of the embedded checkpoint, a small OFA that has not been tuned on words, for `from_pretrained`."""


def resolve_model(name: str | Path) -> str | Path:
    """Returns the folder or Hub id of a model, for `from_pretrained`.

    Args:
        name: a folder, a Hub id (owner/name), or `"ifseg-ofa-nano"` for the embedded checkpoint.

    Raises:
        `FileNotFoundError`: `name` is neither an existing folder nor a possible Hub id. The Hub is not asked.
    """
    if str(name) == EMBEDDED:
        return NANO
    folder = Path(name).expanduser()
    if name != "" and folder.is_dir():
        return folder
    # A Hub id has an owner; a name without one is a missing folder.
    if isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        return name
    raise FileNotFoundError(
        f'There is no model folder "{name}". Give the folder of a saved model (scripts/convert_ofa.py converts OFA '
        f"checkpoints), a Hub id (owner/name), or {EMBEDDED} for the embedded model."
    )
