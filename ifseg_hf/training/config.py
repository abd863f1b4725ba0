"""Training settings, with the published recipe for tuning on words alone as defaults.

Each setting is one field of [`TrainingConfig`]: its default, help, range, stages and privacy stand together, and the
checks, the command line and the model card read them from there.

Only the standard library and PyYAML are imported here, so that a script can reject a wrong setting before it imports
torch.
"""

import dataclasses
import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from ifseg_hf.data.image_files import ON_ERROR
from ifseg_hf.pretrained import ADAPTER_CONFIG, EMBEDDED, base_of_adapter, resolve_model
from ifseg_hf.training.checkpoint_files import CHECKPOINT_FILE, checkpoints, read_checkpoint
from ifseg_hf.training.settings import ON_IMAGES, STAGES, brief, convert, setting

SETTINGS_FILE = "training_config.json"  # beside a tuned model: the settings it was trained with
INCOMPLETE = ".incomplete"  # suffix of a folder that is being written or deleted
LORA_RANK = 4
LORA_RATE = 10  # learning rate of a LoRA adapter, as a multiple of the recipe's
PSEUDO_LABELS = "pseudo_labels"  # key of a dataset.json that `ifseg pseudo-label` wrote
OF_MASKS = "masks"  # key under it, if whole masks were labelled

DEFAULT_FREEZE = {"word-maps": "trunk", "supervised": "nothing", "self-training": "words"}


