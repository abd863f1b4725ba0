"""Reference outputs of the published implementation, and the weights that they were computed with.

The kit is in `tests/parity`; its one large case and the published tokenizer's files only exist beside the project, in
`../shared/parity`, and tests that need them skip without it.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

PARITY = Path(__file__).parents[1] / "parity"
SHARED = Path(__file__).parents[3] / "shared"
SHARED = SHARED if SHARED.is_dir() else None
BPE = SHARED / "parity" / "bpe" if SHARED else None

sys.path.insert(0, str(PARITY))
import fixture  # noqa: E402

__all__ = ["BPE", "PARITY", "SHARED", "fixture", "golden", "golden_metadata", "relative_error", "token_ids"]


def _file(name: str) -> Path:
    for folder in (PARITY, SHARED / "parity" if SHARED else PARITY):
        if (folder / "golden" / name).is_file():
            return folder / "golden" / name
    pytest.skip(f"needs the reference output {name}, which is not part of the project")


def golden(name: str) -> dict[str, torch.Tensor]:
    """The tensors of a reference output, e.g. "tiny_512x512"."""
    with safe_open(_file(f"{name}.safetensors"), "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no iterator)


def golden_metadata(name: str) -> dict:
    """What a reference output was computed from, JSON values decoded."""
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
    """Category and prompt token ids of the published vocabularies."""
    return json.loads(_file("tokens.json").read_text())


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """|actual - expected| / |expected|, Frobenius norms in float64."""
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm()).item()
