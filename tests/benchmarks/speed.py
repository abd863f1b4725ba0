"""Time and memory of segmenting an image and of a training step.

    python tests/benchmarks/speed.py [--cases "image 512x512" step] [--repeats 5] [--dtype float32 bfloat16] [--profile]
    python tests/benchmarks/speed.py --check

Each case runs in a separate process, several times, and between two products of 2048 x 2048 float32 matrices on the
same threads. The table has medians in milliseconds. Goals and the costs of the published implementation are known as
multiples of the matrix product ("mm") and printed in milliseconds of this machine. Memory is what the first run adds to
the process with the model loaded (Linux only). A second table compares each goal with its ratio: of processor time to
the arithmetic of the matrix products and convolutions, to the published implementation, or to another case.

--check compares one small case with its stored cost, and always ends with status 0.

The models have random weights, which do not change the costs. With a GPU another table follows.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode, bmm_flop, sdpa_flop_count
from transformers import CLIPSegConfig, CLIPSegForImageSegmentation

from ifseg_hf import NANO
from ifseg_hf.modeling import IFSegConfig, IFSegForSemanticSegmentation, OFAConfig
from ifseg_hf.modeling.loss_ifseg import segmentation_loss
from ifseg_hf.processing.post_processing_ifseg import segmentation_maps


def make_model(size: str, words: int) -> IFSegForSemanticSegmentation:
    """A model of a preset of OFA, or of the embedded checkpoint's configuration ("nano")."""
    torch.manual_seed(0)
    backbone = OFAConfig.from_pretrained(NANO) if size == "nano" else OFAConfig.preset(size)
    model = IFSegForSemanticSegmentation(IFSegConfig(backbone_config=backbone))
    ids = torch.arange(1000, 1000 + words).tolist()
    model.set_words(dict(enumerate(map(str, ids))), [[i] for i in ids], [0, *range(100, 110), *ids, 2])
    return model.eval()


# Each of these functions prepares a case and returns a function that runs it once. ------------------------------------


def image(
    size: str, height: int, width: int, words: int, batch: int = 1, device: str = "cpu", cold: bool = False
) -> Callable:
    """Segmenting an image: labels of all pixels, smoothing included; `cold`: without cached attention biases."""
    model = make_model(size, words).to(device).requires_grad_(False)  # with no_grad alone, the profiler fails
    pixel_values = torch.randn(batch, 3, height, width, device=device)

    caches = [module.bias_cache for module in model.modules() if hasattr(module, "bias_cache")]

    @torch.no_grad()
    def run():
        for cache in caches if cold else ():
            cache.clear()
        return segmentation_maps(model(pixel_values=pixel_values), [(height, width)] * batch)

    return run


def step(size: str, words: int, batch: int = 2, device: str = "cpu") -> Callable:
    """A training step on word maps: forward, backward, clipping, AdamW."""
    model = make_model(size, words).train().to(device)
    model.freeze_for_word_maps()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    word_map = torch.randint(0, words, (batch, 32, 32), device=device)
    labels = word_map.repeat_interleave(16, 1).repeat_interleave(16, 2)

    def run():
        model(word_map=word_map, labels=labels).loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return run


def clipseg(words: int, once: bool) -> Callable:
    """CLIPSeg in the published size on a 352 x 352 image, without the encoding of the texts.

    CLIP encodes the image once for each word, as documented, or, with `once`, once for all words.
    """
    torch.manual_seed(0)
    config = CLIPSegConfig(vision_config={"patch_size": 16}, reduce_dim=64, use_complex_transposed_convolution=True)
    model = CLIPSegForImageSegmentation(config).eval()
    pixel_values = torch.randn(1, 3, 352, 352)
    conditions = torch.randn(words, config.projection_dim)

    @torch.no_grad()
    def run_once():
        encoded = model.clip.vision_model(pixel_values, output_hidden_states=True, interpolate_pos_encoding=True)
        layers = [encoded.hidden_states[i + 1].expand(words, -1, -1) for i in config.extract_layers]
        logits = model.decoder(layers, conditions).logits
        return nn.functional.interpolate(logits[:, None], size=(512, 512), mode="bilinear")[:, 0].argmax(0)

    @torch.no_grad()
    def run_as_documented():
        logits = model(pixel_values=pixel_values.expand(words, -1, -1, -1), conditional_embeddings=conditions).logits
        return nn.functional.interpolate(logits[:, None], size=(512, 512), mode="bilinear")[:, 0].argmax(0)

    return run_once if once else run_as_documented


def loss(batch: int, words: int) -> Callable:
    """Forward and backward pass of the segmentation loss alone."""
    logits = torch.randn(batch, words, 32, 32, requires_grad=True)
    labels = torch.randint(0, words, (batch, 512, 512))

    def run():
        segmentation_loss(logits, labels).backward()
        logits.grad = None

    return run


