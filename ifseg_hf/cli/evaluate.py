"""`ifseg evaluate`: mean IoU of a model on images with masks."""

import json
import platform
import shlex
import sys
from dataclasses import replace
from importlib.metadata import version
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import typer

from ifseg_hf.cli.app import CommandError
from ifseg_hf.cli.options import (
    Background,
    Cpu,
    DataDir,
    ImageModel,
    OnError,
    Threshold,
    TrustRemoteCode,
    Untuned,
    at_least,
    flag,
    option,
)
from ifseg_hf.pretrained import EMBEDDED

__all__ = ["evaluate"]

EXAMPLES = 6  # best and worst images in a report
PACKAGES = ("ifseg-hf", "torch", "transformers", "datasets", "accelerate")


def integers(text: str) -> list[int]:
    """The integers in a text, with commas between them."""
    return [int(part) for part in text.split(",")]


# Arguments of this command alone
Dataset = Annotated[
    str,
    option(
        "folder with a dataset.json; coco-stuff, coco-stuff-unseen, coco-stuff-seen, coco-stuff-coarse or ade20k; "
        "or a Hub id"
    ),
]
Baseline = Annotated[
    Literal["cosine", "clip", "maskclip"] | None,
    option(
        "cosine: similarity of the model's patches and words, without tuning; clip, maskclip: --model is a CLIP, a "
        "folder or Hub id, or OpenAI's file of one with a ResNet (RN101.pt). "
        "For OFA without tuning, leave out this flag and give OFA as --model with --untuned"
    ),
]
Categories = Annotated[
    str | None,
    option(
        "categories to evaluate: comma-separated or a file; or a YAML or JSON file that merges categories, word: "
        "[categories of the dataset]. Pixels of other categories are ignored"
    ),
]
Rest = Annotated[
    str | None,
    option("a category for the pixels of other categories, in place of ignoring them", metavar="NAME"),
]
Unseen = Annotated[
    str | None,
    option(
        "comma-separated categories without labels in training: adds the means over seen and unseen categories and "
        "their harmonic mean"
    ),
]
DatasetCategories = Annotated[str | None, option("names of the mask values, for a dataset that does not name them")]
IgnoreIndex = Annotated[
    Any,
    option(
        "mask values of unlabelled pixels, comma-separated, if the dataset does not name them",
        metavar="VALUES",
        parser=integers,
    ),
]
SmoothingNeighbors = Annotated[
    Any,
    option(
        "numbers of patches to average, comma-separated; each is evaluated (default: the model's)",
        metavar="K",
        parser=integers,
        callback=at_least(1),
    ),
]
SmoothingIterations = Annotated[
    Any,
    option(
        "how often to average, comma-separated; 0: no smoothing (default: the model's)",
        metavar="N",
        parser=integers,
        callback=at_least(0),
    ),
]
Inference = Annotated[Literal["whole", "slide"] | None, option("whole images or square crops (default: the model's)")]
Limit = Annotated[int | None, option("evaluate on the first N images only", metavar="N", callback=at_least(1))]
OutputDir = Annotated[Path | None, option("folder for the results (default: outputs/evaluation/MODEL-DATASET)")]
Report = Annotated[
    Path | None,
    option(
        "write a web page with scores, confusions, worst and best images: report.html in this folder, or this .html "
        "file",
        metavar="DIR",
    ),
]
PushToHub = Annotated[str | None, option("add the results to the model card of owner/name", metavar="REPO")]


def evaluate(
    ctx: typer.Context,
    dataset: Dataset,
    model: ImageModel = EMBEDDED,
    baseline: Baseline = None,
    data_dir: DataDir = None,
    split: Annotated[str | None, option("split to evaluate on (default: the validation split)")] = None,
    categories: Categories = None,
    rest: Rest = None,
    unseen: Unseen = None,
    dataset_categories: DatasetCategories = None,
    ignore_index: IgnoreIndex = None,
    streaming: Annotated[bool, flag("stream a dataset of the Hub", "--streaming")] = False,
    smoothing_neighbors: SmoothingNeighbors = None,
    smoothing_iterations: SmoothingIterations = None,
    background: Background = None,
    threshold: Threshold = None,
    inference: Inference = None,
    batch_size: Annotated[int, option("images of one size per batch (default: 8)", callback=at_least(1))] = 8,
    limit: Limit = None,
    on_error: OnError = "fail",
    output_dir: OutputDir = None,
    save_predictions: Annotated[Path | None, option("folder for a PNG of labels per image", metavar="DIR")] = None,
    save_overlays: Annotated[int, option("save overlays of the first N images", metavar="N")] = 0,
    report: Report = None,
    untuned: Untuned = False,
    trust_remote_code: TrustRemoteCode = False,
    cpu: Cpu = False,
    push_to_hub: PushToHub = None,
) -> int:
    """Measures the mean IoU of a model on images with masks.

    \b
    ifseg evaluate --model tuned --dataset CAMVID
    ifseg evaluate --model ofa-coco --dataset coco-stuff-unseen --data-dir COCO \\
        --smoothing-neighbors 2,3,5,8 --smoothing-iterations 0,25

    Writes results.json and results.md; with --report also a page to look at, with the worst and the best images. A
    stopped evaluation resumes when it is started again with the same arguments.
    """
    options = SimpleNamespace(**locals())
    check(options)
    program = f"scripts/{ctx.command_path}" if ctx.command_path.endswith(".py") else ctx.command_path
    return run(options, f"{program} {shlex.join(ctx.meta['arguments'])}")


