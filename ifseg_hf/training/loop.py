"""Training on words alone (section 2.3 of the paper) or on images: one loop for every stage.

The stage decides which samples are read, which parameters are trained, and how the result segments images.
"""

import math
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import DistributedType, set_seed
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

from ifseg_hf.data.image_files import SampleError
from ifseg_hf.training.batches import batch_loss, crop_dataset, mixed_dataset, sample_batches, word_map_dataset
from ifseg_hf.training.checkpointing import (
    describe_last,
    drop_tied_weights,
    load_checkpoint,
    prepare_output,
    pseudo_labels_name,
    save_checkpoint,
    save_lora,
    save_model,
)
from ifseg_hf.training.config import INCOMPLETE, TrainingConfig, read_checkpoint
from ifseg_hf.training.errors import SettingError, TrainingError, TrainingStopped, on_every_process, writing_errors
from ifseg_hf.training.log import TrainingLog, write_usage
from ifseg_hf.training.online_labels import GivenLabels, OnlineCrops, label_online
from ifseg_hf.training.pseudo_labels import refresh_labels
from ifseg_hf.training.setup import (
    load_data,
    load_eval_data,
    load_model,
    make_accelerator,
    measure_batch_norm,
    samples_per_batch,
)
from ifseg_hf.training.signals import stop_signals

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

__all__ = [
    "SettingError",
    "TrainingConfig",
    "TrainingError",
    "TrainingResult",
    "TrainingRun",
    "TrainingStopped",
    "train",
]


@dataclass
class TrainingResult:
    """Summary of a finished run."""

    output_dir: str
    steps: int
    loss: float  # of the last step
    seconds: float  # in the loop
    peak_memory: int  # in bytes, of the GPU or, on the CPU, of the process
    resumed_at: int = 0  # step of the checkpoint that the run was resumed from

    def __str__(self) -> str:
        done = self.steps - self.resumed_at
        resumed = f" (the last {done} of {self.steps})" if self.resumed_at else ""
        return (
            f"{done} steps{resumed} in {self.seconds:.0f} s ({done / self.seconds:.2f} steps/s), "
            f"last loss {self.loss:.4f}, peak memory {self.peak_memory / 2**30:.2f} GiB.\n"
            f"The tuned model is in {self.output_dir}. To use it:\n\n"
            f"    import ifseg_hf, transformers\n"
            f'    masks = transformers.pipeline("image-segmentation", model="{self.output_dir}")("image.jpg")\n'
        )


def train(config: TrainingConfig, report: bool = True) -> TrainingResult:
    """Trains a model on word maps of its categories or on images, and saves it with its processor and words.

    Call it under `accelerate launch` to train in several processes; the samples of a step do not depend on their
    number. `resume="latest"` continues an interrupted run from its last checkpoint, with the same final weights as an
    uninterrupted run. `card_image` and the Hub settings are for `ifseg tune`: this function publishes nothing.

    Args:
        config: the settings.
        report: print settings and result; without it, only progress, resuming and interruptions.

    Raises:
        `ValueError`: a wrong setting; almost all are noticed before the weights are loaded.
        `TrainingError`: the loss is not finite, an image cannot be used, or a file cannot be written.
        `TrainingStopped`: on Ctrl-C or SIGTERM, after the current step and a checkpoint. The same signal again, more
            than two seconds later, interrupts immediately.
    """
    run = TrainingRun(config, report)
    stopped = None
    try:
        run.setup()
        run.train()
        run.save()
    except TrainingStopped as error:
        stopped = error.with_traceback(None)  # the traceback's frames would keep the model in memory
    run.close()
    run.write_usage()
    if stopped:
        raise stopped
    result = run.result()
    if report:
        run.accelerator.print(result)
    return result


