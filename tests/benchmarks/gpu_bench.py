"""What the sections of `gpu.py` share: the report, the measurements, other programs, and models of random weights."""

import argparse
import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ifseg_hf.modeling import IFSegConfig, IFSegForSemanticSegmentation, OFAConfig
from ifseg_hf.processing.post_processing_ifseg import segmentation_maps


class Report:
    """Rows of results by section, printed and written to the output folder as they come."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.environment: dict[str, str] = {}
        self.sections: dict[str, dict] = {}

    def start(self, name: str, status: str = "running") -> None:
        self.sections[name] = {"status": status, "seconds": 0.0, "rows": [], "error": None}
        print(f"\n== {name}{': skipped' if status == 'skipped' else ''}", flush=True)
        self.write()

    def row(self, section: str, **values) -> None:
        """Adds a row to a section. Floats are rounded to four digits."""
        values = {name: float(f"{x:.4g}") if isinstance(x, float) else x for name, x in values.items()}
        self.sections[section]["rows"].append(values)
        print("   " + ", ".join(f"{name} {value}" for name, value in values.items() if value is not None), flush=True)
        self.write()

    def finish(self, name: str, seconds: float, error: str | None) -> None:
        self.sections[name].update(status="failed" if error else "done", seconds=round(seconds, 1), error=error)
        print(f"   {self.sections[name]['status']} in {seconds:.1f} s{f': {error}' if error else ''}", flush=True)
        self.write()

    def write(self) -> None:
        text = json.dumps({"environment": self.environment, "sections": self.sections}, indent=1)
        (self.folder / "report.json").write_text(text + "\n", encoding="utf-8")
        (self.folder / "report.md").write_text(self.markdown(), encoding="utf-8")

    def markdown(self) -> str:
        lines = [", ".join(f"{name} {value}" for name, value in self.environment.items()), ""]
        for name, section in self.sections.items():
            lines += [f"## {name}: {section['status']}, {section['seconds']} s", ""]
            if section["error"]:
                lines += [f"    {line}" for line in section["error"].splitlines()] + [""]
            columns = list(dict.fromkeys(key for row in section["rows"] for key in row))
            if columns:
                lines += [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
            for row in section["rows"]:
                cells = ("" if row.get(column) is None else str(row[column]) for column in columns)
                lines.append(f"| {' | '.join(cells)} |")
            lines.append("")
        return "\n".join(lines)


class Bench:
    """What the sections share: device, sizes, time limit, report and a folder for temporary files."""

    def __init__(self, options: argparse.Namespace, report: Report | None = None, folder: Path | None = None):
        self.device, self.tiny, self.report, self.folder = torch.device(options.device), options.tiny, report, folder
        self.end = time.monotonic() + 60 * options.minutes
        self.batch, self.side = (2, 64) if self.tiny else (16, 512)
        self.words = (3, 5) if self.tiny else (15, 171)
        self.jobs: dict[str, Job] = {}

    def left(self) -> float:
        """Seconds up to the limit."""
        return self.end - time.monotonic()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, run: Callable, repeats: int = 10, warm_up: int = 3) -> float:
        """Median seconds of a run."""
        if self.tiny:
            repeats, warm_up = 2, 1
        for _ in range(warm_up):
            run()
        times = []
        for _ in range(repeats):
            self.synchronize()
            start = time.perf_counter()
            run()
            self.synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def measure(self, run: Callable) -> dict[str, float | None]:
        """Seconds, peak memory in GB and floating-point operations of a run; memory is only known on a GPU."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = self.seconds(run)
        memory = torch.cuda.max_memory_allocated() / 1e9 if cuda else None
        operations = None
        try:
            with FlopCounterMode(display=False) as counter:
                run()
            operations = counter.get_total_flops()
        except Exception as error:  # the count of a kernel that this version of torch cannot count
            print(f"   operations not counted: {one_line(error)}", flush=True)
        return {"seconds": seconds, "memory": memory, "operations": operations}

    def half(self, precision: str) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "autocast")

    def free(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class Job:
    """A program that runs beside this one, in its own process group, with its output in a file."""

    def __init__(self, arguments: list[str], log: Path, environment: dict[str, str] | None = None):
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, *arguments],
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", **(environment or {})},
                start_new_session=True,
            )

    def wait(self, seconds: float) -> int | None:
        """The exit status, or None for a program that was stopped after `seconds`."""
        try:
            return self.process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            self.stop()
            return None

    def stop(self) -> None:
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def reason(self) -> str:
        """The lines of the output that tell why the program failed: those about errors, or else the last ones."""
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        telling = [line for line in lines if re.search(r"Error\b|^\w+\.py: |Duplicate GPU|error:", line)]
        kept = list(dict.fromkeys(telling))[:3] or lines[-3:]
        return " / ".join(line[:300] for line in kept)


def make_model(bench: Bench, words: int) -> IFSegForSemanticSegmentation:
    """OFA-base, or OFA-tiny with `--tiny`, with random weights and so many words of one token."""
    torch.manual_seed(0)
    config = OFAConfig.preset("tiny", encoder_layers=1, decoder_layers=1, trunk_depths=(1, 1, 1), image_size=64)
    config = config if bench.tiny else OFAConfig.preset("base")
    with bench.device:
        model = IFSegForSemanticSegmentation(IFSegConfig(backbone_config=config))
    set_words(model, words)
    return model.to(bench.device).eval()


def set_words(model: IFSegForSemanticSegmentation, words: int) -> None:
    ids = list(range(1000, 1000 + words))
    model.set_words(dict(enumerate(map(str, ids))), [[i] for i in ids], [0, *range(100, 110), *ids, 2])


def photo(bench: Bench, model, batch: int, side: int, labels: bool = True) -> Callable:
    """A run that segments a batch of images, with their label maps, smoothed, or up to the logits."""
    pixel_values = torch.randn(batch, 3, side, side, device=bench.device)

    @torch.no_grad()
    def run():
        outputs = model(pixel_values=pixel_values)
        return segmentation_maps(outputs, [(side, side)] * batch) if labels else outputs.logits

    return run


def word_map_step(bench: Bench, model, words: int, precision: str) -> Callable:
    """A run of one training step on word maps: forward, backward, clipping, AdamW."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=bench.device.type == "cuda" or None)
    word_map = torch.randint(0, words, (bench.batch, bench.side // 16, bench.side // 16), device=bench.device)
    labels = word_map.repeat_interleave(16, 1).repeat_interleave(16, 2)

    def run():
        with bench.half(precision):
            loss = model(word_map=word_map, labels=labels).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return run


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
