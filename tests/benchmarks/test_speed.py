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
    assert set(row) == {"wall", "cpu", "memory", "unit", "arithmetic"}
    assert row["wall"] > 0
    assert row["unit"] > 0
    assert speed.in_milliseconds(2.5, 0.1) == "250"


def test_every_case_has_another_name(speed):
    names = [case.name for case in speed.CASES]
    assert len(set(names)) == len(names)


def test_goals_are_printed_as_ratios(speed, capsys):
    small = {"cpu": 4.9, "arithmetic": 4.0}
    speed.goals_table({speed.SMALL: small, "8 images 512x512, 15 words, tiny": {"cpu": 78.4, "arithmetic": 32.0}})
    printed = capsys.readouterr().out
    assert f"| {speed.SMALL}: published implementation / it | 2.00 | at least 2.7 |" in printed
    assert f"| {speed.SMALL}: it / its arithmetic | 1.23 | at most 1.15 |" in printed
    assert f"tiny: it / 8 times {speed.SMALL} | 2.00 | at most 1 |" in printed


def test_other_cases_of_goals_exist(speed):
    names = {case.name for case in speed.CASES}
    assert speed.SMALL in names
    assert all(case.over[0] in names for case in speed.CASES if case.over is not None)


@pytest.mark.parametrize(("cost", "verdict"), [(7.0, "as before"), (20.0, "slower than before")])
def test_check_compares_with_the_stored_cost(speed, monkeypatch, capsys, cost, verdict):
    monkeypatch.setattr(speed, "measure_in_process", lambda *_: {"cpu": cost})
    speed.check()
    assert capsys.readouterr().out.endswith(f"stored {speed.SMALL_COST}: {verdict}\n")
