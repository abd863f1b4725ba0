"""The benchmark script measures what it says; how fast that is, no test asks."""

import runpy
from pathlib import Path

speed = runpy.run_path(str(Path(__file__).with_name("speed.py")))


def test_a_case_is_measured_beside_a_matrix_product():
    row = speed["measure"](speed["Case"]("loss", lambda: speed["loss"](1, 3)), "float32", repeats=1)
    assert set(row) == {"wall", "cpu", "memory", "unit"}
    assert row["wall"] > 0
    assert row["unit"] > 0


def test_every_case_can_be_chosen_by_its_name():
    names = [case.name for case in speed["CASES"]]
    assert len(set(names)) == len(names)
