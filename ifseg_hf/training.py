"""Tuning on words alone (the paper, section 2.3): arguments, preparation, loop and result, in the order they happen."""

import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

from ifseg_hf.modeling.modeling_ifseg import IFSegForSemanticSegmentation
from ifseg_hf.processing.processing_ifseg import IFSegProcessor
from ifseg_hf.recipe import SETTINGS_FILE, WordMapTraining
from ifseg_hf.word_maps import word_map_labels, word_map_stream

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

__all__ = ["SettingError", "TrainingError", "TrainingResult", "WordMapTraining", "train"]


class SettingError(ValueError):
    """A setting that turned out to be wrong. The message is one line for a person."""


class TrainingError(RuntimeError):
    """Training that cannot go on. The message is one line for a person."""


@dataclass
class TrainingResult:
    """What a finished run has to say."""

    output_dir: str
    steps: int
    loss: float  # of the last step
    seconds: float  # in the loop
    peak_memory: int  # bytes: of the GPU, or of the process where there is none

    def __str__(self) -> str:
        return (
            f"{self.steps} steps in {self.seconds:.0f} s ({self.steps / self.seconds:.2f} steps/s), "
            f"last loss {self.loss:.4f}, peak memory {self.peak_memory / 2**30:.2f} GiB.\n"
            f"The tuned model is in {self.output_dir}. To use it:\n\n"
            f"    import ifseg_hf, transformers\n"
            f'    masks = transformers.pipeline("image-segmentation", model="{self.output_dir}")("photo.jpg")\n'
        )


def train(settings: WordMapTraining) -> TrainingResult:
    """Tunes a model on word maps of its categories and saves it, with its processor and words, in `output_dir`.

    Call it under `accelerate launch` for several processes; their number changes nothing in what is learnt from.

    Raises:
        `ValueError`: a setting is wrong; almost all are noticed before the weights are loaded.
        `TrainingError`: the loss is no longer finite, or the result cannot be saved.
    """
    settings.check()
    accelerator = make_accelerator(settings)
    batch_size = samples_per_batch(settings, accelerator.num_processes)

    # The seed is set before the model is made: a checkpoint of OFA has no segmentation positions, they start at random.
    set_seed(settings.seed)
    processor, model = load_model(settings)
    set_seed(settings.seed, device_specific=True)  # dropout differs between processes
    config = model.config
    if accelerator.is_main_process and not (Path(settings.output_dir) / SETTINGS_FILE).exists():
        write_settings(settings)  # a run that is cut short can be started again in the same folder

    stream = word_map_stream(
        num_words=len(config.word_ids or config.category_ids),
        seed=settings.seed,
        grid_size=config.grid_size,
        max_cells=settings.max_cells,
        word_categories=config.word_categories,
        block_size=batch_size,
    )
    # A generator of its own: starting workers must not move the one that draws dropout.
    loader = DataLoader(
        stream, batch_size=batch_size, num_workers=settings.dataloader_workers, generator=torch.Generator()
    )
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, settings.warmup_steps, settings.steps)
    model, optimizer, schedule, loader = accelerator.prepare(model, optimizer, schedule, loader)

    accelerator.print(
        f"Tuning {settings.model} on {len(config.category_ids)} categories: {settings.steps} steps of "
        f"{settings.batch_size} samples, {accelerator.num_processes} x {accelerator.device.type}, "
        f"mixed precision: {accelerator.mixed_precision}."
    )
    progress = tqdm(
        total=settings.steps,
        unit="step",
        bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]",
        mininterval=0.5 if sys.stderr.isatty() else 10,  # a log file gets a line now and then
        disable=not accelerator.is_main_process,
    )
    model.train()
    started = time.perf_counter()
    step = 0  # optimiser steps done
    step_loss = torch.zeros((), device=accelerator.device)
    try:
        for batch in loader:
            with accelerator.accumulate(model):
                labels = word_map_labels(
                    batch["word_map"], batch["grid_size"], config.image_size, config.word_categories
                )
                loss = model(word_map=batch["word_map"], labels=labels).loss
                accelerator.backward(loss)
                step_loss += loss.detach() / settings.gradient_accumulation_steps
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
                    last_loss = accelerator.reduce(step_loss, "mean").item()
                    check_finite(last_loss, norm, step + 1, accelerator)
                    step_loss.zero_()
                optimizer.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            accelerator.log({"loss": last_loss, "learning_rate": schedule.get_last_lr()[0]}, step=step + 1)
            schedule.step()
            step += 1
            progress.set_postfix(loss=f"{last_loss:.4f}", refresh=False)
            progress.update()
            if step == settings.steps:
                break
    except KeyboardInterrupt:
        progress.close()  # before the sentence, so that it stands below the bar
        accelerator.print(f"Stopped after {step} of {settings.steps} steps. Nothing was saved.")
        raise
    finally:
        progress.close()
    result = TrainingResult(
        settings.output_dir, settings.steps, last_loss, time.perf_counter() - started, peak_memory(accelerator.device)
    )
    save(settings, accelerator, model, processor)
    accelerator.print(result)
    return result