class TrainingRun:
    """One run of training: `setup`, `train`, `save` and `close`, in this order.

    Creating it checks the settings and finds the data, without loading weights.

    Attributes:
        config: the settings.
        report: print them.
        accelerator: `accelerate.Accelerator`.
        data, eval_data: datasets of images with masks, or None.
        resume_from: the checkpoint that the run continues from, or None.
        resumes_here: whether that checkpoint is in the output folder.
        checkpoint: the last checkpoint, or None.
        step: number of completed optimiser steps.
        loss: loss of the last step.
        processor, model, optimizer, schedule: from `setup` to `close`.
    """

    def __init__(self, config: TrainingConfig, report: bool = True):
        config.check()
        self.config = config
        self.report = report
        self.resume_from = self.checkpoint = config.find_checkpoint()
        self.data = load_data(config)
        self.eval_data = load_eval_data(config, self.data)
        self.accelerator = make_accelerator(config, report)
        self.output = Path(config.output_dir)
        self.resumes_here = self.resume_from is not None and self.resume_from.resolve().parent == self.output.resolve()
        self.step = self.resumed_at = 0
        self.loss = math.nan
        self.stop = False
        self.seconds = 0.0
        self.peak_memory = 0

    # Set-up -----------------------------------------------------------------------------------------------------------

    def setup(self) -> None:
        """Loads and prepares the model and everything else that the loop needs. Raises `SettingError`."""
        self.batch_size = samples_per_batch(self.config, self.accelerator.num_processes)
        self._check_fsdp()
        self._read_checkpoint()
        self._load_model()
        self._start_output()
        self._prepare()
        if self.report:
            categories = len(self.model_config.id2label)
            self.accelerator.print(
                f"Tuning {self.config.model} on {categories} categories, {self.config.stage}: {self.config.steps} "
                f"steps of {self.config.batch_size} samples, {self.accelerator.num_processes} x "
                f"{self.accelerator.device.type}, mixed precision: {self.accelerator.mixed_precision}."
            )
        if self.resume_from:
            load_checkpoint(self.accelerator, self.config, self.resume_from)
            self.accelerator.print(f"Resuming after step {self.step}, from {self.resume_from}.")
        elif self.config.resume:
            self.accelerator.print(f"There is no checkpoint in {self.output} yet: starting at the first step.")

    def _check_fsdp(self) -> None:
        config = self.config
        own_labels = config.refresh_every or config.online_after
        unsupported = config.frozen == "nothing" or own_labels or config.eval_steps or config.lora
        if self.accelerator.distributed_type == DistributedType.FSDP and unsupported:
            raise SettingError(
                "FSDP trains no word embeddings and no LoRA, makes no pseudo-labels and does not evaluate: use "
                "--freeze words without --lora, --refresh-every, --online-after and --eval-steps, or data parallelism "
                "(MULTI_GPU)."
            )

    def _read_checkpoint(self) -> None:
        """Sets step and loss from the checkpoint that the run resumes from."""
        if not self.resume_from:
            return
        metadata = read_checkpoint(self.resume_from)
        precision = self.accelerator.mixed_precision
        if metadata["mixed_precision"] != precision:
            raise SettingError(
                f'The run of "{self.resume_from}" cannot be resumed with other settings: mixed_precision (was '
                f"{metadata['mixed_precision']}, is {precision}). Give the earlier value."
            )
        self.step = self.resumed_at = metadata["step"]
        self.loss = metadata["loss"]

    def _load_model(self) -> None:
        # Seeded before the model is created: segmentation positions, which OFA lacks, start with random values.
        set_seed(self.config.seed)
        self.processor, self.model = load_model(self.config, self.data)
        self.model_config = self.model.config
        if self.config.from_scratch and not self.resume_from:
            crops = crop_dataset(self.config, self.model_config, self.processor, self.data)
            measure_batch_norm(self.model.backbone.image_trunk, crops, self.accelerator.device)
        set_seed(self.config.seed, device_specific=True)  # dropout differs between processes

    def _start_output(self) -> None:
        """Prepares the output folder and starts the trackers, which write to it."""
        if self.accelerator.is_main_process:
            prepare_output(self.config, self.step)
        self.accelerator.log_with.append(TrainingLog(self.output, self.step if self.resumes_here else -1))
        simple = {name: x for name, x in self.config.to_dict().items() if isinstance(x, (int, float, str))}
        self.accelerator.init_trackers("ifseg", config=simple)

    def _prepare(self) -> None:
        """Makes optimiser and schedule, and prepares them and the model for the device and the processes."""
        config = self.config
        optimizer = torch.optim.AdamW(
            [parameter for parameter in self.model.parameters() if parameter.requires_grad],
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            fused=self.accelerator.device.type == "cuda" or None,  # None: the default of the device
        )
        schedule = get_cosine_schedule_with_warmup(optimizer, config.warmup_steps, config.steps)
        self.model, self.optimizer, self.schedule = self.accelerator.prepare(self.model, optimizer, schedule)
        self.accelerator.register_save_state_pre_hook(drop_tied_weights)

    # Loop -------------------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Trains up to the last step.

        Raises `TrainingError`, and `TrainingStopped` after the step in which a signal arrives.
        """
        progress = self._progress_bar()
        if self.eval_data is not None and self.step == 0:
            self._log(self.evaluate())
        self.model.train()
        self.step_loss = torch.zeros((), device=self.accelerator.device)
        started = time.perf_counter()
        with progress, stop_signals() as self.signals:  # the progress bar ends before any later message
            for batch in self.batches():
                if not self.train_on_batch(batch):
                    continue
                self.finish_step()
                progress.set_postfix(loss=f"{self.loss:.4f}", refresh=False)
                progress.update()
                every = self.config.checkpointing_steps
                if every and (self.stop or self.step % every == 0):
                    self.save_checkpoint()
                if self.stop or self.step == self.config.steps:
                    break
        self.seconds = time.perf_counter() - started
        if self.step < self.config.steps:
            saved = f"Continue from {self.checkpoint} with --resume." if self.checkpoint else "Nothing was saved."
            self.accelerator.print(f"Stopped after {self.step} of {self.config.steps} steps. {saved}")
            raise TrainingStopped(self.signals[0] if self.signals else signal.SIGTERM)

    def batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """This process's batches from `step` on, with new pseudo-labels every `refresh_every` steps.

        After `online_after` steps they have pseudo-labels of the model at their step.
        """
        steps, every, after = self.config.steps, self.config.refresh_every, self.config.online_after
        if not self.config.on_images:
            samples = word_map_dataset(self.config, self.model_config)
            yield from sample_batches(self.config, self.accelerator, samples, self.batch_size, self.step, steps)
            return
        step, masks = self.step, None
        while step < steps:
            if 0 < after <= step:
                yield from self.online_batches(step)
                return
            end = min(steps, (step // every + 1) * every) if every else (after or steps)
            if every and step >= every:
                masks = self.pseudo_labels(step // every * every)
            crops = crop_dataset(self.config, self.model_config, self.processor, self.data, masks)
            samples = mixed_dataset(self.config, self.model_config, crops)
            yield from sample_batches(self.config, self.accelerator, samples, self.batch_size, step, end)
            step = end

    @property
    def unwrapped_model(self):
        """The model without the wrappers of distributed training and `torch.compile`."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def online_batches(self, step: int) -> Iterator[dict[str, torch.Tensor]]:
        """This process's batches from `step` to the last, each labelled by the model of its step (IFSeg+)."""
        data = GivenLabels(self.data, Path(self.config.dataset))
        crops = crop_dataset(self.config, self.model_config, self.processor, data, kind=OnlineCrops)
        samples = mixed_dataset(self.config, self.model_config, crops)
        model = self.unwrapped_model
        for batch in sample_batches(self.config, self.accelerator, samples, self.batch_size, step, self.config.steps):
            yield label_online(model, batch, data.names, data.config)

    def train_on_batch(self, batch: dict[str, torch.Tensor]) -> bool:
        """Backpropagates the loss of a batch. Returns whether it completed an optimiser step."""
        with self.accelerator.accumulate(self.model):
            loss = batch_loss(self.model, batch, self.model_config, self.config.loss_mean)
            self.accelerator.backward(loss)
            self.step_loss += loss.detach() / self.config.gradient_accumulation_steps
            if self.accelerator.sync_gradients:
                norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
                # Processes may receive a signal in different steps; its mean lets all stop after the same step.
                shared = torch.stack([self.step_loss, self.step_loss.new_tensor(bool(self.signals))])
                self.loss, stop = self.accelerator.reduce(shared, "mean").tolist()
                self.stop = stop > 0
                self.check_finite(norm)
                self.step_loss.zero_()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self.accelerator.sync_gradients

    def check_finite(self, norm: torch.Tensor) -> None:
        """Raises `TrainingError` if the loss or the gradient is not finite, before the step that would use it."""
        if not math.isfinite(self.loss):
            quantity = "loss"
        elif self.accelerator.scaler is None and not math.isfinite(norm):
            # With fp16 gradients may overflow: accelerate skips the step and scales the loss down.
            quantity = "gradient"
        else:
            return
        raise TrainingError(
            f"The {quantity} is not finite at step {self.step + 1}, after {self.step} completed steps. "
            f"{describe_last(self.checkpoint)} A lower learning rate may help, or training without mixed precision."
        )

    def finish_step(self) -> None:
        """Advances schedule and step, evaluates if it is due, and logs."""
        values = {"loss": self.loss, "learning_rate": self.schedule.get_last_lr()[0]}
        self.schedule.step()
        self.step += 1
        last = self.step == self.config.steps
        if self.eval_data is not None and (last or self.step % self.config.eval_steps == 0):
            values |= self.evaluate()
            self.model.train()
        self._log(values)

    def evaluate(self) -> dict[str, float]:
        """Mean IoU of the present model, also over seen and over unseen categories. Leaves it in evaluation mode."""
        from ifseg_hf.evaluation.evaluate import IFSegSegmenter, evaluate_segmenter  # slow to import, rarely needed

        counts = self.output / f"evaluation-{self.step}{INCOMPLETE}"
        several = self.accelerator.num_processes > 1
        segmenter = IFSegSegmenter(self.unwrapped_model, self.processor)
        try:
            folder, on_error = counts if several else None, self.config.on_error
            evaluation = evaluate_segmenter(segmenter, self.eval_data, state_dir=folder, on_error=on_error)
        except ValueError as error:
            raise TrainingError(f"The evaluation after step {self.step} failed: {error}") from error
        self.accelerator.wait_for_everyone()  # every process has read the counts
        if several and self.accelerator.is_main_process:
            shutil.rmtree(counts)
        (result,) = evaluation.results()
        values = {name: x for name, x in result.items() if "mean_iou" in name and x is not None}
        if self.accelerator.is_main_process:
            labels = {name: name.replace("_", " ").replace("iou", "IoU") for name in values}
            tqdm.write(f"Step {self.step}: {', '.join(f'{labels[name]} {100 * x:.1f}' for name, x in values.items())}.")
        return values

    def pseudo_labels(self, step: int) -> Path:
        """Folder of the pseudo-labels made after `step` steps; makes them if `step` is the present step."""
        name = pseudo_labels_name(step)
        earlier = [self.resume_from.parent] if self.resume_from and step <= self.resumed_at else []
        for folder in (self.output, *earlier):
            if (folder / name).is_dir():
                return folder / name
        if step < self.resumed_at:
            raise SettingError(
                f'"{self.resume_from}" needs the pseudo-labels of step {step}, and there is no {name} beside it.'
            )
        self.accelerator.print(f"Step {step}: new pseudo-labels.")
        incomplete = self.output / f"{name}{INCOMPLETE}"
        failure = f"The pseudo-labels of step {step} could not be written"
        with on_every_process(self.accelerator), writing_errors(failure):
            incomplete.mkdir(exist_ok=True)
            model, dataset = self.unwrapped_model, Path(self.config.dataset)
            try:
                state, on_error = self.accelerator.state, self.config.on_error
                refresh_labels(model, self.processor, self.data, dataset, incomplete, state, on_error)
            except SampleError as error:
                raise TrainingError(str(error)) from error
        with on_every_process(self.accelerator), writing_errors(failure):
            if self.accelerator.is_main_process:
                incomplete.rename(self.output / name)
        return self.output / name

    def _log(self, values: dict[str, float]) -> None:
        with writing_errors(f'The log could not be written to "{self.output}". The reason'):
            self.accelerator.log(values, step=self.step)

    def _progress_bar(self) -> tqdm:
        return tqdm(
            total=self.config.steps,
            initial=self.step,
            unit="step",
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]",
            mininterval=0.5 if sys.stderr.isatty() else 10,  # fewer lines in a log file
            disable=not self.accelerator.is_main_process,
        )

    # Result -----------------------------------------------------------------------------------------------------------

    def save_checkpoint(self) -> None:
        """Writes a checkpoint of the present step. Raises `TrainingError`."""
        self.checkpoint = save_checkpoint(self.accelerator, self.config, self.step, self.loss, self.checkpoint)

    def save(self) -> None:
        """Writes the trained model with its words, processor and settings, or its adapter. Raises `TrainingError`."""
        self.accelerator.wait_for_everyone()
        state_dict = self.accelerator.get_state_dict(self.model)  # gathered from all processes with FSDP
        state_dict = {name.replace("_orig_mod.", ""): weight for name, weight in state_dict.items()}  # if compiled
        if self.accelerator.is_main_process:
            if self.config.lora:
                model = self.unwrapped_model
                save_lora(self.config, model, state_dict, self.checkpoint)
            else:
                save_model(self.config, self.model_config, state_dict, self.processor, self.checkpoint)
        self.peak_memory = peak_memory(self.accelerator.device)

    def close(self) -> None:
        """Frees the model and ends trackers and process group."""
        # With torch 2.13 the wrapper of a distributed model may deadlock if it is freed after its process group.
        self.model = self.optimizer = self.schedule = None
        self.accelerator.free_memory()
        self.accelerator.end_training()

    def write_usage(self) -> None:
        """Writes time and memory of this part of the run, unless its steps are lost. Raises `TrainingError`."""
        accelerator = self.accelerator
        lost = self.step < self.config.steps and self.checkpoint is None
        if lost or not accelerator.is_main_process:
            return
        on_gpu = accelerator.device.type == "cuda"
        usage = {
            "first_step": self.resumed_at + 1,
            "last_step": self.step,
            "seconds": round(self.seconds, 3),
            "peak_memory": self.peak_memory or peak_memory(accelerator.device),
            "device": torch.cuda.get_device_name(accelerator.device) if on_gpu else accelerator.device.type,
            "processes": accelerator.num_processes,
            "mixed_precision": accelerator.mixed_precision,
        }
        with writing_errors(f'Time and memory could not be written to "{self.output}". The reason'):
            write_usage(self.output, usage, append=self.resumes_here)

    def result(self) -> TrainingResult:
        """Summary of the finished run."""
        config = self.config
        return TrainingResult(
            config.output_dir, config.steps, self.loss, self.seconds, self.peak_memory, self.resumed_at
        )


def peak_memory(device: torch.device) -> int:
    """Peak memory of the run in bytes: of the GPU or, on the CPU, of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
