"""Scripts of the project: as modules, for tests that call their functions, and as programs."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

SCRIPTS = Path(__file__).parents[2] / "scripts"


def load_script(name: str) -> ModuleType:
    """The module of `scripts/NAME.py`, not run as a program."""
    spec = importlib.util.spec_from_file_location(f"scripts_{name}", SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_script(name: str, *arguments) -> subprocess.CompletedProcess:
    """Runs a script of the project as a program, on the CPU."""
    command = [sys.executable, SCRIPTS / name, *arguments, "--cpu"]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True)


def evaluate(model: Path, dataset: Path, output_dir: Path, *arguments) -> dict:
    """The results of `scripts/eval.py`."""
    done = run_script("eval.py", "--model", model, "--dataset", dataset, "--output-dir", output_dir, *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads((output_dir / "results.json").read_text())
