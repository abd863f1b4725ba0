"""Training on words alone (the paper, section 2.3) or on photos: preparation, loop and result, in their order.

The loop is one; the stage chooses what it reads, what is trained, and what the result knows of inference.
"""

import copy
import importlib.util
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import DistributedType, parse_flag_from_env, set_seed
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

from ifseg_hf.data.crops import (
    CropDataset,
    MixedDataset,
    collate_samples,
    find_labels,
    load_training_dataset,
    load_validation_dataset,
)
from ifseg_hf.data.segmentation import BENCHMARKS, SampleError, SegmentationDataset, load_segmentation_dataset
from ifseg_hf.data.word_maps import WordMapSampler, word_map_labels, word_map_stream
from ifseg_hf.hub.publish import push_to_hub
from ifseg_hf.modeling.configuration_ifseg import IFSegConfig
from ifseg_hf.modeling.modeling_ifseg import IFSegForSemanticSegmentation
from ifseg_hf.processing.processing_ifseg import IFSegProcessor
from ifseg_hf.training.batch_norm import calibrate_batch_norm, train_batch_norm, trunk_state
from ifseg_hf.training.config import (
    CHECKPOINT_FILE,
    INCOMPLETE,
    SETTINGS_FILE,
    TrainingConfig,
    checkpoints,
    read_checkpoint,
)
from ifseg_hf.training.log import TrainingLog
from ifseg_hf.training.pseudo_labels import refresh_labels

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

__all__ = ["SettingError", "TrainingConfig", "TrainingError", "TrainingResult", "TrainingStopped", "train"]


class SettingError(ValueError):
    """A setting that turned out to be wrong. The message is one line for a person."""


class TrainingError(RuntimeError):
    """Training that cannot go on. The message is one line for a person."""


class TrainingStopped(KeyboardInterrupt):
    """Training was told to stop, by Ctrl-C or SIGTERM, and did after a step."""

    def __init__(self, signal_number: int):
        super().__init__(signal_number)
        self.signal_number = signal_number


@dataclass
class TrainingResult:
    """What a finished run has to say."""

    output_dir: str
    steps: int
    loss: float  # of the last step
    seconds: float  # in the loop
    peak_memory: int  # bytes: of the GPU, or of the process where there is none
    resumed_at: int = 0  # step of the checkpoint that the run went on from

    def __str__(self) -> str:
        done = self.steps - self.resumed_at
        resumed = f" (the last {done} of {self.steps})" if self.resumed_at else ""
        return (
            f"{done} steps{resumed} in {self.seconds:.0f} s ({done / self.seconds:.2f} steps/s), "
            f"last loss {self.loss:.4f}, peak memory {self.peak_memory / 2**30:.2f} GiB.\n"
            f"The tuned model is in {self.output_dir}. To use it:\n\n"
            f"    import ifseg_hf, transformers\n"
            f'    masks = transformers.pipeline("image-segmentation", model="{self.output_dir}")("photo.jpg")\n'
        )


def train(settings: TrainingConfig) -> TrainingResult:
    """Trains a model, on word maps of its categories or on photos, and saves it with its processor and words.

    Call it under `accelerate launch` for several processes; their number changes nothing in what is learnt from. A run
    that was stopped or killed goes on from its last checkpoint with `resume="latest"`, and ends as if it had not been.

    Raises:
        `ValueError`: a setting is wrong; almost all are noticed before the weights are loaded.
        `TrainingError`: the loss is no longer finite, or a checkpoint or the result cannot be saved.
        `HubError`: the result could not be published. It is in `output_dir` all the same.
        `TrainingStopped`: on Ctrl-C or SIGTERM, once the step is done and a checkpoint written. A second signal
            of the kind, more than two seconds later, interrupts at once.
    """
    settings.check()
    checkpoint = settings.checkpoint()
    data = load_data(settings)
    eval_data = load_eval_data(settings, data)
    accelerator = make_accelerator(settings)
    stopped = None
    try:
        result = tune(settings, accelerator, checkpoint, data, eval_data)
    except TrainingStopped as error:
        stopped = error.with_traceback(None)
    # What `tune` prepared has to go before the processes part: with torch 2.13 the wrapper of a distributed model, as
    # the last to know their group, may wait for ever for a thread that waits for it.
    accelerator.free_memory()
    accelerator.end_training()
    if stopped:
        raise stopped
    accelerator.print(result)
    if settings.push_to_hub and accelerator.is_main_process:
        commit = push_to_hub(
            settings.output_dir,
            settings.push_to_hub,
            settings.hub_private,
            settings.hub_revision,
            settings.hub_commit_message,
        )
        print(f"Published: {commit.commit_url}")
    return result


