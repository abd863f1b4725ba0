"""Names of models: the embedded checkpoint, folders and Hub ids. Needs the standard library only."""

import re
from pathlib import Path

EMBEDDED = "ifseg-ofa-nano"
NANO = Path(__file__).resolve().parent / "nano"
"""Folder of the embedded checkpoint, for `from_pretrained`: a small OFA, before any tuning on words."""


def resolve_model(name: str | Path) -> str | Path:
    """Returns what `from_pretrained` takes for `name`: a folder, a Hub id, or `"ifseg-ofa-nano"`, the embedded model.

    Raises `FileNotFoundError` if `name` can only be a folder and there is none, before anything is looked up.
    """
    if str(name) == EMBEDDED:
        return NANO
    folder = Path(name).expanduser()
    if name != "" and folder.is_dir():
        return folder
    # Models on the Hub have an owner: without one a name is rather a folder that is missing.
    if isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        return name
    raise FileNotFoundError(
        f'There is no model folder "{name}". Give the folder of a saved model (scripts/convert_ofa.py makes one of an '
        f"OFA checkpoint), a name on the Hub (owner/name), or {EMBEDDED} for the embedded model."
    )
