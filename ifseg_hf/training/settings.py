"""One setting of training: a dataclass field with its default, help, range, stages and other metadata.

Only the standard library is imported here, so that a command can reject a wrong setting before it imports torch.
"""

import dataclasses
import json
import typing
from collections.abc import Sequence
from dataclasses import Field
from typing import Any

STAGES = ("word-maps", "supervised", "self-training")
ON_IMAGES = STAGES[1:]


def setting(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: Sequence[str] = (),
    stages: Sequence[str] = STAGES,
    private: bool = False,
    may_change: bool = False,
    bare_flag: str | None = None,
    recipe: bool = False,
) -> Any:
    """A dataclass field with the default, help, range, stages and other metadata of one setting.

    Args:
        default: `MISSING` for a required setting.
        help: shown by `ifseg tune --help`.
        minimum, above, below: the range: `minimum <= value` or `above < value`, and `value < below`. If the default is
            None, None is allowed, too.
        choices: the allowed values.
        stages: the stages that use the setting; the others allow its default only.
        private: whether the setting describes the machine or the user, and is left out of a published model card.
        may_change: whether a resumed run may have another value.
        bare_flag: value of the setting if its command-line flag is given without a value.
        recipe: whether the configuration of a model may hold the value with which the model is best tuned on words.
    """
    limits = {"minimum": minimum, "above": above, "below": below, "choices": tuple(choices), "stages": tuple(stages)}
    rest = {"help": help, "private": private, "may_change": may_change, "bare_flag": bare_flag, "recipe": recipe}
    return dataclasses.field(default=default, metadata={**limits, **rest})


def setting_types(field: Field) -> tuple[type, ...]:
    """The types of a setting's values, such as `(int, NoneType)`; lists may also be given as text."""
    types = tuple(typing.get_origin(kind) or kind for kind in typing.get_args(field.type) or (field.type,))
    return (str, *types) if list in types else types


def convert(field: Field, value: Any, source: str) -> Any:
    """The value converted to the type of its setting; YAML, for example, reads 5e-5 as text.

    Raises `ValueError`, in one line that begins with `source`, for a value of another type.
    """
    types = setting_types(field)
    if type(value) in types:
        return value
    if float in types and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    expected = next(names[kind] for kind in types if kind in names)
    raise ValueError(f"{source}{field.name} is {value!r}, but must be {expected}.")


def brief(value: Any) -> str:
    """A value as JSON; a list or a mapping as its length and its first three names."""
    if isinstance(value, (list, dict)):
        names = list(value)
        return f"{len(names)}: {', '.join(names[:3])}{', ...' * (len(names) > 3)}"
    return json.dumps(value, ensure_ascii=False)