def make_accelerator(settings: WordMapTraining) -> Accelerator:
    """Accelerate with the settings that are its own. Each process draws its samples itself."""
    mixed_precision = settings.mixed_precision
    told = os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no"
    if mixed_precision is None and not told and not settings.cpu and torch.cuda.is_available():
        mixed_precision = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    trackers = [name.strip() for name in settings.report_to.split(",")] if settings.report_to else []
    try:
        accelerator = Accelerator(
            cpu=settings.cpu,
            mixed_precision=mixed_precision,
            gradient_accumulation_steps=settings.gradient_accumulation_steps,
            dataloader_config=DataLoaderConfiguration(dispatch_batches=False),
            step_scheduler_with_optimizer=False,  # the learning rate belongs to the step, whatever is skipped
            log_with=trackers or None,
            project_dir=settings.output_dir,
        )
    except ValueError as error:
        raise SettingError(" ".join(str(error).split())) from error
    if len(accelerator.log_with) < len(trackers):
        raise SettingError(f"report_to={settings.report_to}: the package of a tracker is not installed.")
    simple = {name: x for name, x in settings.to_dict().items() if isinstance(x, (int, float, str))}
    accelerator.init_trackers("ifseg", config=simple)
    return accelerator


def samples_per_batch(settings: WordMapTraining, processes: int) -> int:
    """Samples in a batch of one process, so that an optimiser step has `batch_size` of them in all."""
    size, rest = divmod(settings.batch_size, processes * settings.gradient_accumulation_steps)
    if rest:
        raise SettingError(
            f"batch_size={settings.batch_size} cannot be divided among {processes} processes and "
            f"{settings.gradient_accumulation_steps} accumulated batches."
        )
    return size


def load_model(settings: WordMapTraining) -> tuple[IFSegProcessor, IFSegForSemanticSegmentation]:
    """The processor, and the model in float32 with its words set and frozen as word maps want it."""
    try:
        processor = IFSegProcessor.from_pretrained(settings.model_path)
    except (OSError, ValueError) as error:
        raise SettingError(f'"{settings.model}" has no processor that can be loaded: {error}'[:500]) from error
    try:
        words = processor.encode_categories(settings.categories, settings.prompt, settings.append_unknown)
    except ValueError as error:
        raise SettingError(str(error)) from error
    try:
        model = IFSegForSemanticSegmentation.from_pretrained(
            settings.model_path,
            dtype=torch.float32,
            dropout=settings.dropout,
            encoder_drop_path_rate=settings.drop_path,
            decoder_drop_path_rate=settings.drop_path,
        )
    except OSError as error:
        raise SettingError(f'"{settings.model}" has no weights that can be loaded: {error}'[:500]) from error
    model.set_words(**words)
    model.freeze_for_word_maps()
    return processor, model


def check_finite(loss: float, norm: torch.Tensor, step: int, accelerator: Accelerator) -> None:
    """Raises `TrainingError` before a step that would spoil the weights."""
    # With fp16 a gradient that overflows is ordinary: accelerate skips the step and scales the loss down.
    if not math.isfinite(loss):
        what = "loss"
    elif accelerator.scaler is None and not math.isfinite(norm):
        what = "gradient"
    else:
        return
    raise TrainingError(
        f"The {what} is not finite at step {step}, after {step - 1} good ones. Nothing was saved. "
        f"A lower learning rate may help, or mixed precision switched off."
    )


def peak_memory(device: torch.device) -> int:
    """The most bytes that the run held: of the GPU or, on the CPU, of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def save(
    settings: WordMapTraining, accelerator: Accelerator, model: torch.nn.Module, processor: IFSegProcessor
) -> None:
    """Weights, words, processor and settings: a folder that runs by itself."""
    accelerator.wait_for_everyone()
    state_dict = accelerator.get_state_dict(model)  # gathered from every process where the weights are spread
    if accelerator.is_main_process:
        try:
            accelerator.unwrap_model(model).save_pretrained(settings.output_dir, state_dict=state_dict)
            processor.save_pretrained(settings.output_dir)
            write_settings(settings)
        except (OSError, SafetensorError) as error:
            raise TrainingError(f'The model could not be saved in "{settings.output_dir}": {error}') from error
    accelerator.end_training()


def write_settings(settings: WordMapTraining) -> None:
    """What the model was trained with. The file also marks its folder as one that training may write to again."""
    text = json.dumps(settings.to_dict(), indent=2, ensure_ascii=False)
    (Path(settings.output_dir) / SETTINGS_FILE).write_text(text + "\n", encoding="utf-8")