@dataclass
class TrainingConfig:
    """Settings of [`ifseg_hf.training.loop.train`]; the defaults are the published recipe.

    `categories` may be None if there is a `dataset`: its categories are then used. For training on images, a dict maps
    each word to the categories of the dataset that are labelled with this word.
    """

    categories: list[str] | dict[str, list[str]] | None = setting(  # noqa: RUF009
        MISSING,
        "comma-separated words; a file of one word per line, or YAML or JSON of category: [fine name, ...]; or ade20k, "
        "ade20k-hierarchy, coco-stuff, coco-stuff-coarse or coco-stuff-unseen (default: the categories of the dataset)",
    )
    output_dir: str = setting(MISSING, "folder for the tuned model and checkpoints", private=True, may_change=True)
    model: str = setting(EMBEDDED, "folder or Hub id of the model to start from", private=True)
    trust_remote_code: bool = setting(
        False, "run the code saved with the model, for a backbone that this package does not have", may_change=True
    )
    prompt: str | None = setting(None, "question before the words, or a template with {categories}", recipe=True)
    append_unknown: bool = setting(True, "end the prompt with the word unknown, which is never a category", recipe=True)
    background: list[str] | str | None = setting(  # noqa: RUF009
        None,
        "words that are merged into one label, background: default (sky, grass, wall, floor, ...), none, or words in "
        "the forms of categories",
        stages=["word-maps"],
    )
    stage: str = setting(
        "word-maps",
        "word-maps: words alone; supervised: images and masks; self-training: images and pseudo-labels",
        choices=STAGES,
    )
    dataset: str | None = setting(
        None, "images with masks: a folder with dataset.json, coco-stuff, ade20k, ... or owner/name on the Hub"
    )
    data_dir: str | None = setting(
        None, "folder that coco-stuff or ade20k was unpacked to", private=True, may_change=True
    )
    split: str | None = setting(None, "split of the dataset (default: train, if the dataset has splits)")
    unseen: str | None = setting(
        None,
        "categories whose labels are ignored: comma-separated, or the name of a subset of the dataset",
        stages=["supervised"],
    )
    crop_size: int | None = setting(
        None, "side of the square image crops (default: the model's image_size)", minimum=1, stages=ON_IMAGES
    )
    short_side: int | None = setting(
        None,
        "short side of images, before a random scale from 0.5 to 2 (default: the processor's)",
        minimum=1,
        stages=ON_IMAGES,
    )
    word_map_ratio: float = setting(
        0.0, "fraction of word maps among the samples; the others are images", minimum=0, below=1, stages=ON_IMAGES
    )
    loss_mean: str = setting(
        "labelled",
        "pixels of the images that the loss is a mean over: labelled, as published; or all, with 0 where there is no "
        "label, so that an image with few labels counts less",
        choices=["labelled", "all"],
        stages=ON_IMAGES,
    )
    freeze: str | None = setting(
        None,
        "nothing; words: their embeddings; or trunk: the words, the trunk and its projection (default: nothing when "
        "supervised, words in self-training)",
        choices=["nothing", "words", "trunk"],
        stages=ON_IMAGES,
    )
    from_scratch: bool = setting(
        False,
        "random weights, and batch norm statistics of the first crops; only configuration and processor are loaded",
        stages=ON_IMAGES,
    )
    refresh_every: int = setting(
        0, "steps between updates of the pseudo-labels by the model (0: never)", minimum=0, stages=["self-training"]
    )
    online_after: int = setting(
        0, "steps after which the model itself labels the crops (0: never)", minimum=0, stages=["self-training"]
    )
    on_error: str = setting(
        "fail",
        "for images that can't be read: fail, or skip, which trains and evaluates on the others",
        choices=ON_ERROR,
        stages=ON_IMAGES,
        may_change=True,
    )
    eval_steps: int = setting(
        0,
        "steps between evaluations on images with masks, the first before step 1 (0: never)",
        minimum=0,
        stages=ON_IMAGES,
        private=True,
        may_change=True,
    )
    eval_dataset: str | None = setting(
        None,
        "dataset to evaluate on, in the forms of dataset (default: the validation split of dataset)",
        stages=ON_IMAGES,
        private=True,
        may_change=True,
    )
    image_size: int | None = setting(
        None,
        "side of a square image in pixels, whose patch grid word maps have; other images are resized in proportion "
        "(default: the model's)",
        minimum=1,
        recipe=True,
    )
    decoder_positions: str | None = setting(
        None,
        "positions of the patches in OFA's decoder: segmentation, separate ones, or image, the encoder's (default: the "
        "model's)",
        choices=["segmentation", "image"],
        recipe=True,
    )
    decoder_cross_attention: bool | None = setting(
        None, "whether OFA's decoder attends to the encoder's output (default: whether the model's does)", recipe=True
    )
    max_cells: int | None = setting(
        None,
        "S, the largest side of the random grids of word maps (default: the side of a word map)",
        minimum=1,
        recipe=True,
    )
    random_cells: bool = setting(
        True, "draw the sizes of the grids; otherwise every grid has max_cells a side", recipe=True
    )
    lora: bool = setting(
        False,
        "train a LoRA adapter, a small file that also holds the words, and leave the model unchanged; its learning "
        f"rate is {LORA_RATE} times the recipe's",
        stages=["word-maps"],
    )
    lora_rank: int = setting(
        LORA_RANK, "rank of the LoRA adapter, with which its file grows", minimum=1, stages=["word-maps"]
    )
    seed: int = setting(0, "seed of the samples, new parameters and dropout", minimum=0)
    steps: int = setting(2000, "optimiser steps", minimum=1, recipe=True)
    batch_size: int = setting(
        16, "samples per optimiser step, over all processes and accumulated batches", minimum=1, recipe=True
    )
    gradient_accumulation_steps: int = setting(
        1, "batches accumulated for one optimiser step", minimum=1, may_change=True
    )
    learning_rate: float = setting(5e-5, "initial learning rate; decays to 0 along a cosine", above=0, recipe=True)
    warmup_steps: int = setting(0, "first steps, over which the learning rate rises from 0", minimum=0, recipe=True)
    weight_decay: float = setting(0.1, "weight decay of AdamW", minimum=0, recipe=True)
    adam_beta1: float = setting(0.9, "beta1 of AdamW", minimum=0, below=1, recipe=True)
    adam_beta2: float = setting(0.999, "beta2 of AdamW", minimum=0, below=1, recipe=True)
    adam_epsilon: float = setting(1e-8, "epsilon of AdamW", above=0, recipe=True)
    max_grad_norm: float = setting(1.0, "norm that gradients are clipped to", above=0, recipe=True)
    dropout: float = setting(0.1, "dropout rate", minimum=0, below=1, recipe=True)
    drop_path: float = setting(
        0.1,
        "stochastic depth rate of the last layer of encoder and decoder",
        minimum=0,
        below=1,
        recipe=True,
    )
    # A resumed run needs the same precision. The loop compares it, because the precision that None selects is known
    # only when training starts.
    mixed_precision: str | None = setting(
        None,
        "no, fp16 or bf16 (default: that of `accelerate launch`, else bf16 or fp16 on a GPU, no on a CPU)",
        choices=["no", "fp16", "bf16"],
        may_change=True,
        recipe=True,
    )
    dataloader_workers: int = setting(
        0, "processes that load samples, without effect on the samples", minimum=0, private=True, may_change=True
    )
    report_to: str | None = setting(
        None, "comma-separated trackers of accelerate (tensorboard, wandb, ...)", private=True, may_change=True
    )
    cpu: bool = setting(False, "train on the CPU even if there is a GPU", private=True, may_change=True)
    checkpointing_steps: int = setting(
        500,
        "steps between checkpoints; one is also written on Ctrl-C and SIGTERM (0: never)",
        minimum=0,
        private=True,
        may_change=True,
    )
    checkpoints_total_limit: int = setting(
        2, "number of checkpoints to keep, the newest", minimum=1, private=True, may_change=True
    )
    resume: str | None = setting(
        None,
        "continue from a checkpoint folder, or from the latest checkpoint in output_dir, if there is one",
        private=True,
        may_change=True,
        bare_flag="latest",
    )
    card_image: str | None = setting(
        None, "image, a file or URL, that the model card shows beside its segmentation", private=True, may_change=True
    )
    push_to_hub: str | None = setting(
        None, "publish the result in this Hub repository, owner/name", private=True, may_change=True
    )
    hub_private: bool | None = setting(
        None, "whether a new repository is private (default: its owner's default)", private=True, may_change=True
    )
    hub_revision: str | None = setting(None, "branch to publish on (default: main)", private=True, may_change=True)
    hub_commit_message: str | None = setting(None, "first line of the commit", private=True, may_change=True)

    @property
    def model_path(self) -> str:
        """Argument for `from_pretrained`. Raises `FileNotFoundError` as [`resolve_model`] does."""
        return str(resolve_model(self.model))

    @property
    def on_images(self) -> bool:
        """Whether the stage trains on images."""
        return self.stage in ON_IMAGES

    @property
    def frozen(self) -> str:
        """The frozen part of the model: `freeze`, or the stage's default."""
        return self.freeze or DEFAULT_FREEZE[self.stage]

    def to_dict(self) -> dict:
        """All settings by name."""
        return dataclasses.asdict(self)

    def check(self) -> None:
        """Checks all settings that can be checked before weights are loaded, and creates `output_dir`.

        Raises `ValueError`, with a message of one line.
        """
        self._check_values()
        self._check_stage()
        self._check_combinations()
        self._check_model()
        checkpoint = self.find_checkpoint()
        if checkpoint is not None:
            self._check_unchanged(checkpoint)
        self._check_output_dir()

    def find_checkpoint(self) -> Path | None:
        """The checkpoint to resume from; None to start at the first step.

        Raises `ValueError` if there is no checkpoint at the given path. With "latest", a run without checkpoints
        starts at the first step, so that the same command starts and resumes a run.
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

    def _check_values(self) -> None:
        """Checks each setting against its range and its choices."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            choices = field.metadata["choices"]
            if choices and value not in choices:
                raise ValueError(f'{field.name}="{value}": choose {", ".join(choices[:-1])} or {choices[-1]}.')
            minimum, above, below = (field.metadata[name] for name in ("minimum", "above", "below"))
            if minimum is None and above is None:
                continue
            large_enough = value > above if minimum is None else value >= minimum
            if not (large_enough and value < (float("inf") if below is None else below)):
                expected = f"more than {above}" if minimum is None else f"at least {minimum}"
                if below is not None:
                    expected = f"from {minimum} to less than {below}"
                raise ValueError(f"{field.name}={value}: must be {expected}.")

    def _check_stage(self) -> None:
        """Checks that settings of other stages have their defaults."""
        for field in dataclasses.fields(self):
            stages = field.metadata["stages"]
            if self.stage not in stages and getattr(self, field.name) != field.default:
                raise ValueError(f"{field.name} belongs to stage={' or '.join(stages)}, not to {self.stage}.")

    def _check_combinations(self) -> None:
        if self.dataset is None and self.on_images:
            raise ValueError(f"stage={self.stage} needs images: give a dataset (--dataset).")
        if self.dataset is None and self.categories is None:
            raise ValueError("There are no categories: give some (--categories) or a dataset (--dataset).")
        if self.categories is not None and len(self.categories) < 2 and self.background in (None, "none"):
            raise ValueError(
                "One category is not enough for segmentation: give at least two, or a background (--background "
                "default), which what is not asked for belongs to."
            )
        self._check_own_labels()
        if self.eval_dataset is not None and not self.eval_steps:
            raise ValueError(f'eval_dataset="{self.eval_dataset}" is for evaluations: give eval_steps.')
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"batch_size={self.batch_size} cannot be accumulated from gradient_accumulation_steps="
                f"{self.gradient_accumulation_steps} equal batches."
            )
        if self.lora_rank != LORA_RANK and not self.lora:
            raise ValueError(f"lora_rank={self.lora_rank} belongs to lora: give it, too (--lora).")
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps={self.warmup_steps}: must be fewer than steps={self.steps}.")

    def _check_own_labels(self) -> None:
        """Checks the settings with which the trained model predicts labels."""
        every, after = f"refresh_every={self.refresh_every}", f"online_after={self.online_after}"
        if self.refresh_every and self.online_after:
            raise ValueError(f"{every} and {after} both replace pseudo-labels: choose one.")
        if not (self.refresh_every or self.online_after):
            return
        given, labels = every if self.refresh_every else after, _pseudo_label_settings(self.dataset)
        if labels is None:
            raise ValueError(f'{given} needs pseudo-labels, and "{self.dataset}" is no folder of `ifseg pseudo-label`.')
        if OF_MASKS in labels:
            raise ValueError(f'{given} predicts pixels, and the labels of "{self.dataset}" are of whole masks.')
        if self.online_after >= self.steps:
            raise ValueError(f"{after}: must be fewer than steps={self.steps}.")

    def _check_model(self) -> None:
        """Checks the sizes against a model in a local folder; models on the Hub are not checked."""
        config = self._read_model_config()
        if config is None:
            return
        backbone = config.get("backbone_config") or config
        patch = patch_size(backbone)
        side = (self.image_size or backbone.get("image_size", 512)) // patch
        if self.image_size is not None and self.image_size % patch:
            raise ValueError(f"image_size={self.image_size}: must be a multiple of the model's patch size {patch}.")
        if self.max_cells is not None and self.max_cells > side:
            raise ValueError(f"max_cells={self.max_cells}: a word map of this model has at most {side} cells a side.")
        if self.crop_size is not None and self.crop_size % patch:
            raise ValueError(f"crop_size={self.crop_size}: must be a multiple of the model's patch size {patch}.")

    def _read_model_config(self) -> dict | None:
        """The config.json of a model in a local folder; None for a model on the Hub."""
        try:
            folder = Path(self.model_path)
        except FileNotFoundError as error:
            raise ValueError(str(error)) from None
        if not folder.is_dir():
            return None
        if (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file():
            raise ValueError(
                f'"{self.model}" is an adapter, which cannot be tuned further: tune the model that it was tuned on, '
                f'"{base_of_adapter(folder)}".'
            )
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except OSError:
            raise ValueError(f'"{self.model}" is not a model folder: it has no config.json that can be read.') from None
        except ValueError:
            raise ValueError(f'"{self.model}" is not a model folder: its config.json is not JSON.') from None
        if not isinstance(config, dict) or config.get("model_type") not in ("ifseg", "ofa"):
            raise ValueError(
                f'"{self.model}" holds no IFSeg model; `ifseg convert` converts a published OFA checkpoint.'
            )
        return config

    def _check_unchanged(self, checkpoint: Path) -> None:
        """Checks that the run of `checkpoint` had the same settings, but for those that may change."""
        before = read_checkpoint(checkpoint)["settings"]
        changed = []
        for field in dataclasses.fields(self):
            if field.metadata["may_change"]:
                continue
            was, now = before.get(field.name, field.default), getattr(self, field.name)
            same = was == now
            if field.name == "categories" and now is not None:
                same = same and list(was) == list(now)  # the order of a mapping counts, too
            elif field.name == "model" and not same:
                same = os.path.realpath(os.path.expanduser(was)) == os.path.realpath(self.model_path)
            if not same:
                changed.append(f"{field.name} (was {brief(was)}, is {brief(now)})")
        if changed:
            raise ValueError(
                f'The run of "{checkpoint}" cannot be resumed with other settings: {", ".join(changed)}. Give the '
                "earlier values, or start a run in another folder."
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
                f'The output folder "{output}" holds checkpoints of an earlier run: continue from them with --resume, '
                "delete them, or choose another folder."
            )
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f'The output folder "{output}" cannot be created: {error.strerror}.') from None
        if not os.access(output, os.W_OK | os.X_OK):
            raise ValueError(f'The output folder "{output}" cannot be written to.')


