"""Reference outputs of the published implementation, and the weights that they were computed with.

Both are in `tests/parity`. One large case and the files of the published tokenizer are not part of the repository but
in `../shared/parity`; tests that need them are skipped without that folder.
"""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

PARITY = Path(__file__).parents[1] / "parity"
SHARED = Path(__file__).parents[3] / "shared"
SHARED = SHARED if SHARED.is_dir() else None
BPE = SHARED / "parity" / "bpe" if SHARED else None

_spec = importlib.util.spec_from_file_location("fixture", PARITY / "fixture.py")
fixture = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fixture)

__all__ = [
    "BPE",
    "PARITY",
    "SHARED",
    "fixture",
    "golden",
    "golden_category_ids",
    "golden_metadata",
    "relative_error",
    "token_ids",
]


def _file(name: str) -> Path:
    """The path of a file of reference outputs; skips the test if there is none."""
    for folder in (PARITY, SHARED / "parity" if SHARED else PARITY):
        if (folder / "golden" / name).is_file():
            return folder / "golden" / name
    pytest.skip(f"needs the reference output {name}, which is not part of the project")


def golden(name: str) -> dict[str, torch.Tensor]:
    """The tensors of a reference output, such as "tiny_512x512"."""
    with safe_open(_file(f"{name}.safetensors"), "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open has no iterator)


def golden_metadata(name: str) -> dict:
    """The inputs and settings of a reference output, with JSON values decoded."""
    with safe_open(_file(f"{name}.safetensors"), "pt") as file:
        metadata = file.metadata() or {}
    decoded = {}
    for key, value in metadata.items():
        try:
            decoded[key] = json.loads(value)
        except json.JSONDecodeError:
            decoded[key] = value
    return decoded


def token_ids() -> dict:
    """The token ids of the categories and prompts of the published vocabularies."""
    return json.loads(_file("tokens.json").read_text())


def golden_category_ids(categories: list[str]) -> torch.Tensor:
    """Token ids of categories as the model's `category_ids`, (1, categories, sub-words), padded with 1."""
    known = {}
    for vocabulary in token_ids().values():
        if isinstance(vocabulary, dict) and "categories" in vocabulary:
            known.update(zip(vocabulary["categories"], vocabulary["category_token_ids"], strict=True))
    rows = [known[name] for name in categories]
    longest = max(map(len, rows))
    return torch.tensor([[row + [1] * (longest - len(row)) for row in rows]])


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """|actual - expected| / |expected|, with Frobenius norms in float64."""
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm()).item()
