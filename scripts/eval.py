"""Mean IoU of a model on photos with masks.

    accelerate launch scripts/eval.py --model tuned --dataset ../shared/data/camvid
    accelerate launch scripts/eval.py --model ofa-coco --dataset coco-stuff-unseen --data-dir COCO \\
        --smoothing-neighbors 2,3,5,8 --smoothing-iterations 0,25

Writes results.json and results.md. Stopped and started again with the same arguments, it goes on where it was.
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


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ifseg-ofa-nano", help="folder or Hub id (default: the embedded model)")
    parser.add_argument(
        "--baseline",
        choices=["cosine", "clip", "maskclip"],
        help="cosine: the model's patches against its words, untuned; clip, maskclip: --model is a CLIP. OFA without "
        "tuning needs no flag: its converted checkpoint is the --model",
    )
    parser.add_argument(
        "--dataset",
        required=True,
        help="folder with a dataset.json; coco-stuff, coco-stuff-unseen, coco-stuff-seen, coco-stuff-coarse or ade20k; "
        "or a Hub id",
    )
    parser.add_argument("--data-dir", help="where the data set of that name was unpacked")
    parser.add_argument("--split", help="its part to evaluate on (default: the validation photos)")
    parser.add_argument(
        "--categories",
        help="some of the data set's names: commas between them or a file; a YAML or JSON mapping puts words in their "
        "place, word: [names that count as it]. Other pixels are ignored",
    )
    parser.add_argument(
        "--unseen",
        help="categories that training did not see, with commas: seen, unseen and harmonic mean are told, too",
    )
    parser.add_argument("--dataset-categories", help="the names of the masks' numbers, where the data lacks them")
    parser.add_argument("--ignore-index", type=int, help='the number for "no label", where the data does not tell it')
    parser.add_argument("--streaming", action="store_true", help="read a data set of the Hub as it comes")
    parser.add_argument(
        "--smoothing-neighbors", type=integers, metavar="K", help="with commas: each of them (default: the model's, 3)"
    )
    parser.add_argument(
        "--smoothing-iterations", type=integers, metavar="N", help="likewise; 0: none (default: the model's, 25 or 0)"
    )
    parser.add_argument(
        "--inference", choices=["whole", "slide"], help="photos whole or in square crops (default: the model's)"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="photos of one size that run together (8)")
    parser.add_argument("--limit", type=int, help="only so many photos")
    parser.add_argument("--on-error", choices=["fail", "skip"], default="fail", help="at a photo that can't be read")
    parser.add_argument("--output-dir", type=Path, help="(default: outputs/evaluation/MODEL-DATASET)")
    parser.add_argument("--save-predictions", type=Path, metavar="DIR", help="folder for a PNG of labels a photo")
    parser.add_argument("--save-overlays", type=int, default=0, metavar="N", help="pictures of the first N photos")
    parser.add_argument("--cpu", action="store_true", help="compute on the CPU even where there is a GPU")
    parser.add_argument("--push-to-hub", metavar="REPO", help="add the numbers to the model card of owner/name")
    options = parser.parse_args(arguments)
    if min(options.smoothing_neighbors or [1]) < 1 or min(options.smoothing_iterations or [0]) < 0:
        parser.error("--smoothing-neighbors must be at least 1, --smoothing-iterations at least 0")
    if options.batch_size < 1:
        parser.error("--batch-size must be at least 1")
    if options.limit is not None and options.limit < 1:
        parser.error("--limit must be at least 1")
    if options.push_to_hub and (options.baseline or options.limit):
        parser.error("--push-to-hub is for whole data sets and models of one's own: leave out --baseline and --limit")
    if options.output_dir is None:
        name = "-".join(Path(part).name for part in (options.model, options.dataset))
        name += "".join(f"-{part}" for part in (options.baseline, options.split) if part)
        options.output_dir = Path("outputs") / "evaluation" / name
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)

    # The heavy imports come after the arguments, whose mistakes so show at once.
    from accelerate import PartialState
    from transformers.utils.logging import disable_progress_bar

    from ifseg_hf.data.crops import find_labels
    from ifseg_hf.data.segmentation import load_segmentation_dataset
    from ifseg_hf.data.vocabularies import read_categories
    from ifseg_hf.evaluation.evaluate import evaluate_segmenter, inference_of, load_segmenter, markdown
    from ifseg_hf.hub.publish import HubError, add_results, check_access

    disable_progress_bar()
    state = PartialState(cpu=options.cpu)
    try:
        names = options.dataset_categories and list(read_categories(options.dataset_categories))
        data = load_segmentation_dataset(
            options.dataset, options.data_dir, options.split, names, options.ignore_index, options.streaming
        )
        if options.categories is not None:
            data = data.select(read_categories(options.categories))
        if options.unseen is not None:
            unseen = find_labels(data, options.unseen)
            seen = [label for label in range(len(data.names)) if label not in unseen]
            data = replace(data, subsets={"seen": seen, "unseen": unseen})
        if options.push_to_hub and state.is_main_process:
            check_access(options.push_to_hub)
        segmenter = load_segmenter(options.model, options.baseline, state.device, options.inference)
        segmenter.set_words(data.names)
        own = segmenter.image_processor
        neighbors = options.smoothing_neighbors or [own.smoothing_neighbors]
        iterations = options.smoothing_iterations or [own.smoothing_iterations]
        evaluation = evaluate_segmenter(
            segmenter,
            data,
            list(product(neighbors, iterations)),
            batch_size=options.batch_size,
            state_dir=options.output_dir / "state",
            on_error=options.on_error,
            limit=options.limit,
            predictions_dir=options.save_predictions,
            overlays_dir=options.output_dir / "overlays" if options.save_overlays else None,
            overlays=options.save_overlays,
            progress=True,
        )
        if state.is_main_process:
            told = {
                "command": shlex.join(["scripts/eval.py", *(sys.argv[1:] if arguments is None else arguments)]),
                "model": options.model,
                "baseline": options.baseline,
                "dataset": options.dataset,
                "split": options.split,
                "inference": inference_of(segmenter),
                "images": evaluation.images,
                "skipped": evaluation.skipped,
                "seconds": round(evaluation.seconds, 1),
                "processes": state.num_processes,
                "device": state.device.type,
                "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
                "results": evaluation.results(),
            }
            write(options.output_dir, told, markdown(told["results"]))
            if options.push_to_hub:
                print(f"Published: {add_results(options.push_to_hub, told)}")
    except (HubError, OSError, ValueError) as error:
        print(f"eval.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped. The same command goes on from here.", file=sys.stderr)
        return 130
    finally:
        state.destroy_process_group()  # left to the end of the interpreter, gloo's threads at times abort it
    return 0


def write(folder: Path, told: dict, tables: str) -> None:
    (folder / "results.json").write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    versions = ", ".join(f"{name} {number}" for name, number in told["versions"].items())
    skipped = (
        f"{len(told['skipped'])} photos were left out:\n{'; '.join(told['skipped'])}\n\n" if told["skipped"] else ""
    )
    lines = f"    {told['command']}\n\n{told['images']} photos, {told['seconds']} s in the last run; {versions}.\n\n"
    (folder / "results.md").write_text(lines + skipped + tables, encoding="utf-8")
    print(
        f"\n{told['images']} photos, in per cent:\n\n{tables}\n{skipped}Written to {folder / 'results.json'} and .md."
    )


if __name__ == "__main__":
    sys.exit(main())
