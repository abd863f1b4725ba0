"""Pixel counts of an evaluation, shared by its processes and kept on disk, so that the evaluation can be resumed."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from accelerate import PartialState

from ifseg_hf.evaluation.examples import Example, ExtremeImages, read_examples
from ifseg_hf.evaluation.metrics import MeanIoU
from ifseg_hf.evaluation.report import Smoothing

__all__ = ["Counts"]


class Counts:
    """
    Confusion matrices, counted images and extreme images of this process and, in `folder`, of all other processes and
    earlier runs.

    Every process writes a separate file, which it replaces as a whole. The state is the sum over all files: they are
    never merged, moved or deleted, so the folder is valid whenever a process is killed.

    Args:
        folder: where the counts are kept; `None` keeps them in memory.
        settings: what the counts depend on, compared with the settings of earlier runs.
        smoothing: the settings that are counted separately.
        categories: number of categories.
        allow_no_category: whether predictions may have pixels without a category; see [`MeanIoU`].
        extreme_images: best and worst images of this process, kept with the counts.

    Attributes:
        metrics (`dict[Smoothing, MeanIoU]`), images (`list[int]`), skipped (`dict[int, str]`): confusion matrices,
            counted images and the error messages of skipped images, of this process.
        earlier (`set[int]`): images that earlier runs counted or skipped.

    Raises:
        `ValueError` if the folder holds an evaluation with other settings, or a damaged file.
    """

    def __init__(
        self,
        folder: Path | None,
        settings: dict,
        smoothing: Sequence[Smoothing],
        categories: int,
        allow_no_category: bool = False,
        extreme_images: ExtremeImages | None = None,
    ):
        self.extreme_images = extreme_images or ExtremeImages((), 0)
        self.smoothing = list(smoothing)
        self.metrics = {setting: MeanIoU(categories, allow_no_category=allow_no_category) for setting in self.smoothing}
        self.images: list[int] = []
        self.skipped: dict[int, str] = {}
        self.earlier: set[int] = set()
        self.file = None
        if folder is None:
            return
        state = PartialState()
        folder.mkdir(parents=True, exist_ok=True)
        _check_settings(folder / "settings.json", settings)
        state.wait_for_everyone()  # every process has compared the settings of earlier runs
        if state.is_main_process:
            (folder / "settings.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        parts = sorted(folder.glob("part-*.npz"))
        for part in parts:
            read = _read_part(part)
            self.earlier.update(read["images"].tolist(), read["skipped"].tolist())
        attempt = 1 + max((int(part.stem.split("-")[1]) for part in parts), default=0)
        state.wait_for_everyone()  # every process has seen the same files
        self.file = folder / f"part-{attempt}-{state.process_index}.npz"
        self.folder = folder

    def save(self) -> None:
        """Writes the counts of this process to its file."""
        if self.file is None:
            return
        content: dict[str, Any] = {f"matrix_{k}_{n}": self.metrics[k, n].confusion_matrix for k, n in self.smoothing}
        content |= {"images": np.array(self.images, np.int64), "skipped": np.array(list(self.skipped), np.int64)}
        content["messages"] = np.array(json.dumps(list(self.skipped.values())))
        content["examples"] = np.array(self.extreme_images.to_json())
        with open(self.file.with_suffix(".tmp"), "wb") as file:
            np.savez(file, **content)
            file.flush()
            os.fsync(file.fileno())
        self.file.with_suffix(".tmp").replace(self.file)

    def total(self) -> tuple[dict[Smoothing, np.ndarray], int, list[str]]:
        """Returns matrices, number of images and messages of skipped images, over all processes and runs."""
        if self.file is None:
            matrices = {setting: metric.confusion_matrix for setting, metric in self.metrics.items()}
            return matrices, len(self.images), list(self.skipped.values())
        PartialState().wait_for_everyone()
        parts = [_read_part(part) for part in sorted(self.folder.glob("part-*.npz"))]
        matrices = {(k, n): np.sum([part[f"matrix_{k}_{n}"] for part in parts], axis=0) for k, n in self.smoothing}
        return (
            matrices,
            sum(len(part["images"]) for part in parts),
            [message for part in parts for message in json.loads(str(part["messages"]))],
        )

    def examples(self) -> list[Example]:
        """Returns the extreme images of all processes and runs; none of runs of earlier versions."""
        if self.file is None:
            return self.extreme_images.kept
        parts = [_read_part(part) for part in sorted(self.folder.glob("part-*.npz"))]
        return read_examples(str(part["examples"]) for part in parts if "examples" in part)


def _read_part(file: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(file, allow_pickle=False) as part:
            return dict(part)
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise ValueError(f'"{file}" is damaged: delete it, and its images are counted again.') from error


def _check_settings(file: Path, settings: dict) -> None:
    """Raises `ValueError` if the folder holds an evaluation with other settings."""
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        changed = [name for name in settings if before.get(name) != json.loads(json.dumps(settings[name]))]
        if changed:
            raise ValueError(
                f'"{file.parent}" holds an evaluation with another {", ".join(changed)}: delete it or choose another '
                "output folder."
            )
