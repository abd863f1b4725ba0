"""Checks of the types and ranges of a configuration's values, which come from a file that anybody may have written."""

import math
from collections.abc import Mapping
from inspect import get_annotations
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, ClassVar, Union, get_args, get_origin

from transformers import PreTrainedConfig

# Ends of the names of sizes, which are integers from 1, and of rates, from 0 to 1.
_SIZES = ("_size", "_layers", "_heads", "_dim", "_embeddings", "_length", "d_model", "_depths", "_hidden_sizes")
_RATES = ("dropout", "_rate")
_MOST_LABELS = 1_000_000  # of which transformers makes names in advance


def check_values(config: PreTrainedConfig, extra: Mapping[str, Any]) -> None:
    """
    Checks the values of a configuration against the annotations of its class, before transformers reads them.

    Args:
        config: its sizes must be at least 1, its rates from 0 to 1.
        extra: further arguments, of which `num_labels`, `dtype` and `torch_dtype` are checked.

    Raises:
        `ValueError`: names the value and what it should be.
    """
    classes = type(config).mro()
    hints: dict[str, Any] = {}
    for cls in reversed(classes[: classes.index(PreTrainedConfig)]):
        hints |= get_annotations(cls)
    for name, hint in hints.items():
        if get_origin(hint) is ClassVar:
            continue
        value = getattr(config, name)
        if not _matches(value, hint):
            raise ValueError(f"{name}={value!r} should be {_described(hint)}.")
        numbers = value if isinstance(value, (list, tuple)) else [value]
        numbers = [number for number in numbers if isinstance(number, Real) and not isinstance(number, bool)]
        if name.endswith(_SIZES) and any(number < 1 for number in numbers):
            raise ValueError(f"{name}={value!r}: sizes are at least 1.")
        if name.endswith(_RATES) and any(not 0 <= number <= 1 for number in numbers):
            raise ValueError(f"{name}={value!r}: a rate is from 0 to 1.")
    _check_labels(config.id2label, config.label2id, extra.get("num_labels", 0))
    for name, value in {"dtype": config.dtype, "torch_dtype": extra.get("torch_dtype")}.items():
        if value is not None and not _is_dtype(value):
            raise ValueError(f'{name}={value!r} is no dtype of torch, such as "float32".')


def _check_labels(id2label: Any, label2id: Any, num_labels: Any) -> None:
    if not _matches(num_labels, int) or not 0 <= num_labels <= _MOST_LABELS:
        raise ValueError(f"num_labels={num_labels!r} should be the number of categories, at most {_MOST_LABELS}.")
    if label2id is not None and not _matches(label2id, dict):
        raise ValueError(f"label2id={label2id!r} should be a dict of numbers by names.")
    if id2label is None:
        return
    if not isinstance(id2label, dict):
        raise ValueError(f"id2label={id2label!r} should be a dict of names by numbers.")
    for number, name in id2label.items():
        if not (_matches(number, int) or (isinstance(number, str) and number.strip().lstrip("-").isdecimal())):
            raise ValueError(f"id2label has the key {number!r}, which is no number.")
        if not isinstance(name, str) or any("\ud800" <= character <= "\udfff" for character in name):
            raise ValueError(f"id2label has {name!r} as the name of category {number}, which is no text.")
    if len({int(number) for number in id2label}) < len(id2label):
        raise ValueError(f"id2label has a number twice among {list(id2label)}.")


def _is_dtype(value: Any) -> bool:
    import torch  # only where a dtype is given

    return isinstance(getattr(torch, value, None) if isinstance(value, str) else value, torch.dtype)


def _matches(value: Any, hint: Any) -> bool:
    """Whether a value has a type; an integer is a float, too, and lists and tuples are alike."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(_matches(value, one) for one in inner)
    if origin in (list, tuple):
        return isinstance(value, (list, tuple)) and all(_matches(x, inner[0]) for x in value)
    if hint in (int, float):
        kind = Integral if hint is int else Real
        return isinstance(value, kind) and not isinstance(value, bool) and (hint is int or math.isfinite(value))
    if hint is dict:  # as JSON has them
        return isinstance(value, dict) and all(isinstance(key, str) for key in value)
    return isinstance(value, origin or hint)


def _described(hint: Any) -> str:
    """A type in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        kinds = dict.fromkeys(_described(one) for one in inner)
        return " or ".join(kinds)
    if origin in (list, tuple):
        return f"a list, each {_described(inner[0])}"
    words = {
        int: "an integer",
        float: "a finite number",
        bool: "True or False",
        str: "a text",
        dict: "a dict with texts as keys",
        NoneType: "None",
    }
    return words.get(hint) or getattr(hint, "__name__", str(hint))


__all__ = ["check_values"]