def check(options: SimpleNamespace) -> None:
    """Checks arguments that depend on each other, and sets the default output folder. Raises `BadParameter`."""
    if options.rest is not None and options.categories is None:
        raise typer.BadParameter("--rest is for the categories that --categories does not name: give --categories, too")
    if options.push_to_hub and (options.baseline or options.limit):
        raise typer.BadParameter(
            "--push-to-hub is for whole datasets and your own models: leave out --baseline and --limit"
        )
    if options.output_dir is None:
        name = "-".join(Path(part).name for part in (options.model, options.dataset))
        name += "".join(f"-{part}" for part in (options.baseline, options.split) if part)
        options.output_dir = Path("outputs") / "evaluation" / name


def run(options: SimpleNamespace, command: str) -> int:
    """Evaluates and writes the results."""
    # Imports that take seconds come after the arguments, so that wrong arguments are reported at once.
    from accelerate import PartialState
    from transformers.utils.logging import disable_progress_bar

    from ifseg_hf.evaluation.html_report import write_evaluation_report
    from ifseg_hf.evaluation.report import results_table
    from ifseg_hf.hub.publish import HubError, add_results

    disable_progress_bar()
    state = PartialState(cpu=options.cpu)
    try:
        evaluation, results = measure(options, command, state)
        if state.is_main_process:
            write(options.output_dir, results, results_table(results["results"]))
            if options.report:
                print(f"Report: {write_evaluation_report(options.report, evaluation, results)}")
            if options.push_to_hub:
                print(f"Published: {add_results(options.push_to_hub, results)}")
    except (HubError, OSError, ValueError) as error:
        raise CommandError(error) from error
    except KeyboardInterrupt:
        print("Stopped. The same command resumes the evaluation.", file=sys.stderr)
        return 130
    finally:
        state.destroy_process_group()  # otherwise gloo's threads sometimes abort the interpreter when it ends
    return 0


def load_data(options: SimpleNamespace) -> Any:
    """Returns the dataset with the chosen categories and subsets."""
    from ifseg_hf.data.crops import find_labels
    from ifseg_hf.data.segmentation import load_segmentation_dataset
    from ifseg_hf.data.vocabularies import read_categories

    names = options.dataset_categories and list(read_categories(options.dataset_categories))
    data = load_segmentation_dataset(
        options.dataset, options.data_dir, options.split, names, options.ignore_index, options.streaming
    )
    if options.categories is not None:
        data = data.select(read_categories(options.categories), options.rest)
    if options.unseen is not None:
        unseen = find_labels(data, options.unseen)
        seen = [label for label in range(len(data.names)) if label not in unseen]
        data = replace(data, subsets={"seen": seen, "unseen": unseen})
    return data


def measure(options: SimpleNamespace, command: str, state: Any) -> tuple[Any, dict]:
    """Returns the evaluation and the content of results.json."""
    from ifseg_hf.data.vocabularies import read_background
    from ifseg_hf.evaluation.cosine import COSINE
    from ifseg_hf.evaluation.evaluate import evaluate_segmenter
    from ifseg_hf.evaluation.segmenter import load_segmenter
    from ifseg_hf.hub.publish import check_access
    from ifseg_hf.hub.published import resolve_checkpoint

    data = load_data(options)
    if options.push_to_hub and state.is_main_process:
        check_access(options.push_to_hub)
    if options.baseline in (None, COSINE):
        resolve_checkpoint(options.model)
    segmenter = load_segmenter(
        options.model,
        options.baseline,
        state.device,
        options.inference,
        trust_remote_code=options.trust_remote_code,
        untuned=options.untuned,
    )
    background = read_background(options.background)
    segmenter.set_words(data.names, background=segmenter.background if background is None else background)
    neighbors, iterations = segmenter.smoothing
    evaluation = evaluate_segmenter(
        segmenter,
        data,
        list(product(options.smoothing_neighbors or [neighbors], options.smoothing_iterations or [iterations])),
        batch_size=options.batch_size,
        state_dir=options.output_dir / "state",
        on_error=options.on_error,
        limit=options.limit,
        predictions_dir=options.save_predictions,
        overlays_dir=options.output_dir / "overlays" if options.save_overlays else None,
        overlays=options.save_overlays,
        progress=True,
        threshold=options.threshold,
        examples=EXAMPLES,  # also without --report, so that the same command with --report measures nothing again
    )
    results = {
        "command": command,
        "model": options.model,
        "baseline": options.baseline,
        "dataset": options.dataset,
        "split": options.split,
        "inference": segmenter.inference,
        "background": segmenter.background,
        "threshold": options.threshold,
        "images": evaluation.images,
        "skipped": evaluation.skipped,
        "seconds": round(evaluation.seconds, 1),
        "processes": state.num_processes,
        "device": state.device.type,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "results": evaluation.results(),
    }
    return evaluation, results


def write(folder: Path, results: dict, tables: str) -> None:
    """Writes results.json and results.md, and prints the tables."""
    text = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
    (folder / "results.json").write_text(text, encoding="utf-8")
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    skipped = ""
    if results["skipped"]:
        skipped = f"{len(results['skipped'])} images were left out:\n{'; '.join(results['skipped'])}\n\n"
    images = f"{results['images']} images, {results['seconds']} s in the last run; {versions}."
    (folder / "results.md").write_text(f"    {results['command']}\n\n{images}\n\n{skipped}{tables}", encoding="utf-8")
    print(f"\n{results['images']} images, in per cent:\n\n{tables}\n{skipped}", end="")
    print(f"Written to {folder / 'results.json'} and .md.")
