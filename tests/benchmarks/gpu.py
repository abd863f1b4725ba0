"""Checks and measurements on a GPU: golden outputs, speed, mixed precision, placement, two processes, compilation.

    python tests/benchmarks/gpu.py --output-dir OUT [--minutes 4.5] [--sections goldens speed ...]
    python tests/benchmarks/gpu.py --output-dir OUT --device cpu --tiny      # the same code on small models

Results are printed as they come, and written to `report.md` and `report.json` in the output folder after every row. A
section that fails is reported, and the next one runs. Sections after the time limit are skipped.

The package must be importable. Speed is measured with random weights, which do not change the costs.
"""

import argparse
import copy
import os
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "helpers"), str(TESTS / "benchmarks")]

import gpu_speed  # noqa: E402
from checkpoints import our_name, reference_model  # noqa: E402
from gpu_bench import Bench, Job, Report, one_line  # noqa: E402
from reference_outputs import PARITY, fixture, golden, golden_category_ids, golden_metadata, relative_error  # noqa: E402
from tiny_model import save_tiny_model  # noqa: E402
from transformers.utils.logging import disable_progress_bar  # noqa: E402

import ifseg_hf  # noqa: E402
from ifseg_hf.processing.post_processing_ifseg import segmentation_maps  # noqa: E402
from ifseg_hf.training.log import read_log  # noqa: E402
from scripts import SCRIPTS, load_script  # noqa: E402

TOLERANCE = 1e-4  # of golden outputs in float32
LOSS_TOLERANCE = 0.03  # between precisions, relative
CATEGORIES = ["sky", "building", "tree", "cat", "cup"]


