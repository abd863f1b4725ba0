"""The report of a training run as one web page: curves, settings, time and memory."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from ifseg_hf.training.config import SETTINGS_FILE, private_settings
from ifseg_hf.training.log import read_log, read_usage
from ifseg_hf.visualization.curves import running_mean
from ifseg_hf.visualization.html_pages import line_chart, page_file, render_page

__all__ = ["write_training_report"]

_SECTIONS = {"summary": "Summary", "curves": "Curves", "evaluations": "Evaluations", "cost": "Time and memory"}


def write_training_report(run: str | Path, path: str | Path) -> Path:
    """
    Writes a run of training as one HTML file, with styles and curves inline, and returns the file.

    Args:
        run: output folder of `ifseg tune`; the run may be unfinished.
        path: the file, if it ends in .html; otherwise a folder, in which the file has the name of the run's folder.

    Raises:
        `ValueError`: the folder has no log of training, or a damaged file.
    """
    run = Path(run)
    file = page_file(path, run.resolve().name)
    page = training_page(run)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page, encoding="utf-8", errors="backslashreplace")
    return file


def training_page(run: Path) -> str:
    """Returns the page of [`write_training_report`]."""
    log, settings = read_log(run), _read_settings(run)
    parts = [part for part in read_usage(run) if part["last_step"] >= part["first_step"]]
    if not log:
        raise ValueError(f'The log of "{run}" has no step yet: draw the report when the run has begun.')
    known = ("mean_iou", "mean_iou_seen", "mean_iou_unseen", "harmonic_mean_iou")
    measured = [name for name in known if any(name in line for line in log)]
    titles = {name: name.replace("_", " ").replace("iou", "IoU") for name in measured}
    evaluated = [line for line in log if any(name in line for name in measured)]
    model = settings.get("model")
    started = f" from {Path(str(model)).name}" if model else ""
    words = list(settings.get("categories") or [])
    sections = [pair for pair in _SECTIONS.items() if evaluated or pair[0] != "evaluations"]
    return render_page(
        "training.html",
        title=f"Training run {run.resolve().name}",
        lead=f"{_stage(settings)}, {log[-1]['step']} of {settings.get('steps', '?')} steps{started}.",
        sections=[*sections, ("settings", "Settings")],
        summary=_summary(log, parts),
        categories=words,
        charts=_charts(log, titles),
        evaluation_titles=list(titles.values()),
        evaluations=[(x["step"], [f"{100 * x[n]:.1f}" if n in x else "-" for n in titles]) for x in evaluated],
        parts=[_part(part) for part in parts],
        settings=_setting_rows(settings),
    )


def _read_settings(run: Path) -> dict[str, Any]:
    """The settings of a run; {} if its folder has none. Raises `ValueError` for a damaged file."""
    file = run / SETTINGS_FILE
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f'"{file}" is damaged: it is not JSON.') from None


def _stage(settings: dict[str, Any]) -> str:
    stage = settings.get("stage", "word-maps")
    return {"word-maps": "Tuning on words alone", "supervised": "Training on images with masks"}.get(
        stage, "Training on images with pseudo-labels"
    )


def _summary(log: list[dict], parts: list[dict]) -> list[tuple[str, Any]]:
    """The numbers at the top: steps, loss, evaluation, time and memory."""
    losses = [line["loss"] for line in log if "loss" in line]
    ious = [(line["mean_iou"], line["step"]) for line in log if "mean_iou" in line]
    numbers: list[tuple[str, Any]] = [("steps", log[-1]["step"])]
    if losses:
        last = losses[-max(1, len(losses) // 10) :]
        numbers += [("last loss", f"{losses[-1]:.4f}"), ("mean loss of the last tenth", f"{np.mean(last):.4f}")]
    if ious:
        best, step = max(ious)
        numbers += [("last mean IoU, %", f"{100 * ious[-1][0]:.1f}"), (f"best, at step {step}, %", f"{100 * best:.1f}")]
    if parts:
        numbers += [("time", _duration(sum(part["seconds"] for part in parts)))]
        numbers += [("peak memory", _memory(max(part["peak_memory"] for part in parts)))]
    return numbers


def _charts(log: list[dict], titles: dict[str, str]) -> list[dict[str, Any]]:
    """The charts of loss, learning rate and evaluations."""

    def values(name: str) -> tuple[list[float], list[float]]:
        lines = [line for line in log if line.get(name) is not None]
        return [line["step"] for line in lines], [float(line[name]) for line in lines]

    charts = []
    steps, losses = values("loss")
    if steps:
        window = max(1, len(losses) // 20)
        mean = running_mean(np.array([losses]), window)[0].tolist()
        lines = {"each step": (steps, losses), "running mean": (steps, mean)}
        title = "Loss, and its running mean" if window > 1 else "Loss"
        charts.append({"title": title, "svg": line_chart(lines, pale=["each step"]), "legend": []})
    rates = values("learning_rate")
    if rates[0]:
        charts.append({"title": "Learning rate", "svg": line_chart({"learning rate": rates}), "legend": []})
    curves = {title: values(name) for name, title in titles.items() if name != "harmonic_mean_iou"}
    if curves:
        percents = {title: (x, [100 * value for value in y]) for title, (x, y) in curves.items()}
        charts.append({"title": "Mean IoU, %", "svg": line_chart(percents, dots=True), "legend": list(percents)})
    return charts


def _part(part: dict[str, Any]) -> dict[str, str]:
    """A row of the table of time and memory."""
    steps = part["last_step"] - part["first_step"] + 1
    processes = f"{part['processes']} x " if part["processes"] > 1 else ""
    precision = "" if part["mixed_precision"] == "no" else f", {part['mixed_precision']}"
    return {
        "steps": f"{part['first_step']} to {part['last_step']}",
        "time": _duration(part["seconds"]),
        "rate": f"{steps / part['seconds']:.2f}" if part["seconds"] else "-",
        "memory": _memory(part["peak_memory"]),
        "device": f"{processes}{part['device']}{precision}",
    }


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.1f} min" if minutes < 100 else f"{hours:.1f} h"


def _memory(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"


def _setting_rows(settings: dict[str, Any]) -> list[tuple[str, Any]]:
    """Name and value of the settings that do not describe the machine or its user."""
    private = private_settings() | {"categories"}
    rows = [(name, value) for name, value in settings.items() if name not in private and value is not None]
    return [(name, _shown(value)) for name, value in rows]


def _shown(value: Any) -> Any:
    """A setting as text: lists with commas, and the last part of a path of this machine."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
