"""Sections of `gpu.py` that measure: speed, kernels, attention and compilation, and the programs that they start."""

import contextlib
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import compile_regions
from gpu_bench import Bench, Job, make_model, one_line, photo, set_words, word_map_step
from torch import nn

from ifseg_hf.modeling.attention_ofa import biased_sdpa_attention_forward

PROGRAM = Path(__file__).with_name("gpu.py")
LIMIT = 150.0  # seconds of a program that compiles, 10 to 15 of them for imports and the model


def speed(bench: Bench) -> None:
    """Images and training steps of OFA-base in bfloat16, eager: rate, memory and share of the matrix peak."""
    side = 256 if bench.tiny else 8192
    matrices = torch.randn(2, side, side, device=bench.device).bfloat16()
    peak = 2 * side**3 / bench.seconds(partial(torch.mm, *matrices))
    bench.report.row("speed", case=f"bfloat16 product of {side} x {side} matrices", TFLOPs=peak / 1e12)
    del matrices
    for precision in ("autocast", "weights"):
        model = make_model(bench, bench.words[0])
        model = model.bfloat16() if precision == "weights" else model
        model.requires_grad_(False)  # with no_grad alone, operations cannot be counted
        for words in bench.words:
            set_words(model, words)
            measure_photos(bench, model, precision, words, peak)
        model.train().requires_grad_(True).freeze_for_word_maps()
        for words in bench.words:
            set_words(model, words)
            cost = guarded(bench, f"step, {words} words", precision, word_map_step(bench, model, words, precision))
            if cost:
                bench.report.row("speed", **rates(cost, peak, 1, f"step, {words} words", precision, "steps/s"))
        del model
        bench.free()


def measure_photos(bench: Bench, model, precision: str, words: int, peak: float) -> None:
    side, batch = bench.side, bench.batch
    cases = [(batch, side, True), (batch, side, False)]
    if words == bench.words[0] and precision == "autocast":
        cases += [(1, side, True), (8, side, True), (1, 2 * side, True)]
    for count, pixels, labels in cases:
        case = f"{count} x {pixels}x{pixels}, {words} words, {'labels' if labels else 'logits'}"
        run = photo(bench, model, count, pixels, labels)

        def under_autocast(run=run):
            with bench.half(precision):
                return run()

        cost = guarded(bench, case, precision, under_autocast)
        if cost:
            bench.report.row("speed", **rates(cost, peak, count, case, precision, "images/s"))


def guarded(bench: Bench, case: str, precision: str, run: Callable) -> dict | None:
    """The costs of a run, or None and a row with the error."""
    if bench.left() < 3:
        bench.report.row("speed", case=case, precision=precision, problem="skipped: no time left")
        return None
    try:
        return bench.measure(run)
    except Exception as error:  # one case, such as one that does not fit the memory, must not lose the others
        bench.report.row("speed", case=case, precision=precision, problem=one_line(error))
        bench.free()
        return None


def rates(cost: dict, peak: float, count: int, case: str, precision: str, unit: str) -> dict:
    share = None if cost["operations"] is None else cost["operations"] / cost["seconds"] / peak
    row = {"case": case, "precision": precision, unit: count / cost["seconds"], "ms": 1000 * cost["seconds"]}
    return {**row, "memory, GB": cost["memory"], "share of peak": share}


def profiles(bench: Bench) -> None:
    """Where the time of a batch of images and of a step goes: busy share of the GPU, and its longest kernels."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (bench.device.type == "cuda")
    model, words = make_model(bench, bench.words[0]), bench.words[0]
    images = photo(bench, model, bench.batch, bench.side)

    def run_images():
        with bench.half("autocast"):
            images()

    for case, make in (("images", lambda: run_images), ("step", lambda: trained_step(bench, model, words))):
        run = make()
        seconds = bench.seconds(run, repeats=3)
        with profile(activities=kinds) as profiler:
            run()
            bench.synchronize()
        cuda = bench.device.type == "cuda"
        averages = profiler.key_averages()
        costs = {x.key: x.self_device_time_total if cuda else x.self_cpu_time_total for x in averages}
        if cuda:  # kernels alone: operators carry the time of their kernels a second time
            kernels = {x.key for x in averages if str(x.device_type).endswith("CUDA")}
            costs = {name: cost for name, cost in costs.items() if name in kernels}
        total = sum(costs.values())
        if not total:
            bench.report.row("profiles", case=case, seconds=seconds, problem="the profiler recorded no kernel")
            continue
        bench.report.row("profiles", case=case, seconds=seconds, **{"busy share": total / 1e6 / seconds})
        for name in sorted(costs, key=costs.get, reverse=True)[:8]:
            bench.report.row("profiles", case=case, kernel=name[:90].replace("|", "/"), share=costs[name] / total)


def trained_step(bench: Bench, model, words: int) -> Callable:
    model.train().freeze_for_word_maps()
    return word_map_step(bench, model, words, "autocast")


def in_workers(bench: Bench, section: str, cases: list[str]) -> None:
    """Runs each case in a subprocess with a time limit, and reports the rows that it prints."""
    for case in cases:
        limit = min(LIMIT, bench.left())
        if limit < 10:
            bench.report.row(section, case=case, problem="skipped: no time left")
            continue
        size = ["--tiny"] if bench.tiny else []
        worker = [str(PROGRAM), "--worker", case, "--device", bench.device.type, *size]
        job = Job(worker, bench.folder / f"{case}.log")
        bench.jobs[case] = job
        status = job.wait(limit)
        for line in job.log.read_text(errors="replace").splitlines():
            if line.startswith("ROW "):
                bench.report.row(section, **json.loads(line[4:]))
        if status is None:
            bench.report.row(section, case=case, problem=f"stopped after {limit:.0f} s")
        elif status:
            bench.report.row(section, case=case, problem=f"status {status}: {job.reason()}")


def compiled(bench: Bench) -> None:
    """torch.compile of the layers one by one, then of the whole model: images and steps, bfloat16 under autocast."""
    few, many = bench.words
    cases = [f"layers-step-{few}", f"layers-photo-{few}"]
    in_workers(bench, "compiled", cases if bench.tiny else [*cases, f"layers-step-{many}", f"whole-step-{few}"])


def attention(bench: Bench) -> None:
    """One attention with a bias, as in OFA-base's encoder: the kernels of torch, and flex attention."""
    in_workers(bench, "attention", ["attention-kernels", "attention-flex"])


