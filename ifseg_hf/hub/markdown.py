"""Text in Markdown."""

import re
from typing import Any

__all__ = ["escape"]


def escape(value: Any) -> str:
    """Markdown that shows `str(value)` literally; None is shown as an empty string."""
    return "" if value is None else re.sub(r"([\\`*_\[\]<>#|~])", r"\\\1", str(value))