def tune(
    settings: TrainingConfig,
    accelerator: Accelerator,
    checkpoint: Path | None,
    data: SegmentationDataset | None = None,
    eval_data: SegmentationDataset | None = None,
) -> TrainingResult:
    """From the model's weights, or the checkpoint's, to those in `output_dir`."""
    batch_size = samples_per_batch(settings, accelerator.num_processes)
    if accelerator.distributed_type == DistributedType.FSDP and (
        settings.frozen == "nothing" or settings.refresh_every or settings.eval_steps
    ):
        raise SettingError(
            "FSDP trains no word embeddings, makes no pseudo-labels and does not evaluate: --freeze words without "
            "--refresh-every and --eval-steps, or several GPUs."
        )
    told = checkpoint and read_checkpoint(checkpoint)
    if told and told["mixed_precision"] != accelerator.mixed_precision:
        raise SettingError(
            f'The run of "{checkpoint}" cannot go on with other settings: mixed_precision (was '
            f"{told['mixed_precision']}, is {accelerator.mixed_precision}). Give it as it was."
        )
    step = told["step"] if told else 0  # optimiser steps done

    # The seed is set before the model is made: a checkpoint of OFA has no segmentation positions, they start at random.
    set_seed(settings.seed)
    processor, model = load_model(settings, data)
    if settings.from_scratch and not checkpoint:
        crops = mixed_samples(settings, model.config, processor, data, None).crops
        measure_batch_norm(model.model.encoder.embed_images, crops, accelerator.device)
    set_seed(settings.seed, device_specific=True)  # dropout differs between processes
    config = model.config
    if accelerator.is_main_process:
        prepare_output(settings, step)
    simple = {name: x for name, x in settings.to_dict().items() if isinstance(x, (int, float, str))}
    goes_on = checkpoint is not None and checkpoint.resolve().parent == Path(settings.output_dir).resolve()
    accelerator.log_with.append(TrainingLog(settings.output_dir, step, goes_on))
    accelerator.init_trackers("ifseg", config=simple)  # from here on trackers write into the folder

    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, settings.warmup_steps, settings.steps)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    if settings.on_images:
        batches = photo_batches(settings, accelerator, model, processor, data, batch_size, step, checkpoint)
    else:
        batches = word_map_batches(settings, accelerator, config, batch_size, step)
    accelerator.register_save_state_pre_hook(drop_tied_weights)

    accelerator.print(
        f"Tuning {settings.model} on {len(config.category_ids)} categories, {settings.stage}: {settings.steps} steps "
        f"of {settings.batch_size} samples, {accelerator.num_processes} x {accelerator.device.type}, "
        f"mixed precision: {accelerator.mixed_precision}."
    )
    if checkpoint:
        load_checkpoint(accelerator, settings, checkpoint)
        accelerator.print(f"Going on after step {step}, from {checkpoint}.")
    elif settings.resume:
        accelerator.print(f"There is no checkpoint in {settings.output_dir} yet: starting at the first step.")
    progress = tqdm(
        total=settings.steps,
        initial=step,
        unit="step",
        bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]",
        mininterval=0.5 if sys.stderr.isatty() else 10,  # a log file gets a line now and then
        disable=not accelerator.is_main_process,
    )
    failure = f'The log could not be written to "{settings.output_dir}". The reason'
    if eval_data is not None and step == 0:
        with plain_errors(failure):
            accelerator.log(evaluated(settings, accelerator, model, processor, eval_data, 0), step=0)
    model.train()
    started, resumed_at = time.perf_counter(), step
    last_loss = told["loss"] if told else math.nan
    step_loss = torch.zeros((), device=accelerator.device)
    stop = 0.0
    with progress, stop_signals() as signals:  # the bar ends before any sentence about the end
        for batch in batches if step < settings.steps else ():
            with accelerator.accumulate(model):
                loss = batch_loss(model, batch, config)
                accelerator.backward(loss)
                step_loss += loss.detach() / settings.gradient_accumulation_steps
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
                    # A signal may reach the processes at different steps; this way they stop after the same one.
                    shared = torch.stack([step_loss, step_loss.new_tensor(bool(signals))])
                    last_loss, stop = accelerator.reduce(shared, "mean").tolist()
                    check_finite(last_loss, norm, step + 1, accelerator, checkpoint)
                    step_loss.zero_()
                optimizer.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            told = {"loss": last_loss, "learning_rate": schedule.get_last_lr()[0]}
            schedule.step()
            step += 1
            if eval_data is not None and (step % settings.eval_steps == 0 or step == settings.steps):
                told |= evaluated(settings, accelerator, model, processor, eval_data, step)
                model.train()
            with plain_errors(failure):
                accelerator.log(told, step=step)
            progress.set_postfix(loss=f"{last_loss:.4f}", refresh=False)
            progress.update()
            if settings.checkpointing_steps and (stop or step % settings.checkpointing_steps == 0):
                checkpoint = save_checkpoint(accelerator, settings, step, last_loss, checkpoint)
            if stop or step == settings.steps:
                break
    seconds = time.perf_counter() - started
    if step < settings.steps:
        saved = f"Go on from {checkpoint} with --resume." if checkpoint else "Nothing was saved."
        accelerator.print(f"Stopped after {step} of {settings.steps} steps. {saved}")
        raise TrainingStopped(signals[0] if signals else signal.SIGTERM)
    save(settings, accelerator, model, processor, checkpoint)
    peak = peak_memory(accelerator.device)
    return TrainingResult(settings.output_dir, settings.steps, last_loss, seconds, peak, resumed_at)