def smoothing(side: int, words: int) -> Callable:
    """From the model's outputs for a side x side image to its labels."""
    grid = (side // 16, side // 16)
    outputs = SimpleNamespace(logits=torch.randn(1, words, *grid), image_features=torch.randn(1, 1024, *grid))
    return lambda: segmentation_maps(outputs, [(side, side)])


@dataclass
class Case:
    """A row of the table. Goals and the published implementation's cost are in mm, memory is in MB; None: unknown.

    `over_arithmetic` is a goal, the cost divided by that of the arithmetic; `over` is another, the cost divided by
    `over[1]` times that of the case `over[0]`, which is at most `over[2]`.
    """

    name: str
    make: Callable[[], Callable]
    published: float | None = None
    goal: float | None = None
    goal_bfloat16: float | None = None
    memory: int | None = None
    over_arithmetic: float | None = None
    over: tuple[str, int, float] | None = None


SMALL = "image 512x512, 15 words, tiny"
SMALL_COST = 6.5  # mm of processor time on one thread; with AVX2, where mm takes longer, it is less
CASES = [
    Case(SMALL, partial(image, "tiny", 512, 512, 15), 9.8, 4, 2.5, over_arithmetic=1.15),
    Case("image 512x512, 15 words, tiny, cold", partial(image, "tiny", 512, 512, 15, cold=True), 9.8, 4, 2.5),
    Case("image 512x683, 15 words, tiny", partial(image, "tiny", 512, 683, 15), 16.4, 6.5, 4),
    Case("image 512x683, 15 words, tiny, cold", partial(image, "tiny", 512, 683, 15, cold=True), 16.4, 6.5, 4),
    Case("image 512x512, 171 words, tiny", partial(image, "tiny", 512, 512, 171), 18.6, 5.5, 3.5, over=(SMALL, 1, 1.3)),
    Case("image 512x512, 1000 words, tiny", partial(image, "tiny", 512, 512, 1000), over=(SMALL, 1, 2.5)),
    Case("8 images 512x512, 15 words, tiny", partial(image, "tiny", 512, 512, 15, 8), over=(SMALL, 8, 1)),
    Case("image 1024x1024, 15 words, tiny", partial(image, "tiny", 1024, 1024, 15), memory=500, over_arithmetic=1.5),
    Case("image 512x512, 15 words, base", partial(image, "base", 512, 512, 15), 62.8, 30, 15),
    Case("image 512x683, 15 words, base", partial(image, "base", 512, 683, 15), 112.3, 42, 22),
    Case("step, batch 2, 15 words, nano", partial(step, "nano", 15), over_arithmetic=1.6),
    Case("step, batch 2, 15 words, tiny", partial(step, "tiny", 15), 52.7, 20, 10, over_arithmetic=1.6),
    Case("step, batch 2, 171 words, tiny", partial(step, "tiny", 171), 86.0, 25, 13, over_arithmetic=1.6),
    Case("step, batch 2, 15 words, base", partial(step, "base", 15), 367, 150, 75),
    Case("CLIPSeg, 15 words", partial(clipseg, 15, once=False)),
    Case("CLIPSeg, 15 words, image encoded once", partial(clipseg, 15, once=True)),
    Case("loss, batch 16, 171 words", partial(loss, 16, 171), memory=300),
    Case("smoothing 2048x2048, 15 words", partial(smoothing, 2048, 15), memory=1000),
]


def bfloat16_supported() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


# Measuring ------------------------------------------------------------------------------------------------------------


def resident(peak: bool = False) -> float:
    """Megabytes of this process in memory, now or at its peak; nan where the system does not report them."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return float("nan")
    return int(status.split("VmHWM:" if peak else "VmRSS:")[1].split()[0]) / 1000


def reset_peak() -> None:
    """Resets the peak of [`resident`], where the system allows it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def clock(run: Callable) -> torch.Tensor:
    """Wall-clock seconds and processor seconds of one run."""
    start = time.perf_counter(), time.process_time()
    run()
    return torch.tensor([time.perf_counter() - start[0], time.process_time() - start[1]])


def measure(case: Case, dtype: str, repeats: int) -> dict[str, float]:
    """Runs a case in this process.

    Returns:
        Medians of its cost in mm ("wall", "cpu") and of mm in seconds ("unit"), MB of memory ("memory"), and the cost
        of its matrix products and convolutions in mm ("arithmetic").
    """
    run = case.make()
    unit = partial(torch.mm, *torch.randn(2, 2048, 2048))
    reset_peak()
    before = resident()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        run()
    memory = resident(peak=True) - before
    unit()
    ratios, units = [], []
    for _ in range(repeats):
        first = clock(unit)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            cost = clock(run)
        units.append((first + clock(unit)) / 2)
        ratios.append(cost / units[-1])
    wall, cpu = torch.stack(ratios).median(0).values.tolist()
    unit_seconds = statistics.median(u[0].item() for u in units)
    return {"wall": wall, "cpu": cpu, "memory": memory, "unit": unit_seconds, "arithmetic": arithmetic(run)}


def arithmetic(run: Callable) -> float:
    """The cost of the matrix products and convolutions of a run in mm."""
    mapping = {  # of operations that torch itself does not count
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        torch.ops.aten.baddbmm_: lambda result, *factors, **__: bmm_flop(*factors),
    }
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        run()
    return counter.get_total_flops() / (2 * 2048**3)


def time_profile(case: Case, rows: int = 6) -> str:
    """The arithmetic of a case's matrix products in mm, and the operations that take most of its time."""
    run = case.make()
    run()  # fills the caches, which later runs use
    products = arithmetic(run)
    with profile() as profiler:
        run()
    costs = {event.key.removeprefix("aten::"): event.self_cpu_time_total for event in profiler.key_averages()}
    most = sorted(costs, key=costs.get, reverse=True)[:rows]
    shares = ", ".join(f"{name} {costs[name] / sum(costs.values()):.0%}" for name in most)
    return f"{products:.1f} mm of arithmetic; {shares}"


def measure_in_process(name: str, dtype: str, repeats: int, threads: int) -> dict[str, float]:
    """[`measure`] in a new process."""
    options = ["--worker", name, "--dtype", dtype, "--repeats", str(repeats), "--threads", str(threads)]
    result = subprocess.run([sys.executable, __file__, *options], stdout=subprocess.PIPE, text=True)
    if result.returncode:
        sys.exit(f'"{name}" failed; its message is above.')
    return json.loads(result.stdout)


def start_seconds(code: str) -> float:
    """The median of the seconds that this code prints last, over three processes."""
    runs = (subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(3))
    return statistics.median(float(run.stdout.split()[-1]) for run in runs)


IMPORT = """
import time, torch, transformers
from transformers import AutoConfig, AutoProcessor, PreTrainedModel, pipelines
start = time.process_time()
import ifseg_hf.registration
print(time.process_time() - start)
"""
FIRST_MASK = f"""
import sys, tempfile, time
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
import numpy as np, ifseg_hf
from speed import make_model
from ifseg_hf.evaluation.segmenter import load_segmenter
from ifseg_hf.processing import IFSegProcessor
with tempfile.TemporaryDirectory() as folder:
    make_model("nano", 15).save_pretrained(folder)
    IFSegProcessor.from_pretrained(ifseg_hf.NANO).save_pretrained(folder)
    start = time.process_time()
    segmenter = load_segmenter(folder, untuned=True)
    segmenter.segment([np.zeros((480, 640, 3), np.uint8)])
    print(time.process_time() - start)
"""


# GPU ------------------------------------------------------------------------------------------------------------------


def gpu_seconds(run: Callable, repeats: int = 10) -> float:
    """Mean seconds of a run, after three runs to warm up."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def gpu_table(batch: int = 16) -> None:
    """Base in bfloat16: steps and images per second, memory, and share of the peak rate of matrix products."""
    half = partial(torch.autocast, "cuda", torch.bfloat16)
    peak = 2 * 8192**3 / gpu_seconds(partial(torch.mm, *torch.randn(2, 8192, 8192, device="cuda").bfloat16()))
    print(f"\n{torch.cuda.get_device_name()}: {peak / 1e12:.0f} TFLOP/s in a bfloat16 matrix product\n")
    print("| base, batch 16, bfloat16 | per second | goal on an H100 | memory, GB | share of the matrix peak |")
    print("|---|---|---|---|---|")
    for words in (15, 171):
        for name, make, count, goal in (
            ("steps", partial(step, "base", words, batch, "cuda"), 1, 20),
            ("images 512x512", partial(image, "base", 512, 512, words, batch, "cuda"), batch, 150),
        ):
            torch.cuda.reset_peak_memory_stats()
            run = make()
            with half():
                with FlopCounterMode(display=False) as counter:
                    run()
                seconds = gpu_seconds(run)
            memory, share = torch.cuda.max_memory_allocated() / 1e9, counter.get_total_flops() / seconds / peak
            print(
                f"| {name}, {words} words | {count / seconds:.1f} | {goal} | {memory:.1f} | {share:.0%} |", flush=True
            )


# Table ----------------------------------------------------------------------------------------------------------------


def in_milliseconds(cost: float | None, unit: float) -> str:
    """A cost in mm as milliseconds, where mm takes `unit` seconds."""
    return "" if cost is None else f"{1000 * unit * cost:.0f}"


def goals_table(rows: dict[str, dict[str, float]]) -> None:
    """Prints the goals of the measured cases, in float32, as ratios of processor time."""
    print("\n| ratio | found | goal |\n|---|---|---|")
    for case in CASES:
        row = rows.get(case.name)
        if row is None:
            continue
        lines = []
        if case.published is not None:
            faster = 2.7 if not case.name.startswith("step") else 4 if "171 words" in case.name else 3.2
            lines.append(("published implementation / it", case.published / row["cpu"], f"at least {faster}"))
        if case.over_arithmetic is not None:
            lines.append(("it / its arithmetic", row["cpu"] / row["arithmetic"], f"at most {case.over_arithmetic}"))
        if case.over is not None and case.over[0] in rows:
            other, times, goal = case.over
            ratio = row["cpu"] / (times * rows[other]["cpu"])
            lines.append((f"it / {f'{times} times ' if times > 1 else ''}{other}", ratio, f"at most {goal}"))
        for what, ratio, goal in lines:
            print(f"| {case.name}: {what} | {ratio:.2f} | {goal} |")


@contextlib.contextmanager
def busy_process() -> Iterator[None]:
    """Another process that keeps one core busy."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def busy_table(options: argparse.Namespace) -> None:
    """Prints how many times as long an image and a step take while another process has one core."""
    for name in (SMALL, "step, batch 2, 171 words, tiny"):
        seconds = []
        for beside in (contextlib.nullcontext(), busy_process()):
            with beside:
                row = measure_in_process(name, "float32", options.repeats, options.threads)
            seconds.append(row["wall"] * row["unit"])
        ratio = seconds[1] / seconds[0]
        print(f"| {name}: beside a busy process / alone, wall-clock | {ratio:.2f} | at most 3 |", flush=True)


def check() -> None:
    """Prints the cost of a small case beside the stored one, and whether it is more than twice as high."""
    cost = measure_in_process(SMALL, "float32", 3, 1)["cpu"]
    verdict = "slower than before" if cost > 2 * SMALL_COST else "as before"
    print(f"{SMALL}: {cost:.1f} products of 2048 x 2048 matrices on one thread, stored {SMALL_COST}: {verdict}")


def cpu_table(options: argparse.Namespace) -> None:
    """Prints time and memory of the cases, then of importing the package and segmenting the first image."""
    print(f"{options.threads} threads, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}")
    if not bfloat16_supported():
        print("bfloat16: not measured, this processor only emulates it")
    print("\n| case | dtype | ms | ms (processor) | goal | published, float32 | memory, MB | goal |")
    print("|---|---|---|---|---|---|---|---|")
    units, rows = [], {}
    for case in options.cases:
        for dtype in options.dtype:
            row = measure_in_process(case.name, dtype, options.repeats, options.threads)
            units.append(row["unit"])
            if dtype == "float32":
                rows[case.name] = row
            goal = case.goal if dtype == "float32" else case.goal_bfloat16
            cells = [in_milliseconds(x, row["unit"]) for x in (row["wall"], row["cpu"], goal, case.published)]
            cells += [f"{row['memory']:.0f}", "" if case.memory is None else str(case.memory)]
            print(f"| {' | '.join([case.name, dtype, *cells])} |", flush=True)
    goals_table(rows)
    if {case.name for case in options.cases} == {case.name for case in CASES}:
        busy_table(options)
    print(f"\nmm: {1000 * statistics.median(units):.0f} ms")
    for what, code, goal in (
        ("import ifseg_hf, after transformers", IMPORT, 0.3),
        ("loading a tuned nano and the mask of its first image, after all imports", FIRST_MASK, 0.7),
    ):
        print(f"{what}: {start_seconds(code):.2f} s of processor time (goal {goal} s where mm takes 100 ms)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", metavar="TEXT", help="only cases whose name contains one of these")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], help="default: all that run fast")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--check", action="store_true", help="compare one small case with its stored cost, no table")
    parser.add_argument("--profile", action="store_true", help="print the slowest operations, no table")
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # name of the case to run in this process
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.worker:
        case = next(case for case in CASES if case.name == options.worker)
        print(json.dumps(measure(case, options.dtype[0], options.repeats)))
        return
    if options.check:
        check()
        return
    available = ["float32", "bfloat16"] if bfloat16_supported() else ["float32"]
    options.dtype = [dtype for dtype in options.dtype or available if dtype in available]
    options.cases = [case for case in CASES if any(text in case.name for text in options.cases or [""])]
    if not options.cases:
        parser.error(f"no such case; there are: {'; '.join(case.name for case in CASES)}")
    if options.profile:
        for case in options.cases:
            print(f"{case.name}: {time_profile(case)}", flush=True)
        return
    cpu_table(options)
    if torch.cuda.is_available():
        gpu_table()


if __name__ == "__main__":
    main()
