"""The GPU benchmark with small models on a CPU: the report, and failures of sections."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("gpu.py")


@pytest.fixture(scope="module")
def gpu():
    """The module, whose own imports need the script's folder."""
    sys.path.insert(0, str(SCRIPT.parent))
    import gpu

    yield gpu
    sys.path.remove(str(SCRIPT.parent))


def run(folder, *flags):
    command = [sys.executable, str(SCRIPT), "--output-dir", str(folder), "--device", "cpu", "--tiny", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_sections_run_on_a_cpu_and_are_reported(tmp_path):
    result = run(tmp_path, "--sections", "placement", "training", "processes", "speed")
    assert result.returncode == 0, result.stdout + result.stderr
    sections = json.loads((tmp_path / "report.json").read_text())["sections"]
    assert {section["status"] for section in sections.values()} == {"done"}
    rows = [row for section in sections.values() for row in section["rows"]]
    assert all(row.get("good", True) and "problem" not in row for row in rows), rows
    assert [row["case"] for row in sections["training"]["rows"]] == ["mixed_precision=no", "mixed_precision=bf16"]
    assert sections["processes"]["rows"][0]["case"] == "two processes, gloo"
    assert sum("steps/s" in row for row in sections["speed"]["rows"]) == 4
    text = (tmp_path / "report.md").read_text()
    assert all(f"## {name}: done" in text for name in sections)
    assert "| two processes, gloo |" in text


@pytest.mark.slow
def test_sections_after_the_limit_are_skipped(tmp_path):
    assert run(tmp_path, "--minutes", "0", "--sections", "goldens", "compiled").returncode == 0
    sections = json.loads((tmp_path / "report.json").read_text())["sections"]
    assert {name: section["status"] for name, section in sections.items()} == dict.fromkeys(sections, "skipped")
    assert list(sections) == ["goldens", "compiled"]


@pytest.mark.slow
def test_golden_outputs_are_compared(gpu, bench):
    gpu.run_sections(bench, ["goldens"])
    rows = {row["case"]: row for row in bench.report.sections["goldens"]["rows"]}
    assert bench.report.sections["goldens"]["status"] == "done"
    assert all(row["good"] for case, row in rows.items() if "bfloat16" not in case)
    for precision in ("autocast", "weights"):
        row = rows[f"tiny_384x640, bfloat16 {precision}"]
        assert 0 < row["error"] < 0.05
        assert 0.9 < row["equal pixels"] < 1


@pytest.fixture
def bench(gpu, tmp_path):
    options = argparse.Namespace(device="cpu", tiny=True, minutes=5.0)
    return gpu.Bench(options, gpu.Report(tmp_path / "report"), tmp_path)


def test_a_failed_section_loses_no_other(gpu, bench, monkeypatch):
    def fail(bench):
        bench.report.row("speed", case="first", seconds=0.123456)
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(gpu.SECTIONS, "speed", fail)
    monkeypatch.setitem(gpu.SECTIONS, "compiled", lambda bench: bench.report.row("compiled", case="second"))
    gpu.run_sections(bench, ["speed", "compiled"])
    sections = json.loads((bench.report.folder / "report.json").read_text())["sections"]
    assert sections["speed"]["status"] == "failed"
    assert sections["speed"]["error"] == "RuntimeError: no such kernel"
    assert sections["speed"]["rows"] == [{"case": "first", "seconds": 0.1235}]
    assert sections["compiled"]["status"] == "done"


def test_a_program_is_stopped_after_its_time(gpu, tmp_path):
    job = gpu.Job(["-c", "import time; print('started', flush=True); time.sleep(60)"], tmp_path / "log")
    assert job.wait(0.2) is None
    assert job.process.poll() is not None


def test_the_reason_of_a_failed_program_is_its_error(gpu, tmp_path):
    job = gpu.Job(["-c", "print('a'); raise ValueError('wrong')"], tmp_path / "log")
    assert job.wait(30) == 1
    assert job.reason() == "ValueError: wrong"


def test_costs_of_a_run_are_measured(bench):
    left, right = torch.randn(2, 16, 16)
    cost = bench.measure(lambda: left @ right)
    assert cost["operations"] == 2 * 16**3
    assert cost["seconds"] > 0
    assert cost["memory"] is None  # known on a GPU only
