"""Files of a training run: checkpoints and the trained model, which never appear half-written."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from ifseg_hf.adapters import save_adapter
from ifseg_hf.loading import no_progress_bars
from ifseg_hf.modeling.configuration_ifseg import IFSegConfig
from ifseg_hf.modeling.modeling_ifseg import IFSegForSemanticSegmentation
from ifseg_hf.pretrained import ADAPTER_CONFIG
from ifseg_hf.processing.processing_ifseg import IFSegProcessor
from ifseg_hf.training.config import (
    CHECKPOINT_FILE,
    INCOMPLETE,
    SETTINGS_FILE,
    TrainingConfig,
    checkpoints,
    read_checkpoint,
)
from ifseg_hf.training.errors import SettingError, on_every_process, writing_errors

__all__ = [
    "describe_last",
    "drop_tied_weights",
    "load_checkpoint",
    "prepare_output",
    "pseudo_labels_name",
    "save_checkpoint",
    "save_lora",
    "save_model",
]


def prepare_output(config: TrainingConfig, step: int) -> None:
    """Writes the settings to the output folder, and deletes incomplete folders and old checkpoints of a killed run."""
    output = Path(config.output_dir)
    with writing_errors(f'The output folder "{output}" cannot be written to'):
        for folder in output.glob(f"*{INCOMPLETE}"):
            shutil.rmtree(folder, ignore_errors=True)
        prune(config, step)
        other = output / ("config.json" if config.lora else ADAPTER_CONFIG)
        if other.is_file():
            held = "a model and not an adapter" if config.lora else "an adapter and not a model"
            raise SettingError(f'The output folder "{output}" holds {held}: choose another.')
        if not (output / SETTINGS_FILE).exists():
            write_settings(config, output)


def save_checkpoint(
    accelerator: Accelerator, config: TrainingConfig, step: int, loss: float, last: Path | None
) -> Path:
    """Writes the full training state to `checkpoint-STEP`, and deletes older checkpoints beyond the limit.

    The folder gets its name once all its files are on the disk, so that a folder with that name is always complete.

    Raises `TrainingError` in every process if one of them cannot write; the `last` checkpoint is then kept.
    """
    output = Path(config.output_dir)
    folder, incomplete = output / f"checkpoint-{step}", output / f"checkpoint-{step}{INCOMPLETE}"
    failure = f'The checkpoint of step {step} could not be written to "{output}". {describe_last(last)} The reason'
    with on_every_process(accelerator), writing_errors(failure, incomplete):
        accelerator.save_state(incomplete)
    with on_every_process(accelerator), writing_errors(failure, incomplete):
        if accelerator.is_main_process:
            metadata = {
                "step": step,
                "loss": loss,
                "mixed_precision": accelerator.mixed_precision,
                "processes": accelerator.num_processes,
                "settings": config.to_dict(),
            }
            text = json.dumps(metadata, indent=2, ensure_ascii=False)
            (incomplete / CHECKPOINT_FILE).write_text(text, encoding="utf-8")
            for path in incomplete.rglob("*"):
                flush_to_disk(path)
            flush_to_disk(incomplete)
            if folder.exists():  # the run was resumed from an earlier checkpoint
                remove(folder)
            incomplete.rename(folder)
            flush_to_disk(output)
            prune(config, step)
    return folder


def prune(config: TrainingConfig, step: int) -> None:
    """Deletes the oldest checkpoints up to `step` beyond the limit, and pseudo-labels that no checkpoint needs.

    Checkpoints after `step` are of an earlier run and stay until this run reaches their steps.
    """
    older = [path for done, path in checkpoints(config.output_dir).items() if done < step]
    for path in older[: max(0, len(older) + 1 - config.checkpoints_total_limit)]:
        remove(path)
    oldest = min([step, *checkpoints(config.output_dir)])
    for path in Path(config.output_dir).glob(pseudo_labels_name("*")):
        # Pseudo-labels are used from their step to the next refresh. Those after `step` are of an earlier run.
        made = int(path.name.rpartition("-")[2])
        if made > step or made + config.refresh_every <= oldest:
            remove(path)


def pseudo_labels_name(step: int | str) -> str:
    """Name of the folder of pseudo-labels that were made after `step` steps."""
    return f"pseudo-labels-{step}"


def describe_last(checkpoint: Path | None) -> str:
    """A sentence for error messages about the last checkpoint."""
    return f"The last good checkpoint is {checkpoint}." if checkpoint else "There is no checkpoint of this run."


def drop_tied_weights(models: list, states: list[dict], folder: str) -> None:
    """Keeps one name of each tied weight in a checkpoint. accelerate would do the same, with a warning each time."""
    for state in states:
        names: dict[int, str] = {}
        for name in list(state):
            if names.setdefault(state[name].data_ptr(), name) != name:
                del state[name]


def load_checkpoint(accelerator: Accelerator, config: TrainingConfig, checkpoint: Path) -> None:
    """Restores all prepared objects and the random number generators. Raises `SettingError` if damaged."""
    metadata = read_checkpoint(checkpoint)
    try:
        accelerator.load_state(checkpoint)
    except Exception as error:  # a damaged file raises errors of many types in pickle, zip and safetensors
        reason = " ".join(str(error).split())[:300]
        raise SettingError(
            f'The checkpoint "{checkpoint}" cannot be loaded; delete it to continue from the one before: {reason}'
        ) from error
    accelerator.step = 0  # no batch is accumulated yet: checkpoints are written between optimiser steps
    if metadata["processes"] != accelerator.num_processes:
        # The checkpoint lacks the random states of this number of processes. The seed must differ from the seed of the
        # first step, or else its dropout would be repeated.
        set_seed(config.seed + metadata["step"], device_specific=True)


def save_model(
    config: TrainingConfig,
    model_config: IFSegConfig,
    state_dict: dict[str, torch.Tensor],
    processor: IFSegProcessor,
    last: Path | None,
) -> None:
    """Writes model, processor and settings to the output folder. Raises `TrainingError`."""

    def write(folder: Path) -> None:
        with torch.device("meta"):  # a model without weights, because FSDP changes the class of the trained one
            empty = IFSegForSemanticSegmentation(model_config)
        with no_progress_bars():
            empty.save_pretrained(folder, state_dict=state_dict)
        processor.save_pretrained(folder)

    _save_result(config, write, last)


def save_lora(
    config: TrainingConfig,
    model: IFSegForSemanticSegmentation,
    state_dict: dict[str, torch.Tensor],
    last: Path | None,
) -> None:
    """Writes the trained adapter with its words and settings to the output folder. Raises `TrainingError`."""
    _save_result(config, lambda folder: save_adapter(model, folder, state_dict), last)


def _save_result(config: TrainingConfig, write: Callable[[Path], None], last: Path | None) -> None:
    """Lets `write` fill a folder, adds the settings, and moves its files to the output folder when all are complete."""
    output = Path(config.output_dir)
    incomplete = output / f"result{INCOMPLETE}"
    failure = f'The model could not be saved in "{output}". {describe_last(last)} The reason'
    with writing_errors(failure, incomplete):
        write(incomplete)
        write_settings(config, incomplete)
        for path in incomplete.iterdir():
            flush_to_disk(path)
            path.replace(output / path.name)
        incomplete.rmdir()
        flush_to_disk(output)


def write_settings(config: TrainingConfig, folder: Path) -> None:
    """Writes the settings of the run. Their file also marks the folder as one that training may write to again."""
    settings = config.to_dict()
    del settings["resume"]  # does not affect the result
    text = json.dumps(settings, indent=2, ensure_ascii=False)
    (folder / SETTINGS_FILE).write_text(text + "\n", encoding="utf-8")


def flush_to_disk(path: Path) -> None:
    """Waits until a file, or the list of files of a folder, is on the disk. On Windows only files can be flushed."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(folder: Path) -> None:
    """Deletes a folder, renamed first, so that a half-deleted one is never taken for a checkpoint."""
    renamed = folder.rename(folder.with_name(f"{folder.name}.old{INCOMPLETE}"))
    shutil.rmtree(renamed, ignore_errors=True)  # the next run tries again
