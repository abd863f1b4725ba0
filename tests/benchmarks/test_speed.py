"""The benchmark script runs and measures; its results are not checked."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def speed():
    spec = importlib.util.spec_from_file_location("speed", Path(__file__).with_name("speed.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_case_is_measured_beside_a_matrix_product(speed):
    row = speed.measure(speed.Case("loss", lambda: speed.loss(1, 3)), "float32", repeats=1)
    assert set(row) == {"wall", "cpu", "memory", "unit"}
    assert row["wall"] > 0
    assert row["unit"] > 0
    assert speed.in_milliseconds(2.5, 0.1) == "250"


def test_every_case_has_another_name(speed):
    names = [case.name for case in speed.CASES]
    assert len(set(names)) == len(names)