def batch_loss(model: torch.nn.Module, batch: dict[str, torch.Tensor], config: IFSegConfig) -> torch.Tensor:
    """Mean cross-entropy over the word maps and photos of a batch, each counting as much as any other.

    A photo's is the mean over all its pixels, those without a label counting 0: the mean over the labelled ones of a
    batch would depend on which photos share it, and so on the number of processes.
    """
    word_map, photos = batch.get("word_map"), batch.get("pixel_values")
    words = 0 if word_map is None else len(word_map)
    samples = words + (0 if photos is None else len(photos))
    loss: torch.Tensor | float = 0.0
    if words:
        labels = word_map_labels(word_map, batch["grid_size"], config.image_size, config.word_categories)
        loss = model(word_map=word_map, labels=labels).loss * (words / samples)
    if photos is not None:  # after the word maps: each pass of a distributed model writes the buffers that photos use
        labels = batch["labels"]
        share = (labels != -100).float().mean()
        labels = labels.where(share > 0, 0)  # the mean over no pixel is not a number; over any, times 0, it is 0
        loss = loss + model(pixel_values=photos, labels=labels).loss * share * (1 - words / samples)
    return loss


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Yields a list in which Ctrl-C and SIGTERM leave their numbers, in place of ending the process."""
    received: list[int] = []
    since: dict[int, float] = {}
    process = os.getpid()

    def receive(number, frame):
        # Launchers pass on a Ctrl-C that the terminal has sent already: at once is no second wish.
        if number in since and time.monotonic() - since[number] > 2:
            raise KeyboardInterrupt
        since.setdefault(number, time.monotonic())
        received.append(number)
        if len(received) == 1 and os.getpid() == process:  # workers of the loader inherit this function
            # Not print: it may be what the signal interrupted.
            os.write(2, b"\nStopping after this step. Once more stops at once.\n")

    if threading.current_thread() is not threading.main_thread():
        yield received  # Python allows signal handlers nowhere else
        return
    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def cpu_gains_from_bfloat16() -> bool:
    """Whether this processor is faster in bfloat16 than in float32.

    One without instructions for it emulates it, up to hundreds of times slower. One that has them as part of AVX-512,
    but no tiles (AMX), took twice as long for a matrix product as in float32 (an Intel Xeon, measured).
    """
    avx512_alone = torch.cpu._is_avx512_supported() and not torch.cpu._is_amx_tile_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and not avx512_alone


def make_accelerator(settings: TrainingConfig) -> Accelerator:
    """Accelerate with the settings that are its own. Each process draws its samples itself."""
    mixed_precision = settings.mixed_precision
    told = mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    on_cpu = settings.cpu or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    slower = on_cpu and told == "bf16" and not cpu_gains_from_bfloat16()
    if slower:
        mixed_precision = "no"
    elif mixed_precision is None and told == "no" and not on_cpu and torch.cuda.is_available():
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
    if slower:
        accelerator.print("In float32: this CPU is slower in bfloat16.")
    return accelerator


def samples_per_batch(settings: TrainingConfig, processes: int) -> int:
    """Samples in a batch of one process, so that an optimiser step has `batch_size` of them in all."""
    size, rest = divmod(settings.batch_size, processes * settings.gradient_accumulation_steps)
    if size * (1 - settings.word_map_ratio) < 1:
        # Else some batch had no photo, and a distributed trunk would wait for gradients of it.
        raise SettingError(f"word_map_ratio={settings.word_map_ratio} leaves no photo in a batch of {size} samples.")
    if rest:
        raise SettingError(
            f"batch_size={settings.batch_size} cannot be divided among {processes} processes and "
            f"{settings.gradient_accumulation_steps} accumulated batches."
        )
    return size


def load_data(settings: TrainingConfig) -> SegmentationDataset | None:
    """The data set, if there is one, without opening a photo. Raises `SettingError`."""
    if settings.dataset is None:
        return None
    if settings.on_images and importlib.util.find_spec("kornia") is None:
        raise SettingError('Training on photos needs kornia: pip install "ifseg-hf[train]".')
    try:
        categories = settings.categories if settings.on_images else None
        data = load_training_dataset(settings.dataset, settings.data_dir, settings.split, categories)
        find_labels(data, settings.unseen)
    except ValueError as error:
        raise SettingError(" ".join(str(error).split())) from error
    if len(data.names) < 2:
        raise SettingError("One category leaves nothing to tell apart: give at least two.")
    return data


def load_eval_data(settings: TrainingConfig, data: SegmentationDataset | None) -> SegmentationDataset | None:
    """What `eval_steps` evaluates on: the categories of `data`, seen and unseen apart. Raises `SettingError`."""
    if not settings.eval_steps:
        return None
    categories = data.names if settings.categories is None else settings.categories
    try:
        if settings.eval_dataset is None:
            found = load_validation_dataset(settings.dataset, settings.data_dir, categories)
        else:
            data_dir = settings.data_dir if settings.eval_dataset in BENCHMARKS else None
            found = load_segmentation_dataset(settings.eval_dataset, data_dir).select(categories)
    except ValueError as error:
        raise SettingError(f"eval_steps={settings.eval_steps}: {' '.join(str(error).split())}") from error
    unseen = find_labels(data, settings.unseen)
    if not unseen:
        return found
    seen = [label for label in range(len(found.names)) if label not in unseen]
    return replace(found, subsets={"seen": seen, "unseen": unseen})


def load_model(
    settings: TrainingConfig, data: SegmentationDataset | None = None
) -> tuple[IFSegProcessor, IFSegForSemanticSegmentation]:
    """The processor, and the model in float32 with its words set and frozen as its stage wants it."""
    categories = data.names if settings.on_images or settings.categories is None else settings.categories
    try:
        processor = IFSegProcessor.from_pretrained(settings.model_path)
    except (OSError, ValueError) as error:
        raise SettingError(f'"{settings.model}" has no processor that can be loaded: {error}'[:500]) from error
    try:
        words = processor.encode_categories(categories, settings.prompt, settings.append_unknown)
    except ValueError as error:
        raise SettingError(str(error)) from error
    try:
        rates = {"dropout": settings.dropout, "word_noise": settings.word_noise}
        rates |= dict.fromkeys(("encoder_drop_path_rate", "decoder_drop_path_rate"), settings.drop_path)
        if settings.from_scratch:
            model = IFSegForSemanticSegmentation(IFSegConfig.from_pretrained(settings.model_path, **rates))
        else:
            model = IFSegForSemanticSegmentation.from_pretrained(settings.model_path, dtype=torch.float32, **rates)
    except OSError as error:
        raise SettingError(f'"{settings.model}" has no weights that can be loaded: {error}'[:500]) from error
    model.set_words(**words)
    freeze(model, settings.frozen)
    if settings.on_images:
        prepare_processor(processor, settings, model.config)
    return processor, model


def measure_batch_norm(trunk: torch.nn.Module, crops: CropDataset, device: torch.device) -> None:
    """Gives frozen batch norms the statistics that random weights make of the first crops, the same in every process.

    Without them each layer would take the last one's output as it is, at any scale.
    """
    batches = ([crops[index]["pixel_values"] for index in range(start, start + 16)] for start in range(0, 128, 16))
    learning = train_batch_norm(copy.deepcopy(trunk)).to(device)
    with photo_errors():
        calibrate_batch_norm(learning, (torch.stack(batch).to(device) for batch in batches))
    trunk.load_state_dict(trunk_state(learning))


def freeze(model: IFSegForSemanticSegmentation, part: str) -> None:
    """Freezes "trunk", "words" or "nothing" of what takes part in segmentation; see `TrainingConfig.freeze`."""
    model.freeze_for_word_maps()
    encoder = model.model.encoder
    if part != "trunk":
        encoder.embed_images.requires_grad_(True)  # batch norm uses its stored statistics even so
        encoder.image_proj.requires_grad_(True)
    if part == "nothing":
        model.get_input_embeddings().requires_grad_(True)


def prepare_processor(processor: IFSegProcessor, settings: TrainingConfig, config: IFSegConfig) -> None:
    """Makes inference fit a model that has seen photos: at their size, not smoothed, and in crops when supervised."""
    image_processor = processor.image_processor
    if settings.short_side is not None:
        image_processor.size = {"shortest_edge": settings.short_side, "longest_edge": 4 * settings.short_side}
    image_processor.smoothing_iterations = 0
    supervised = settings.stage == "supervised"
    image_processor.sliding_window = (settings.crop_size or config.image_size) if supervised else None


# Batches --------------------------------------------------------------------------------------------------------------


def word_map_batches(
    settings: TrainingConfig, accelerator: Accelerator, config: IFSegConfig, batch_size: int, step: int
) -> DataLoader:
    """Batches of word maps for this process, from `step` on."""
    stream = word_map_stream(
        num_words=len(config.word_ids or config.category_ids),
        seed=settings.seed,
        grid_size=config.grid_size,
        max_cells=settings.max_cells,
        random_cells=settings.random_cells,
        start=step * settings.batch_size,  # the stream needs no state of its own
        word_categories=config.word_categories,
        block_size=batch_size,
    )
    # A generator of its own: starting workers must not move the one that draws dropout.
    loader = DataLoader(
        stream, batch_size=batch_size, num_workers=settings.dataloader_workers, generator=torch.Generator()
    )
    return accelerator.prepare(loader)


def photo_batches(
    settings: TrainingConfig,
    accelerator: Accelerator,
    model: torch.nn.Module,
    processor: IFSegProcessor,
    data: SegmentationDataset,
    batch_size: int,
    step: int,
    checkpoint: Path | None,
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of crops and word maps for this process, from `step` on; new pseudo-labels when it is time for them."""
    every, masks = settings.refresh_every, None
    while step < settings.steps:
        end = min(settings.steps, (step // every + 1) * every) if every else settings.steps
        if every and step >= every:
            masks = refreshed(settings, accelerator, model, processor, data, step // every * every, checkpoint)
        samples = mixed_samples(settings, accelerator.unwrap_model(model).config, processor, data, masks)
        first = step * settings.batch_size + accelerator.process_index * batch_size
        firsts = range(first, end * settings.batch_size, accelerator.num_processes * batch_size)
        loader = DataLoader(
            samples,
            batch_sampler=[range(first, first + batch_size) for first in firsts],
            num_workers=settings.dataloader_workers,
            collate_fn=collate_samples,
            generator=torch.Generator(),
        )
        with photo_errors():
            for batch in loader:
                yield {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in batch.items()}
        step = end


@contextmanager
def photo_errors() -> Iterator[None]:
    """Turns what a photo that cannot be used raises into a `TrainingError`."""
    try:
        yield
    except SampleError as error:
        # A worker's has its traceback before its message.
        reason = str(error).strip().splitlines()[-1].removeprefix("ifseg_hf.data.segmentation.SampleError: ")
        raise TrainingError(f"{reason} Go on from the last checkpoint, if there is one, with --resume.") from error


def mixed_samples(
    settings: TrainingConfig,
    config: IFSegConfig,
    processor: IFSegProcessor,
    data: SegmentationDataset,
    masks: Path | None,
) -> MixedDataset:
    """Photos of the settings' crops, and word maps among them."""
    image_processor = processor.image_processor
    size = image_processor.size
    photos = CropDataset(
        data,
        crop_size=settings.crop_size or config.image_size,
        short_side=size["shortest_edge"] or size["height"],
        mean=image_processor.image_mean,
        std=image_processor.image_std,
        seed=settings.seed,
        ignored=find_labels(data, settings.unseen),
        masks=masks,
    )
    max_cells = settings.max_cells or config.grid_size
    word_maps = WordMapSampler(
        len(config.category_ids), settings.seed, config.grid_size, max_cells, random_cells=settings.random_cells
    )
    return MixedDataset(photos, word_maps, settings.word_map_ratio)


def refreshed(
    settings: TrainingConfig,
    accelerator: Accelerator,
    model: torch.nn.Module,
    processor: IFSegProcessor,
    data: SegmentationDataset,
    step: int,
    checkpoint: Path | None,
) -> Path:
    """The folder of pseudo-labels that the model made, or now makes, after `step` steps."""
    name = pseudo_labels_of(step)
    output = Path(settings.output_dir)
    resumed_at = read_checkpoint(checkpoint)["step"] if checkpoint else 0
    for folder in (output, *([checkpoint.parent] if step <= resumed_at else [])):
        if (folder / name).is_dir():
            return folder / name
    if step < resumed_at:
        raise SettingError(f'"{checkpoint}" needs the pseudo-labels of step {step}, and there is no {name} beside it.')
    accelerator.print(f"Step {step}: new pseudo-labels.")
    incomplete = output / f"{name}{INCOMPLETE}"
    with on_every_process(accelerator), plain_errors(f"The pseudo-labels of step {step} could not be written"):
        incomplete.mkdir(exist_ok=True)
        try:
            segmenter = accelerator.unwrap_model(model)
            refresh_labels(segmenter, processor, data, Path(settings.dataset), incomplete, accelerator.state)
        except SampleError as error:
            raise TrainingError(str(error)) from error
    with on_every_process(accelerator), plain_errors(f"The pseudo-labels of step {step} could not be written"):
        if accelerator.is_main_process:
            incomplete.rename(output / name)
    return output / name


def evaluated(
    settings: TrainingConfig,
    accelerator: Accelerator,
    model: torch.nn.Module,
    processor: IFSegProcessor,
    eval_data: SegmentationDataset,
    step: int,
) -> dict[str, float]:
    """Mean IoU, of seen and unseen categories too, after `step` steps. Leaves the model in evaluation mode."""
    from ifseg_hf.evaluation.evaluate import IFSegSegmenter, evaluate_segmenter  # takes long, and few need it

    counts = Path(settings.output_dir) / f"evaluation-{step}{INCOMPLETE}"
    several = accelerator.num_processes > 1
    segmenter = IFSegSegmenter(accelerator.unwrap_model(model), processor)
    try:
        evaluation = evaluate_segmenter(segmenter, eval_data, state_dir=counts if several else None)
    except ValueError as error:
        raise TrainingError(f"The evaluation after step {step} failed: {error}") from error
    accelerator.wait_for_everyone()  # all have read what all have counted
    if several and accelerator.is_main_process:
        shutil.rmtree(counts)
    (result,) = evaluation.results()
    told = {name: x for name, x in result.items() if "mean_iou" in name and x is not None}
    if accelerator.is_main_process:
        means = ", ".join(f"{name.replace('_', ' ').replace('iou', 'IoU')} {100 * x:.1f}" for name, x in told.items())
        tqdm.write(f"Step {step}: {means}.")
    return told


def pseudo_labels_of(step: int | str) -> str:
    return f"pseudo-labels-{step}"


def check_finite(loss: float, norm: torch.Tensor, step: int, accelerator: Accelerator, checkpoint: Path | None) -> None:
    """Raises `TrainingError` before a step that would spoil the weights."""
    # With fp16 a gradient that overflows is ordinary: accelerate skips the step and scales the loss down.
    if not math.isfinite(loss):
        what = "loss"
    elif accelerator.scaler is None and not math.isfinite(norm):
        what = "gradient"
    else:
        return
    raise TrainingError(
        f"The {what} is not finite at step {step}, after {step - 1} good ones. {last_good(checkpoint)} "
        f"A lower learning rate may help, or mixed precision switched off."
    )


def last_good(checkpoint: Path | None) -> str:
    return f"The last good checkpoint is {checkpoint}." if checkpoint else "There is no checkpoint of it."


def peak_memory(device: torch.device) -> int:
    """The most bytes that the run held: of the GPU or, on the CPU, of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


# Files ----------------------------------------------------------------------------------------------------------------


def prepare_output(settings: TrainingConfig, step: int) -> None:
    """Marks the folder as this run's, and deletes what a killed one was writing or had yet to delete."""
    output = Path(settings.output_dir)
    with plain_errors(f'The output folder "{output}" cannot be written to'):
        for folder in output.glob(f"*{INCOMPLETE}"):
            shutil.rmtree(folder, ignore_errors=True)
        prune(settings, step)
        if not (output / SETTINGS_FILE).exists():
            write_settings(settings, output)


def save_checkpoint(
    accelerator: Accelerator, settings: TrainingConfig, step: int, loss: float, before: Path | None
) -> Path:
    """Everything that the steps after this one depend on, in `checkpoint-STEP`; older ones beyond the limit go.

    The folder gets its name when all of it is on the disk: a folder of that name is whole, whenever the power fails.

    Raises `TrainingError` in every process if any of them cannot write, with the checkpoint `before` untouched.
    """
    output = Path(settings.output_dir)
    folder, incomplete = output / f"checkpoint-{step}", output / f"checkpoint-{step}{INCOMPLETE}"
    failure = f'The checkpoint of step {step} could not be written to "{output}". {last_good(before)} The reason'
    with on_every_process(accelerator), plain_errors(failure, incomplete):
        accelerator.save_state(incomplete)
    with on_every_process(accelerator), plain_errors(failure, incomplete):
        if accelerator.is_main_process:
            told = {
                "step": step,
                "loss": loss,
                "mixed_precision": accelerator.mixed_precision,
                "processes": accelerator.num_processes,
                "settings": settings.to_dict(),
            }
            (incomplete / CHECKPOINT_FILE).write_text(json.dumps(told, indent=2, ensure_ascii=False), encoding="utf-8")
            for path in incomplete.rglob("*"):
                flush_to_disk(path)
            flush_to_disk(incomplete)
            if folder.exists():  # of a run that went on from an earlier one
                remove(folder)
            incomplete.rename(folder)
            flush_to_disk(output)
            prune(settings, step)
    return folder


def prune(settings: TrainingConfig, step: int) -> None:
    """Deletes the oldest checkpoints beyond the limit. Those after `step`, of a run before, are not yet in the way."""
    older = [path for done, path in checkpoints(settings.output_dir).items() if done < step]
    for path in older[: max(0, len(older) + 1 - settings.checkpoints_total_limit)]:
        remove(path)
    oldest = min([step, *checkpoints(settings.output_dir)])
    for path in Path(settings.output_dir).glob(pseudo_labels_of("*")):
        # Made at a step, they are needed from there to the next time. Those after `step` are of a run before.
        made = int(path.name.rpartition("-")[2])
        if made > step or made + settings.refresh_every <= oldest:
            remove(path)


def drop_tied_weights(models: list, states: list[dict], folder: str) -> None:
    """Leaves tied weights one name: accelerate does so too, with a warning at every checkpoint."""
    for state in states:
        names: dict[int, str] = {}
        for name in list(state):
            if names.setdefault(state[name].data_ptr(), name) != name:
                del state[name]


def load_checkpoint(accelerator: Accelerator, settings: TrainingConfig, checkpoint: Path) -> None:
    """Puts everything prepared, and the random number generators, where they were. Raises `SettingError` if damaged."""
    told = read_checkpoint(checkpoint)
    try:
        accelerator.load_state(checkpoint)
    except Exception as error:  # of any kind: what pickle, zip and safetensors make of a damaged file
        reason = " ".join(str(error).split())[:300]
        raise SettingError(
            f'The checkpoint "{checkpoint}" cannot be loaded; delete it to go on from the one before: {reason}'
        ) from error
    accelerator.step = 0  # a checkpoint stands between steps, wherever it stood among other accumulated batches
    if told["processes"] != accelerator.num_processes:
        # There is not one state for each; and from the start again, dropout would repeat itself.
        set_seed(settings.seed + told["step"], device_specific=True)


def save(
    settings: TrainingConfig,
    accelerator: Accelerator,
    model: torch.nn.Module,
    processor: IFSegProcessor,
    checkpoint: Path | None,
) -> None:
    """Weights, words, processor and settings: a folder that runs by itself."""
    accelerator.wait_for_everyone()
    state_dict = accelerator.get_state_dict(model)  # gathered from every process where the weights are spread
    if accelerator.is_main_process:
        output = Path(settings.output_dir)
        incomplete = output / f"result{INCOMPLETE}"
        failure = f'The model could not be saved in "{output}". {last_good(checkpoint)} The reason'
        with plain_errors(failure, incomplete):
            # Beside its place first, so that no kill and no full disk leaves half a file there.
            with torch.device("meta"):  # an empty model: FSDP changes the class of the one that was trained
                empty = IFSegForSemanticSegmentation(accelerator.unwrap_model(model).config)
            empty.save_pretrained(incomplete, state_dict=state_dict)
            processor.save_pretrained(incomplete)
            write_settings(settings, incomplete)
            for path in incomplete.iterdir():
                flush_to_disk(path)
                path.replace(output / path.name)
            incomplete.rmdir()
            flush_to_disk(output)


def write_settings(settings: TrainingConfig, folder: Path) -> None:
    """What the model was trained with. The file also marks its folder as one that training may write to again."""
    told = settings.to_dict()
    del told["resume"]  # it is about one of the processes that trained, not about the training
    text = json.dumps(told, indent=2, ensure_ascii=False)
    (folder / SETTINGS_FILE).write_text(text + "\n", encoding="utf-8")


def flush_to_disk(path: Path) -> None:
    """Waits until a file, or the names in a folder, have reached the disk. Windows does so for files only."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(folder: Path) -> None:
    """Deletes a checkpoint so that half of it is never taken for one."""
    going = folder.rename(folder.with_name(f"{folder.name}.old{INCOMPLETE}"))
    shutil.rmtree(going, ignore_errors=True)  # the next run tries again


@contextmanager
def plain_errors(failure: str, incomplete: Path | None = None) -> Iterator[None]:
    """Turns what writing files may raise into a `TrainingError`, and deletes the folder that was being written."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        if isinstance(error, RuntimeError):
            if "inline_container" not in reason:  # what torch.save calls any trouble with its file
                raise
            reason = "a file could not be written to its end (is the disk full?)"
        if incomplete:
            shutil.rmtree(incomplete, ignore_errors=True)
        raise TrainingError(f"{failure}: {reason}.") from error


@contextmanager
def on_every_process(accelerator: Accelerator) -> Iterator[None]:
    """A block that fails in every process if it fails in one: the others would wait for that one for ever."""
    failed = None
    try:
        yield
    except TrainingError as error:
        failed = error
    count = accelerator.reduce(torch.tensor(float(failed is not None), device=accelerator.device), "sum").item()
    if failed is not None:
        raise failed
    if count:
        raise TrainingError("Another process could not write its part of the checkpoint.")
