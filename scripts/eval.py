"""Mean IoU of a model on images with masks.

    accelerate launch scripts/eval.py --model tuned --dataset CAMVID
    accelerate launch scripts/eval.py --model ofa-coco --dataset coco-stuff-unseen --data-dir COCO \\
        --smoothing-neighbors 2,3,5,8 --smoothing-iterations 0,25

Writes results.json and results.md. A stopped evaluation resumes when it is started again with the same arguments.
"""

import argparse
import json
import platform
import shlex
import sys
from dataclasses import replace
from importlib.metadata import version
from itertools import product
from pathlib import Path

PACKAGES = ("ifseg-hf", "torch", "transformers", "datasets", "accelerate")


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ifseg-ofa-nano", help="folder or Hub id (default: the embedded model)")
    parser.add_argument(
        "--baseline",
        choices=["cosine", "clip", "maskclip"],
        help="cosine: similarity of the model's patches and words, without tuning; clip, maskclip: --model is a CLIP. "
        "For OFA without tuning, leave out this flag and give the converted checkpoint as --model with --untuned",
    )
    parser.add_argument(
        "--dataset",
        required=True,
        help="folder with a dataset.json; coco-stuff, coco-stuff-unseen, coco-stuff-seen, coco-stuff-coarse or ade20k; "
        "or a Hub id",
    )
    parser.add_argument("--data-dir", help="folder that coco-stuff or ade20k was unpacked to")
    parser.add_argument("--split", help="split to evaluate on (default: the validation split)")
    parser.add_argument(
        "--categories",
        help="categories to evaluate: comma-separated or a file; or a YAML or JSON file that merges categories, "
        "word: [categories of the dataset]. Pixels of other categories are ignored",
    )
    parser.add_argument(
        "--rest", metavar="NAME", help="a category for the pixels of other categories, in place of ignoring them"
    )
    parser.add_argument(
        "--unseen",
        help="comma-separated categories without labels in training: adds the means over seen and unseen categories "
        "and their harmonic mean",
    )
    parser.add_argument("--dataset-categories", help="names of the mask values, for a dataset that does not name them")
    parser.add_argument("--ignore-index", type=int, help="mask value of unlabelled pixels, if the dataset lacks it")
    parser.add_argument("--streaming", action="store_true", help="stream a dataset of the Hub")
    parser.add_argument(
        "--smoothing-neighbors",
        type=integers,
        metavar="K",
        help="numbers of patches to average, comma-separated; each is evaluated (default: the model's, 3)",
    )
    parser.add_argument(
        "--smoothing-iterations",
        type=integers,
        metavar="N",
        help="how often to average, comma-separated; 0: no smoothing (default: the model's, 25, or 0 if trained on "
        "images)",
    )
    parser.add_argument(
        "--inference", choices=["whole", "slide"], help="whole images or square crops (default: the model's)"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="images of one size per batch (8)")
    parser.add_argument("--limit", type=int, metavar="N", help="evaluate on the first N images only")
    parser.add_argument(
        "--on-error", choices=["fail", "skip"], default="fail", help="for images that can't be read (default: fail)"
    )
    parser.add_argument(
        "--output-dir", type=Path, help="folder for the results (default: outputs/evaluation/MODEL-DATASET)"
    )
    parser.add_argument("--save-predictions", type=Path, metavar="DIR", help="folder for a PNG of labels per image")
    parser.add_argument("--save-overlays", type=int, default=0, metavar="N", help="save overlays of the first N images")
    parser.add_argument("--untuned", action="store_true", help="also use a model that was never tuned, such as OFA")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the code saved with a model of another backbone"
    )
    parser.add_argument("--cpu", action="store_true", help="compute on the CPU even where there is a GPU")
    parser.add_argument("--push-to-hub", metavar="REPO", help="add the results to the model card of owner/name")
    return parser


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser()
    options = parser.parse_args(arguments)
    if min(options.smoothing_neighbors or [1]) < 1 or min(options.smoothing_iterations or [0]) < 0:
        parser.error("--smoothing-neighbors must be at least 1, --smoothing-iterations at least 0")
    if options.batch_size < 1:
        parser.error("--batch-size must be at least 1")
    if options.limit is not None and options.limit < 1:
        parser.error("--limit must be at least 1")
    if options.rest is not None and options.categories is None:
        parser.error("--rest is for the categories that --categories does not name: give --categories, too")
    if options.push_to_hub and (options.baseline or options.limit):
        parser.error("--push-to-hub is for whole datasets and your own models: leave out --baseline and --limit")
    if options.output_dir is None:
        name = "-".join(Path(part).name for part in (options.model, options.dataset))
        name += "".join(f"-{part}" for part in (options.baseline, options.split) if part)
        options.output_dir = Path("outputs") / "evaluation" / name
    return options


def load_data(options: argparse.Namespace):
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


def evaluate(options: argparse.Namespace, command: str, state) -> dict:
    """Returns the content of results.json."""
    from ifseg_hf.evaluation.evaluate import evaluate_segmenter
    from ifseg_hf.evaluation.segmenter import load_segmenter
    from ifseg_hf.hub.publish import check_access

    data = load_data(options)
    if options.push_to_hub and state.is_main_process:
        check_access(options.push_to_hub)
    segmenter = load_segmenter(
        options.model,
        options.baseline,
        state.device,
        options.inference,
        trust_remote_code=options.trust_remote_code,
        untuned=options.untuned,
    )
    segmenter.set_words(data.names)
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
    )
    return {
        "command": command,
        "model": options.model,
        "baseline": options.baseline,
        "dataset": options.dataset,
        "split": options.split,
        "inference": segmenter.inference,
        "images": evaluation.images,
        "skipped": evaluation.skipped,
        "seconds": round(evaluation.seconds, 1),
        "processes": state.num_processes,
        "device": state.device.type,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "results": evaluation.results(),
    }


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)

    # Imports that take seconds come after the arguments, so that wrong arguments are reported at once.
    from accelerate import PartialState
    from transformers.utils.logging import disable_progress_bar

    from ifseg_hf.evaluation.report import results_table
    from ifseg_hf.hub.publish import HubError, add_results

    disable_progress_bar()
    state = PartialState(cpu=options.cpu)
    command = shlex.join(["scripts/eval.py", *(sys.argv[1:] if arguments is None else arguments)])
    try:
        results = evaluate(options, command, state)
        if state.is_main_process:
            write(options.output_dir, results, results_table(results["results"]))
            if options.push_to_hub:
                print(f"Published: {add_results(options.push_to_hub, results)}")
    except (HubError, OSError, ValueError) as error:
        print(f"eval.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped. The same command resumes the evaluation.", file=sys.stderr)
        return 130
    finally:
        state.destroy_process_group()  # otherwise gloo's threads sometimes abort the interpreter when it ends
    return 0


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


if __name__ == "__main__":
    sys.exit(main())
