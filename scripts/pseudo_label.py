"""Labels images with a model, as a dataset for `train.py --stage self-training`.

python scripts/pseudo_label.py --model TUNED --images IMAGES --categories "cat, grass" --output-dir LABELS
accelerate launch scripts/pseudo_label.py --model TUNED --dataset coco-stuff --data-dir COCO --keep-labels
    --unseen unseen --output-dir LABELS
"""

import argparse
import sys


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of the model that predicts the labels")
    parser.add_argument(
        "--dataset", help="images with masks: a folder with dataset.json, coco-stuff, ... or owner/name"
    )
    parser.add_argument("--data-dir", help="folder that coco-stuff or ade20k was unpacked to")
    parser.add_argument("--split", help="split of the dataset (default: train, where there are splits)")
    parser.add_argument("--images", help="folder of images without masks, in place of --dataset")
    parser.add_argument(
        "--categories",
        help="comma-separated words or a file; or a YAML or JSON file, word: [categories of the dataset] (default: the "
        "dataset's categories)",
    )
    parser.add_argument("--output-dir", required=True, help="folder for the new dataset")
    parser.add_argument(
        "--keep-labels", action="store_true", help="keep the given labels, and predict labels for the other pixels"
    )
    parser.add_argument(
        "--unseen",
        help="comma-separated categories, or the name of a subset: only these are predicted, and their given labels "
        "are dropped",
    )
    parser.add_argument(
        "--smoothing-neighbors",
        type=int,
        metavar="K",
        help="number of patches to average, the patch itself included (default: the model's, 3)",
    )
    parser.add_argument(
        "--smoothing-iterations",
        type=int,
        metavar="N",
        help="how often to average; 0: no smoothing (default: the model's, 25, or 0 if trained on images)",
    )
    parser.add_argument(
        "--min-confidence",
        type=float,
        default=0.0,
        metavar="P",
        help="probability below which a pixel gets no label (default: 0)",
    )
    parser.add_argument("--untuned", action="store_true", help="also use a model that was never tuned, such as OFA")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the code saved with a model of another backbone"
    )
    parser.add_argument("--cpu", action="store_true", help="compute on the CPU even where there is a GPU")
    options = parser.parse_args(arguments)
    if (options.dataset is None) == (options.images is None):
        parser.error("give either --dataset or --images")
    if options.images and options.categories is None:
        parser.error("--images needs --categories")
    if options.images and (options.keep_labels or options.unseen):
        parser.error("--keep-labels and --unseen need the labels of a --dataset, not --images")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)

    # Imports that take seconds come after the arguments, so that wrong arguments are reported at once.
    from accelerate import PartialState

    from ifseg_hf.data.crops import load_training_dataset
    from ifseg_hf.data.segmentation import SegmentationDataset
    from ifseg_hf.data.vocabularies import read_categories
    from ifseg_hf.training.pseudo_labels import PseudoLabelConfig, load_images, write_pseudo_labels

    state = PartialState(cpu=options.cpu)
    try:
        config = PseudoLabelConfig(options.smoothing_neighbors, options.smoothing_iterations, options.min_confidence)
        names = None if options.categories is None else read_categories(options.categories)
        data: SegmentationDataset
        if options.images:
            data = load_images(options.images, list(names))
        else:
            data = load_training_dataset(options.dataset, options.data_dir, options.split, names)
        write_pseudo_labels(
            options.model,
            data,
            options.output_dir,
            config,
            options.keep_labels,
            options.unseen,
            options.cpu,
            options.trust_remote_code,
            options.untuned,
        )
    except (OSError, ValueError) as error:
        print(f"pseudo_label.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    finally:
        state.destroy_process_group()  # otherwise gloo's threads sometimes abort the interpreter when it ends
    return 0


if __name__ == "__main__":
    sys.exit(main())
