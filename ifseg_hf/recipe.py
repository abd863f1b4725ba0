"""What a person can set about tuning on words alone, with the published recipe as defaults.

Only the standard library is imported here, so that a script can refuse a wrong setting before it imports torch.
"""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

EMBEDDED = "ifseg-ofa-nano"
SETTINGS_FILE = "word_map_training.json"


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class WordMapTraining:
    """The settings of [`ifseg_hf.training.train`]; the defaults are the published recipe."""

    categories: list[str] | dict[str, list[str]] = field(
        metadata={
            "help": "words with commas between them, or a file: one a line, or YAML or JSON of category: [fine, ...]"
        }
    )
    output_dir: str = field(metadata={"help": "folder for the tuned model"})
    model: str = _setting(EMBEDDED, "folder or Hub id of the model to start from")
    prompt: str | None = _setting(None, "question put to the model, before the words")
    append_unknown: bool = _setting(True, "end the prompt with the word unknown, which is never a category")
    max_cells: int | None = _setting(None, "S, the largest side of the random grids (default: the whole feature map)")
    seed: int = _setting(0, "of the word maps, new parameters and dropout")
    steps: int = _setting(2000, "optimiser steps")
    batch_size: int = _setting(16, "samples in an optimiser step, over all processes and accumulated batches")
    gradient_accumulation_steps: int = _setting(1, "batches accumulated for an optimiser step")
    learning_rate: float = _setting(5e-5, "at the start; falls to 0 like a cosine")
    warmup_steps: int = _setting(0, "steps over which the learning rate rises from 0 first")
    weight_decay: float = _setting(0.1, "of AdamW")
    adam_beta1: float = _setting(0.9, "of AdamW")
    adam_beta2: float = _setting(0.999, "of AdamW")
    adam_epsilon: float = _setting(1e-8, "of AdamW")
    max_grad_norm: float = _setting(1.0, "gradients are scaled down to this norm")
    dropout: float = _setting(0.1, "dropout rate")
    drop_path: float = _setting(0.1, "stochastic depth of the last layer of encoder and decoder")
    mixed_precision: str | None = _setting(
        None, "no, fp16 or bf16 (default: what `accelerate launch` was told, else bf16 or fp16 on a GPU, no on a CPU)"
    )
    dataloader_workers: int = _setting(0, "processes that draw word maps; the samples are the same for any number")
    report_to: str | None = _setting(None, "trackers of accelerate, with commas between them (tensorboard, wandb, ...)")
    cpu: bool = _setting(False, "train on the CPU even where there is a GPU")

    @property
    def model_path(self) -> str:
        """What `from_pretrained` takes."""
        return str(Path(__file__).parent / "nano" if self.model == EMBEDDED else Path(self.model).expanduser())

    def to_dict(self) -> dict:
        return asdict(self)

    def check(self) -> None:
        """Raises `ValueError`, in one line, for anything that can be known to be wrong before a weight is loaded.

        Makes `output_dir`.
        """
        self._check_numbers()
        if len(self.categories) < 2:
            raise ValueError("One category leaves nothing to tell apart: give at least two.")
        config = self._read_config()
        if config is not None:
            side = config.get("image_size", 512) // (4 * 2 ** (len(config.get("trunk_depths", (3, 4, 23))) - 1))
            if self.max_cells is not None and self.max_cells > side:
                raise ValueError(
                    f"max_cells={self.max_cells}: a word map of this model has {side} cells a side at most."
                )
        self._check_output_dir()

    def _check_numbers(self) -> None:
        for name in ("steps", "batch_size", "gradient_accumulation_steps"):
            self._require(name, lambda x: x >= 1, "at least 1")
        for name in ("seed", "warmup_steps", "weight_decay", "dataloader_workers"):
            self._require(name, lambda x: x >= 0, "at least 0")
        for name in ("learning_rate", "adam_epsilon", "max_grad_norm"):
            self._require(name, lambda x: x > 0, "more than 0")
        for name in ("adam_beta1", "adam_beta2", "dropout", "drop_path"):
            self._require(name, lambda x: 0 <= x < 1, "from 0 to less than 1")
        if self.max_cells is not None:
            self._require("max_cells", lambda x: x >= 1, "at least 1")
        if self.mixed_precision not in (None, "no", "fp16", "bf16"):
            raise ValueError(f'mixed_precision="{self.mixed_precision}": choose no, fp16 or bf16.')
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"batch_size={self.batch_size} cannot be accumulated from gradient_accumulation_steps="
                f"{self.gradient_accumulation_steps} equal batches."
            )
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps={self.warmup_steps}: must be fewer than steps={self.steps}.")

    def _require(self, name: str, holds: Any, expected: str) -> None:
        value = getattr(self, name)
        if not (holds(value) and value < float("inf")):
            raise ValueError(f"{name}={value}: must be {expected}.")

    def _read_config(self) -> dict | None:
        """The configuration of a model in a local folder; None for one on the Hub."""
        folder = Path(self.model_path)
        if not folder.is_dir():
            if self.model.count("/") == 1 and not self.model.startswith((".", "/", "~")):
                return None
            raise ValueError(f'There is no model folder "{self.model}".')
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except OSError:
            raise ValueError(f'"{self.model}" is not a model folder: it has no config.json that can be read.') from None
        except ValueError:
            raise ValueError(f'"{self.model}" is not a model folder: its config.json is not JSON.') from None
        if not isinstance(config, dict) or config.get("model_type") != "ifseg":
            raise ValueError(
                f'"{self.model}" holds no IFSeg model; scripts/convert_ofa.py makes one of an OFA checkpoint.'
            )
        return config

    def _check_output_dir(self) -> None:
        output = Path(self.output_dir)
        if output.is_dir() and any(output.iterdir()) and not (output / SETTINGS_FILE).is_file():
            raise ValueError(
                f'The output folder "{output}" holds files that are no result of training: choose another.'
            )
        if output.resolve() == Path(self.model_path).resolve():
            raise ValueError(f'The output folder "{output}" is the model to start from: choose another.')
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f'The output folder "{output}" cannot be made: {error.strerror}.') from None
        if not os.access(output, os.W_OK | os.X_OK):
            raise ValueError(f'The output folder "{output}" cannot be written to.')
