"""Texts and names as the model reads them."""


def normalize_text(text: str, at_start: bool = True) -> str:
    """
    Returns a text as OFA's pre-processing leaves it: lower case, hyphens and slashes as spaces, white space collapsed.

    Args:
        text (`str`).
        at_start (`bool`, defaults to `True`): whether the text begins a question or is a name; punctuation at its
            start is then left out.
    """
    text = text.strip().lower()
    if at_start:
        text = text.lstrip(",.!?*#:;~")
    return " ".join(text.replace("-", " ").replace("/", " ").split())


def check_text(text: str, what: str):
    """Raises `ValueError` for halves of characters, which a name has that was read with a wrong encoding."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{what} is {text!r}, with halves of characters (surrogates): read it as UTF-8.")


def clean_names(names, what: str) -> list[str]:
    """Returns the names with white space collapsed. Raises `ValueError` for an empty list or a wrong name."""
    if isinstance(names, str) or not isinstance(names, (list, tuple)):
        raise ValueError(f'The {what} must be a list of words such as ["cat", "grass"], not {names!r}.')
    if not names:
        raise ValueError(f"The list of {what} is empty: give at least one word.")
    cleaned: dict[str, int] = {}  # name -> its position
    same_as: dict[str, str] = {}  # normalised name -> the name as it was typed
    for index, name in enumerate(names):
        if not isinstance(name, str):
            raise ValueError(f"Number {index + 1} of the {what} is {name!r}, not a word.")
        name = " ".join(name.split())
        if not name:
            raise ValueError(f"Number {index + 1} of the {what} is empty.")
        check_text(name, f"Number {index + 1} of the {what}")
        if name in cleaned:
            raise ValueError(f'"{name}" is twice among the {what}: numbers {cleaned[name] + 1} and {index + 1}.')
        other = same_as.setdefault(normalize_text(name), name)
        if other != name:
            raise ValueError(
                f'"{other}" and "{name}" are the same for the model, "{normalize_text(name)}" (numbers '
                f"{cleaned[other] + 1} and {index + 1} of the {what}): leave one of them out."
            )
        cleaned[name] = index
    return list(cleaned)


__all__ = ["check_text", "clean_names", "normalize_text"]
