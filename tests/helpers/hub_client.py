"""Trained models to publish, and processes that use a Hub of `hub_server`."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from hub_server import HubServer
from tiny_model import save_tiny_model

from ifseg_hf.modeling import IFSegForSemanticSegmentation
from ifseg_hf.processing import IFSegProcessor
from ifseg_hf.training.config import SETTINGS_FILE, TrainingConfig

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "scripts" / "push_to_hub.py")
# The first finder, so that the package cannot be imported, however it is installed.
BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ifseg_hf", "modeling", "processing"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
"""


def run_without_package(code: str, *arguments, home: Path) -> str:
    """Runs Python code in a process that cannot import this package, and returns what it prints."""
    home.mkdir(parents=True, exist_ok=True)
    (home / "sitecustomize.py").write_text(BLOCKED)
    environment = {**os.environ, "PYTHONPATH": str(home), "HF_HOME": str(home / "hf")}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def save_small_processor(folder: Path) -> IFSegProcessor:
    """Changes the processor in a folder to images of 64 pixels, and returns it."""
    processor = IFSegProcessor.from_pretrained(folder)
    processor.image_processor.size = {"shortest_edge": 64, "longest_edge": 256}
    processor.save_pretrained(folder)
    return processor


def save_tuned_model(folder: Path, categories, model: str = "ifseg-ofa-nano") -> Path:
    """Writes a folder as training does, with a model of random weights and files that must not be published."""
    save_tiny_model(folder)
    processor = save_small_processor(folder)
    tuned = IFSegForSemanticSegmentation.from_pretrained(folder)
    tuned.set_words(**processor.encode_categories(categories))
    tuned.save_pretrained(folder)
    settings = TrainingConfig(categories, str(folder), model=model, cpu=True, steps=7)
    (folder / SETTINGS_FILE).write_text(json.dumps(settings.to_dict()))
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "model.safetensors").write_bytes(b"a checkpoint")
    (folder / "events.log").write_text("log of a tracker")
    return folder


def save_supervised_model(folder: Path) -> Path:
    """Writes a folder as training on crops of images does."""
    save_tuned_model(folder, ["cat", "wet grass", "sky"])
    processor = IFSegProcessor.from_pretrained(folder)
    processor.image_processor.sliding_window, processor.image_processor.smoothing_iterations = 32, 0
    processor.save_pretrained(folder)
    settings = json.loads((folder / SETTINGS_FILE).read_text())
    settings |= {"stage": "supervised", "dataset": "streets"}
    (folder / SETTINGS_FILE).write_text(json.dumps(settings))
    return folder


def environment(hub: HubServer, home: Path, token: str | None = "hf_alice", package: bool = True, **variables) -> dict:
    """Environment variables of a process whose Hub is `hub`, with its own cache, with or without this package."""
    kept = {k: x for k, x in os.environ.items() if not k.startswith(("HF_", "HUGGING")) and "proxy" not in k.lower()}
    path = ROOT
    if not package:
        path = home / "blocked"
        path.mkdir(parents=True, exist_ok=True)
        (path / "sitecustomize.py").write_text(BLOCKED)
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(path)}
    timeouts = {"HF_HUB_ETAG_TIMEOUT": "60", "HF_HUB_DOWNLOAD_TIMEOUT": "60"}  # long enough for a busy machine
    threads = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**kept, **own, **timeouts, **threads, **({"HF_TOKEN": token} if token else {}), **variables}


def run(*command, cwd: Path, env: dict, **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=900, **kwargs)


def code_blocks(card: str) -> list[str]:
    """The Python code blocks of a model card, unchanged."""
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)