def exact_float32() -> None:
    """Switches TF32 off, which torch uses for convolutions by default."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


# Sections: each takes the bench and adds rows to its report -----------------------------------------------------------


def goldens(bench: Bench) -> None:
    """Logits of the published implementation, in float32 without TF32; then bfloat16 against float32."""
    exact_float32()
    names = ["tiny_384x640"] if bench.tiny else ["tiny_512x512", "tiny_512x683", "tiny_384x640", "base_512x512"]
    model, size = None, None
    for name in names:
        expected, metadata = golden(name), golden_metadata(name)
        if metadata["size"] != size:
            size = metadata["size"]
            model = reference_model(size).to(bench.device)
        height, width = map(int, metadata["pixels"].split("x"))
        inputs = {
            "pixel_values": fixture.pixel_values(height, width).to(bench.device),
            "input_ids": expected["input_ids"].to(bench.device),
            "category_ids": golden_category_ids(metadata["categories"]).to(bench.device),
        }
        for attention in ("eager", "sdpa"):
            model.set_attn_implementation(attention)
            with torch.no_grad():
                logits = model(**inputs).logits.flatten(2).transpose(1, 2).cpu()
            error = relative_error(logits, expected["logits"])
            bench.report.row("goldens", case=f"{name}, float32, {attention}", error=error, good=error < TOLERANCE)
        compare_bfloat16(bench, name, model, inputs, (height, width))
    golden_gradients(bench)


def compare_bfloat16(bench: Bench, name: str, model, inputs: dict, size: tuple[int, int]) -> None:
    with torch.no_grad():
        exact = model(**inputs)
        for precision in ("autocast", "weights"):
            other = copy.deepcopy(model).bfloat16() if precision == "weights" else model
            with bench.half(precision):
                half = other(**inputs)
            difference = (half.logits.float() - exact.logits).abs().max() / exact.logits.abs().max()
            shares = {}
            for what, iterations in (("equal pixels", 0), ("equal pixels, smoothed", 25)):
                maps = [segmentation_maps(x, [size], iterations=iterations)[0] for x in (half, exact)]
                shares[what] = (maps[0] == maps[1]).float().mean().item()
            bench.report.row("goldens", case=f"{name}, bfloat16 {precision}", error=difference.item(), **shares)


def golden_gradients(bench: Bench) -> None:
    """Loss and norms of the gradients of a training step on word maps, in float32."""
    expected, metadata = golden("tiny_word_map"), golden_metadata("tiny_word_map")
    model = reference_model("tiny", dropout=0.0, drop_path_rate=0.0).train().to(bench.device)
    model.freeze_for_word_maps()
    inputs = {name: expected[name].to(bench.device) for name in ("word_map", "input_ids", "labels")}
    inputs["category_ids"] = golden_category_ids(metadata["categories"]).to(bench.device)
    loss = model(**inputs).loss
    loss.backward()
    parameters = dict(model.named_parameters())
    names = {row["fairseq"]: our_name(row) for row in fixture.inventory("tiny")}
    errors = {}
    for name, norm in metadata["gradient_norms"].items():
        if not name.endswith(("k_proj.bias", "k_linear.bias")):  # those have no effect, their gradient is rounding
            errors[name] = abs(parameters[names[name]].grad.norm().item() / norm - 1)
    error = relative_error(loss.detach().cpu(), expected["loss"])
    bench.report.row("goldens", case="word maps, loss", error=error, good=error < TOLERANCE)
    worst = max(errors, key=errors.get)
    good = errors[worst] < TOLERANCE
    bench.report.row("goldens", case=f"word maps, gradients, worst: {worst}", error=errors[worst], good=good)


def placement(bench: Bench) -> None:
    """The embedded model, loaded with `device_map="auto"`, segments an image like the model on the CPU."""
    import numpy as np
    from transformers import AutoModelForSemanticSegmentation, AutoProcessor, pipeline

    from ifseg_hf.processing.segmenter_ifseg import IFSegSegmenter

    exact_float32()
    values = fixture.pixel_values(120, 160)[0].permute(1, 2, 0)
    image = ((values + 1) * 127.5).numpy().astype(np.uint8)
    maps = {}
    for device_map in ("auto", "cpu"):
        model = AutoModelForSemanticSegmentation.from_pretrained(ifseg_hf.NANO, device_map=device_map)
        processor = AutoProcessor.from_pretrained(ifseg_hf.NANO)
        segmenter = IFSegSegmenter(model, processor, untuned=True)
        segmenter.set_words(CATEGORIES)
        (maps[device_map],) = segmenter.segment([image])
        devices = {str(parameter.device) for parameter in model.parameters()}
        bench.report.row("placement", case=f'device_map="{device_map}"', devices=", ".join(sorted(devices)))
    equal = (maps["auto"].cpu() == maps["cpu"]).float().mean().item()
    bench.report.row("placement", case="auto against cpu", equal_pixels=equal, good=equal > 0.99)
    from PIL import Image

    segment = pipeline("image-segmentation", model=str(ifseg_hf.NANO), device=bench.device)
    found = segment(Image.fromarray(image), categories=CATEGORIES, untuned=True)
    bench.report.row("placement", case="pipeline", categories=len(found), good=0 < len(found) <= len(CATEGORIES))


def train_command(bench: Bench, output: str, model: str, *flags: str) -> list[str]:
    cpu = ["--cpu"] if bench.device.type == "cpu" else []
    steps, warmup_steps, cells = ("3", "1", "4") if bench.tiny else ("60", "5", "8")
    settings = ["--config", str(SCRIPTS / "configs/nano.yaml"), "--model", model, "--categories", ", ".join(CATEGORIES)]
    settings += ["--steps", steps, "--warmup-steps", warmup_steps, "--batch-size", "4", "--learning-rate", "1e-4"]
    settings += ["--max-cells", cells]
    return [*settings, "--output-dir", str(bench.folder / output), *cpu, *flags]


def start_training(bench: Bench) -> None:
    """Starts the runs that [`training`] and [`processes`] read; they need no timing and run beside the goldens."""
    model = "ifseg-ofa-nano"
    if bench.tiny:
        model = save_tiny_model(bench.folder / "tiny")
    train = str(SCRIPTS / "train.py")
    threads = {"OMP_NUM_THREADS": "1" if bench.tiny else "2"}
    local = {**threads, "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    cpu = bench.device.type == "cpu"
    for precision in ("no", "bf16") if cpu else ("no", "bf16", "fp16"):
        command = [train, *train_command(bench, precision, model, "--mixed-precision", precision)]
        bench.jobs[precision] = Job(command, bench.folder / f"{precision}.log", threads)
    same = ["--mixed-precision", "no"]
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(29000 + os.getpid() % 2000)]
    worker = [__file__, "--worker", "train", "--backend", "gloo", "--device", bench.device.type, "--"]
    bench.jobs["one"] = Job([train, *train_command(bench, "one", model, *same)], bench.folder / "one.log", threads)
    two = [*launch, *worker, *train_command(bench, "two", model, *same)]
    bench.jobs["two"] = Job(two, bench.folder / "two.log", local)
    if not cpu:
        launch[-1] = str(31000 + os.getpid() % 1000)
        worker[worker.index("gloo")] = "nccl"
        command = [*launch, *worker, *train_command(bench, "nccl", model, *same)]
        bench.jobs["nccl"] = Job(command, bench.folder / "nccl.log", local)


def result_of(bench: Bench, name: str, section: str, patience: float = 90) -> float | None:
    """Mean loss of the last steps of a run that was started before; a row says so if it failed."""
    status = bench.jobs[name].wait(min(patience, bench.left()))
    if status == 0:
        losses = [line["loss"] for line in read_log(bench.folder / name) if "loss" in line]
        return statistics.mean(losses[-10:])
    status = "stopped, it took too long" if status is None else f"status {status}"
    bench.report.row(section, case=name, good=False, problem=f"{status}: {bench.jobs[name].reason()}")
    return None


def training(bench: Bench) -> None:
    """The embedded model tuned in float32, bf16 and fp16 with scripts/train.py: losses of the last steps agree."""
    losses = {name: result_of(bench, name, "training") for name in ("no", "bf16", "fp16") if name in bench.jobs}
    for name, loss in losses.items():
        if loss is not None:
            change = loss / losses["no"] - 1 if losses["no"] else None
            good = None if change is None else abs(change) < LOSS_TOLERANCE
            bench.report.row("training", case=f"mixed_precision={name}", loss=loss, change=change, good=good)


def processes(bench: Bench) -> None:
    """Two processes on one device train like one with gloo; nccl usually refuses to, and its row says why."""
    one = result_of(bench, "one", "processes")
    for name, case, patience in (("two", "two processes, gloo", 60), ("nccl", "two processes, nccl", 20)):
        loss = result_of(bench, name, "processes", patience) if name in bench.jobs else None
        if loss and one:
            change = loss / one - 1
            bench.report.row("processes", case=case, loss=loss, change=change, good=abs(change) < LOSS_TOLERANCE)


def train_worker(options: argparse.Namespace) -> int:
    """scripts/train.py with all processes on the first GPU, and a backend of torch.distributed to choose.

    accelerate puts process i of a machine on GPU i; nccl usually refuses two processes on one GPU.
    """
    from accelerate import PartialState

    os.environ["LOCAL_RANK"] = "0"
    PartialState(cpu=options.device == "cpu", backend=options.backend)
    return load_script("train").main(options.arguments)


# Program --------------------------------------------------------------------------------------------------------------

# In the order in which they run: what needs no timing first, beside the training runs; compilation last.
SECTIONS = {
    "goldens": goldens,
    "placement": placement,
    "training": training,
    "processes": processes,
    "speed": gpu_speed.speed,
    "profiles": gpu_speed.profiles,
    "attention": gpu_speed.attention,
    "compiled": gpu_speed.compiled,
}


def describe(device: torch.device) -> dict[str, str]:
    import accelerate
    import transformers

    name = torch.cuda.get_device_name() if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {
        "device": name,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "python": sys.version.split()[0],
        "goldens": str(len(list((PARITY / "golden").glob("*.safetensors")))),
    }


def run_sections(bench: Bench, names: list[str]) -> None:
    """Runs sections one after the other; no failure of one loses another."""
    for name in names:
        if bench.left() < 5:
            bench.report.start(name, "skipped")
            continue
        bench.report.start(name)
        start, problem = time.monotonic(), None
        try:
            SECTIONS[name](bench)
        except (Exception, SystemExit) as error:
            problem = one_line(error)
            print("".join(traceback.format_exception(error)[-4:])[-2500:], flush=True)
        bench.report.finish(name, time.monotonic() - start, problem)
        bench.free()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, metavar="FOLDER", help="for report.md and report.json")
    parser.add_argument("--minutes", type=float, default=4.5, help="time limit (default: 4.5)")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small models and images, few repeats")
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # what a section runs in another process
    parser.add_argument("--backend", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU here; --device cpu --tiny runs the same code on small models.")
    if options.worker == "train":
        return train_worker(options)
    if options.worker:
        gpu_speed.work(Bench(options), options.worker)
        return 0
    if options.output_dir is None:
        parser.error("--output-dir is required: the folder for report.md and report.json.")
    report = Report(options.output_dir)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        bench = Bench(options, report, Path(folder))
        disable_progress_bar()
        report.environment = describe(bench.device)
        print(report.environment, flush=True)
        try:
            if {"training", "processes"} & set(options.sections):
                start_training(bench)
            run_sections(bench, options.sections)
        finally:
            for job in bench.jobs.values():
                job.stop()
    failed = [name for name, section in report.sections.items() if section["status"] == "failed"]
    print(f"\nReport: {options.output_dir / 'report.md'}{f'; failed: {failed}' if failed else ''}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
