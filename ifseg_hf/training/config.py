"""What a person can set about training, with the published recipe of tuning on words alone as defaults.

Only the standard library and PyYAML are imported here, so that a script can refuse a wrong setting before it imports
torch.
"""

import difflib
import json
import os
import re
import typing
from collections.abc import Callable
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ifseg_hf.pretrained import EMBEDDED, resolve_model

SETTINGS_FILE = "word_map_training.json"
CHECKPOINT_FILE = "checkpoint.json"  # in every checkpoint: the step, and the settings that led there
INCOMPLETE = ".incomplete"  # ends the name of a folder that is being written or deleted
STAGES = ("word-maps", "supervised", "self-training")
FREEZE = {"nothing": "supervised", "words": "self-training", "trunk": "word-maps"}  # and the stage it is the default of
PSEUDO_LABELS = "pseudo_labels"  # key of a dataset.json that scripts/pseudo_label.py wrote


def _setting(default: Any, help: str, may_change: bool = False) -> Any:
    """`may_change`: by a run that goes on from a checkpoint."""
    return field(default=default, metadata={"help": help, "may_change": may_change})


@dataclass
class TrainingConfig:
    """The settings of [`ifseg_hf.training.loop.train`]; the defaults are the published recipe.

    `categories` may be None where there is a `dataset`: its own. With photos a dict says which names of the data set
    count as each word.
    """

    categories: list[str] | dict[str, list[str]] | None = field(
        metadata={
            "help": "words with commas between them; a file: one a line, or YAML or JSON of category: [fine, ...]; or "
            "one of ade20k, coco-stuff, coco-stuff-coarse, coco-stuff-unseen (default: the names of the data set)"
        }
    )
    output_dir: str = field(metadata={"help": "folder for the tuned model and the checkpoints", "may_change": True})
    model: str = _setting(EMBEDDED, "folder or Hub id of the model to start from")
    prompt: str | None = _setting(None, "question put to the model, before the words")
    append_unknown: bool = _setting(True, "end the prompt with the word unknown, which is never a category")
    stage: str = _setting(
        "word-maps", "word-maps: words alone; supervised: photos and masks; self-training: photos and pseudo-labels"
    )
    dataset: str | None = _setting(
        None, "photos with masks: a folder with dataset.json, coco-stuff, ade20k, ... or owner/name on the Hub"
    )
    data_dir: str | None = _setting(None, "folder that coco-stuff or ade20k was unpacked to", may_change=True)
    split: str | None = _setting(None, "part of the data set (default: train, where there are parts)")
    unseen: str | None = _setting(
        None,
        "categories whose labels are not looked at, with commas between them, or the data set's subset of that name",
    )
    crop_size: int | None = _setting(None, "side of the square crops of photos (default: the model's image_size)")
    short_side: int | None = _setting(
        None, "short side of photos, before a random scale from 0.5 to 2 (default: the processor's)"
    )
    word_map_ratio: float = _setting(0.0, "share of word maps among the samples, the rest being photos")
    freeze: str | None = _setting(
        None,
        "nothing; words: their embeddings; or trunk: the words, the trunk and its projection (default: nothing when "
        "supervised, words in self-training)",
    )
    from_scratch: bool = _setting(
        False, "random weights, with batch norms of the first crops, and of the model only its configuration, processor"
    )
    refresh_every: int = _setting(0, "steps after which the model makes the pseudo-labels anew, each time (0: never)")
    eval_steps: int = _setting(
        0, "steps between evaluations on photos with masks, the first before step 1 (0: never)", may_change=True
    )
    eval_dataset: str | None = _setting(
        None, "what to evaluate on, given as dataset is (default: its validation photos)", may_change=True
    )
    max_cells: int | None = _setting(None, "S, the largest side of the random grids (default: the whole feature map)")
    random_cells: bool = _setting(True, "random sizes of the grids; without it all are as large as max_cells")
    seed: int = _setting(0, "of the samples, new parameters and dropout")
    steps: int = _setting(2000, "optimiser steps")
    batch_size: int = _setting(16, "samples in an optimiser step, over all processes and accumulated batches")
    gradient_accumulation_steps: int = _setting(1, "batches accumulated for an optimiser step", may_change=True)
    learning_rate: float = _setting(5e-5, "at the start; falls to 0 like a cosine")
    warmup_steps: int = _setting(0, "steps over which the learning rate rises from 0 first")
    weight_decay: float = _setting(0.1, "of AdamW")
    adam_beta1: float = _setting(0.9, "of AdamW")
    adam_beta2: float = _setting(0.999, "of AdamW")
    adam_epsilon: float = _setting(1e-8, "of AdamW")
    max_grad_norm: float = _setting(1.0, "gradients are scaled down to this norm")
    dropout: float = _setting(0.1, "dropout rate")
    drop_path: float = _setting(0.1, "stochastic depth of the last layer of encoder and decoder")
    word_noise: float = _setting(
        0.0, "noise on the patches of word maps: its deviation as a share of the distance between two words"
    )
    # It may not change either, but what None stands for is known only later: training.py compares it.
    mixed_precision: str | None = _setting(
        None,
        "no, fp16 or bf16 (default: what `accelerate launch` was told, else bf16 or fp16 on a GPU, no on a CPU)",
        may_change=True,
    )
    dataloader_workers: int = _setting(
        0, "processes that draw samples; these are the same for any number", may_change=True
    )
    report_to: str | None = _setting(
        None, "trackers of accelerate, with commas between them (tensorboard, wandb, ...)", may_change=True
    )
    cpu: bool = _setting(False, "train on the CPU even where there is a GPU", may_change=True)
    checkpointing_steps: int = _setting(
        500, "steps between checkpoints, of which one is also written on Ctrl-C and SIGTERM (0: never)", may_change=True
    )
    checkpoints_total_limit: int = _setting(2, "checkpoints to keep, the newest", may_change=True)
    resume: str | None = _setting(
        None, "go on from a checkpoint's folder, or from the latest in output_dir, if there is one", may_change=True
    )
    push_to_hub: str | None = _setting(
        None, "publish the result in this repository of the Hub, owner/name", may_change=True
    )
    hub_private: bool | None = _setting(
        None, "whether a new repository is private (default: as its owner has set)", may_change=True
    )
    hub_revision: str | None = _setting(None, "branch to publish on (default: main)", may_change=True)
    hub_commit_message: str | None = _setting(None, "first line of the commit", may_change=True)

    @property
    def model_path(self) -> str:
        """What `from_pretrained` takes. Raises `FileNotFoundError` as [`resolve_model`] does."""
        return str(resolve_model(self.model))

    def to_dict(self) -> dict:
        return asdict(self)

    def check(self) -> None:
        """Raises `ValueError`, in one line, for anything that can be known to be wrong before a weight is loaded.

        Makes `output_dir`.
        """
        self._check_numbers()
        self._check_stage()
        if self.categories is not None and len(self.categories) < 2:
            raise ValueError("One category leaves nothing to tell apart: give at least two.")
        config = self._read_config()
        if config is not None:
            patch = 4 * 2 ** (len(config.get("trunk_depths", (3, 4, 23))) - 1)
            side = config.get("image_size", 512) // patch
            if self.max_cells is not None and self.max_cells > side:
                raise ValueError(
                    f"max_cells={self.max_cells}: a word map of this model has {side} cells a side at most."
                )
            if self.crop_size is not None and self.crop_size % patch:
                raise ValueError(f"crop_size={self.crop_size}: must be a multiple of the model's patches of {patch}.")
        checkpoint = self.checkpoint()
        if checkpoint is not None:
            self._check_unchanged(checkpoint)
        self._check_output_dir()

    def checkpoint(self) -> Path | None:
        """The checkpoint that `resume` asks for; None to start at the first step.

        Raises `ValueError` if there is none at the path given. "latest" starts at the first step where there is none,
        so that a run which is to survive anything is begun and gone on with by the same command.
        """
        if self.resume is None:
            return None
        folder = Path(self.output_dir if self.resume == "latest" else self.resume).expanduser()
        if (folder / CHECKPOINT_FILE).is_file():
            return folder
        found = checkpoints(folder)
        if not found:
            if self.resume == "latest":
                return None
            raise ValueError(f'"{self.resume}" is no checkpoint of training, nor a folder that holds one.')
        return found[max(found)]

    @property
    def on_images(self) -> bool:
        return self.stage != "word-maps"

    @property
    def frozen(self) -> str:
        """`freeze`, or what it is by default: a key of `FREEZE`."""
        return self.freeze or next(part for part, stage in FREEZE.items() if stage == self.stage)

    def _check_stage(self) -> None:
        if self.stage not in STAGES:
            raise ValueError(f'stage="{self.stage}": choose {", ".join(STAGES[:-1])} or {STAGES[-1]}.')
        if self.dataset is None and (self.on_images or self.categories is None):
            missing = f"stage={self.stage} needs photos" if self.on_images else "There are no categories"
            raise ValueError(f"{missing}: give a dataset (--dataset).")
        if self.freeze is not None and self.freeze not in FREEZE:
            raise ValueError(f'freeze="{self.freeze}": choose {", ".join(FREEZE)}.')
        users = {"unseen": STAGES[1:2], "refresh_every": STAGES[2:], "from_scratch": STAGES[1:]}
        photos = ("crop_size", "short_side", "word_map_ratio", "freeze", "eval_steps", "eval_dataset")
        users |= dict.fromkeys(photos, STAGES[1:])
        for setting in fields(self):
            stages = users.get(setting.name)
            if stages and self.stage not in stages and getattr(self, setting.name) != setting.default:
                raise ValueError(f"{setting.name} belongs to stage={' or '.join(stages)}, not to {self.stage}.")
        if self.refresh_every:
            self._check_refresh()
        if self.eval_dataset is not None and not self.eval_steps:
            raise ValueError(f'eval_dataset="{self.eval_dataset}" is for evaluations: give eval_steps.')

    def _check_refresh(self) -> None:
        """Only folders of scripts/pseudo_label.py say which labels are given and which are guesses."""
        try:
            told = json.loads((Path(self.dataset) / "dataset.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            told = {}
        if PSEUDO_LABELS not in told:
            raise ValueError(
                f'refresh_every={self.refresh_every} needs pseudo-labels, and "{self.dataset}" is no folder of '
                "scripts/pseudo_label.py."
            )

    def _check_numbers(self) -> None:
        for name in ("steps", "batch_size", "gradient_accumulation_steps", "checkpoints_total_limit"):
            self._require(name, lambda x: x >= 1, "at least 1")
        not_negative = ("seed", "warmup_steps", "weight_decay", "dataloader_workers", "checkpointing_steps")
        for name in (*not_negative, "word_noise", "refresh_every", "eval_steps"):
            self._require(name, lambda x: x >= 0, "at least 0")
        for name in ("learning_rate", "adam_epsilon", "max_grad_norm"):
            self._require(name, lambda x: x > 0, "more than 0")
        for name in ("adam_beta1", "adam_beta2", "dropout", "drop_path", "word_map_ratio"):
            self._require(name, lambda x: 0 <= x < 1, "from 0 to less than 1")
        for name in ("max_cells", "crop_size", "short_side"):
            if getattr(self, name) is not None:
                self._require(name, lambda x: x >= 1, "at least 1")
        if self.mixed_precision not in (None, "no", "fp16", "bf16"):
            raise ValueError(f'mixed_precision="{self.mixed_precision}": choose no, fp16 or bf16.')
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"batch_size={self.batch_size} cannot be accumulated from gradient_accumulation_steps="
                f"{self.gradient_accumulation_steps} equal batches."
            )
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps={self.warmup_steps}: must be fewer than steps={self.steps}.")

    def _require(self, name: str, holds: Callable[[Any], bool], expected: str) -> None:
        value = getattr(self, name)
        if not (holds(value) and value < float("inf")):
            raise ValueError(f"{name}={value}: must be {expected}.")

    def _read_config(self) -> dict | None:
        """The configuration of a model in a local folder; None for one on the Hub."""
        try:
            folder = Path(self.model_path)
        except FileNotFoundError as error:
            raise ValueError(str(error)) from None
        if not folder.is_dir():
            return None
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

    def _check_unchanged(self, checkpoint: Path) -> None:
        before = read_checkpoint(checkpoint)["settings"]
        changed = []
        for setting in fields(self):
            if setting.metadata.get("may_change"):
                continue
            was, now = before.get(setting.name, setting.default), getattr(self, setting.name)
            same = was == now
            if setting.name == "categories" and now is not None:
                same = same and list(was) == list(now)  # their order counts, in a mapping too
            elif setting.name == "model" and not same:
                same = os.path.realpath(os.path.expanduser(was)) == os.path.realpath(self.model_path)
            if not same:
                changed.append(f"{setting.name} (was {_brief(was)}, is {_brief(now)})")
        if changed:
            raise ValueError(
                f'The run of "{checkpoint}" cannot go on with other settings: {", ".join(changed)}. Give them as they '
                "were, or begin a run in another folder."
            )

    def _check_output_dir(self) -> None:
        output = Path(self.output_dir)
        if output.is_dir() and any(output.iterdir()) and not (output / SETTINGS_FILE).is_file():
            raise ValueError(
                f'The output folder "{output}" holds files that are no result of training: choose another.'
            )
        if output.resolve() == Path(self.model_path).resolve():
            raise ValueError(f'The output folder "{output}" is the model to start from: choose another.')
        if self.resume is None and checkpoints(output):
            raise ValueError(
                f'The output folder "{output}" holds checkpoints of an earlier run: go on from them with --resume, '
                "delete them, or choose another folder."
            )
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f'The output folder "{output}" cannot be made: {error.strerror}.') from None
        if not os.access(output, os.W_OK | os.X_OK):
            raise ValueError(f'The output folder "{output}" cannot be written to.')