def private_settings() -> set[str]:
    """Names of the settings that describe the machine or the user, and are not published with a model."""
    return {field.name for field in dataclasses.fields(TrainingConfig) if field.metadata["private"]}


def patch_size(backbone: dict) -> int:
    """Side of a patch in pixels, from a backbone's config.json: `OFAConfig.patch_size` without importing torch."""
    if "patch_size" in backbone:
        return backbone["patch_size"]
    if backbone.get("trunk_type") == "efficientnet_lite":
        return 16
    return 4 * 2 ** (len(backbone.get("trunk_depths", (3, 4, 23))) - 1)


def _pseudo_label_settings(dataset: str) -> dict | None:
    """The settings in a folder that `ifseg pseudo-label` wrote; None for another dataset."""
    try:
        return json.loads((Path(dataset) / "dataset.json").read_text(encoding="utf-8")).get(PSEUDO_LABELS)
    except (OSError, ValueError):
        return None


# Settings in a file ---------------------------------------------------------------------------------------------------


def read_settings(path: str) -> dict[str, Any]:
    """The settings in a YAML or JSON file by name, such as the file that training writes beside its result.

    Raises `ValueError`, in one line, for a file that cannot be read, an unknown name, or a value of a wrong type.
    """
    import yaml

    try:
        given = yaml.safe_load(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f'The settings file "{path}" cannot be read: {error.strerror}.') from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f'"{path}" is not YAML or JSON: {" ".join(str(error).split())}.') from None
    if not isinstance(given, dict):
        raise ValueError(f'"{path}" holds no settings: write one per line, such as "steps: 2000".')
    return check_settings(given, f'In "{path}": ')


def check_settings(given: Mapping[str, Any], source: str = "") -> dict[str, Any]:
    """The settings by their names, each converted to the type of its field.

    Raises `ValueError`, in one line that begins with `source`, for an unknown name or a value of a wrong type.
    """
    known = {field.name: field for field in dataclasses.fields(TrainingConfig)}
    settings = {}
    for name, value in given.items():
        field = known.get(str(name).replace("-", "_"))
        if field is None:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f": {close[0]}?" if close else "."
            raise ValueError(f'{source}there is no setting "{name}"{hint}')
        settings[field.name] = convert(field, value, source)
    return settings