# Workers: what `in_workers` runs in another process -----------------------------------------------------------------


def work(bench: Bench, case: str) -> None:
    """Runs a case of [`in_workers`] in this process."""
    kind, what, *words = case.split("-")
    if kind == "attention":
        attention_worker(bench, what)
    else:
        compiled_worker(bench, kind, what, int(words[0]))


def print_row(**values) -> None:
    print("ROW " + json.dumps(values), flush=True)


def compiled_worker(bench: Bench, part: str, kind: str, words: int) -> None:
    """Prints the seconds of eager, of compiling, and of compiled.

    part: "layers", as `accelerate launch --dynamo_use_regional_compilation` compiles them, or "whole".
    """
    model = make_model(bench, words)
    if kind == "step":
        model.train().freeze_for_word_maps()

    def make(network):
        if kind == "step":
            return word_map_step(bench, network, words, "autocast")
        run = photo(bench, network, bench.batch, bench.side, labels=False)

        def under_autocast():
            with bench.half("autocast"):
                return run()

        return under_autocast

    compile_part = compile_regions if part == "layers" else torch.compile
    run = make(compile_part(model, backend="aot_eager" if bench.tiny else "inductor"))
    start = time.perf_counter()
    run()
    bench.synchronize()
    first = time.perf_counter() - start
    fast = bench.seconds(run)
    eager = bench.seconds(make(model))
    rate = (1 if kind == "step" else bench.batch) / fast
    unit = "steps/s" if kind == "step" else "images/s"
    case = f"{part}, {kind}, {words} words"
    print_row(case=case, **{"eager, ms": 1000 * eager, "compiled, ms": 1000 * fast, unit: rate, "compiling, s": first})


def attention_worker(bench: Bench, kind: str) -> None:
    """Prints the seconds of one attention with a trained bias that all images share, forward and with backward."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    batch, heads, length = (2, 2, 64) if bench.tiny else (16, 12, 1024 + 27)
    shape = (batch, heads, length, 64)
    tensors = [torch.randn(shape, device=bench.device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    bias = torch.randn(1, heads, length, length, device=bench.device, dtype=torch.bfloat16, requires_grad=True)

    def timed(case: str, attend: Callable, context: Callable = contextlib.nullcontext) -> None:
        times, problem = {}, {}
        try:
            with context(), torch.no_grad():
                times["forward, ms"] = 1000 * bench.seconds(lambda: attend(*tensors, bias))
            with context():
                both = bench.seconds(lambda: attend(*tensors, bias).float().sum().backward())
            times["forward and backward, ms"] = 1000 * both
        except Exception as error:  # a kernel that does not take these inputs
            problem = {"problem": one_line(error)}
        print_row(case=case, **times, **problem)

    if kind == "flex":
        from torch.nn.attention.flex_attention import flex_attention

        attend = flex_attention if bench.tiny else torch.compile(flex_attention)

        def flex(query, key, value, bias):
            return attend(query, key, value, score_mod=lambda score, b, h, i, j: score + bias[0, h, i, j])

        timed("flex attention, bias read by score_mod", flex)
        return
    module = nn.Module()
    fused = nn.functional.scaled_dot_product_attention
    timed("the project's sdpa", lambda q, k, v, b: biased_sdpa_attention_forward(module, q, k, v, b, 0.1)[0])
    for backend in (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH):
        with_bias = (lambda q, k, v, b: fused(q, k, v, attn_mask=b), lambda x=backend: sdpa_kernel(x))
        timed(f"sdpa, {backend.name}", *with_bias)
    timed("sdpa without the bias, for comparison", lambda q, k, v, b: fused(q, k, v))