# Checkpoints ----------------------------------------------------------------------------------------------------------


def checkpoints(folder: str | Path) -> dict[int, Path]:
    """The complete checkpoints in `folder` by their step."""
    names = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in Path(folder).glob("checkpoint-*")}
    found = {int(name[1]): path for path, name in names.items() if name and (path / CHECKPOINT_FILE).is_file()}
    return dict(sorted(found.items()))


def read_checkpoint(checkpoint: Path) -> dict:
    """What a checkpoint says about itself. Raises `ValueError`, in one line, if it says nothing."""
    try:
        told = json.loads((checkpoint / CHECKPOINT_FILE).read_text(encoding="utf-8"))
        return {**told, "step": int(told["step"]), "settings": dict(told["settings"])}
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f'The checkpoint "{checkpoint}" is damaged: its {CHECKPOINT_FILE} cannot be read.') from None


def _brief(value: Any) -> str:
    if isinstance(value, (list, dict)):
        names = list(value)
        return f"{len(names)}: {', '.join(names[:3])}{', ...' * (len(names) > 3)}"
    return json.dumps(value, ensure_ascii=False)


# Settings in a file ---------------------------------------------------------------------------------------------------


def read_settings(path: str) -> dict[str, Any]:
    """The settings that a YAML or JSON file gives by name, such as the one that training leaves beside its result.

    Raises `ValueError`, in one line, for a file that cannot be read, an unknown name, or a value of the wrong kind.
    """
    import yaml

    try:
        given = yaml.safe_load(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f'The settings\' file "{path}" cannot be read: {error.strerror}.') from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f'"{path}" is not YAML or JSON: {" ".join(str(error).split())}.') from None
    if not isinstance(given, dict):
        raise ValueError(f'"{path}" holds no settings: write one a line, such as "steps: 2000".')
    known = {setting.name: setting for setting in fields(TrainingConfig)}
    settings = {}
    for name, value in given.items():
        setting = known.get(str(name).replace("-", "_"))
        if setting is None:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f": {close[0]}?" if close else "."
            raise ValueError(f'In "{path}": there is no setting "{name}"{hint}')
        settings[setting.name] = _convert(setting, value, path)
    return settings


def _convert(setting: Field, value: Any, path: str) -> Any:
    """The value as its setting has it; YAML reads 5e-5 as text."""
    kinds = typing.get_args(setting.type) or (setting.type,)
    if setting.default is MISSING and setting.name == "categories":
        kinds = (str, list, dict, type(None))
    if (value is None and type(None) in kinds) or type(value) in kinds:
        return value
    if float in kinds and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", list: "a list", dict: ""}
    expected = next(names[kind] for kind in kinds if kind in names)
    raise ValueError(f'In "{path}": {setting.name} is {value!r}, but must be {expected}.')


# lead: take the training branch's version
def private_settings() -> set[str]:
    """The names of the settings that describe the machine or the person and not the model."""
    return {
        *("output_dir", "model", "data_dir", "cpu", "dataloader_workers", "report_to"),
        *("eval_steps", "eval_dataset", "checkpointing_steps", "checkpoints_total_limit", "resume"),
        *("push_to_hub", "hub_private", "hub_revision", "hub_commit_message"),
    }
