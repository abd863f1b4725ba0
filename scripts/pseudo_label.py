"""Labels photos with a model, as a data set for `train.py --stage self-training`.

python scripts/pseudo_label.py --model TUNED --photos PHOTOS --categories "cat, grass" --output-dir LABELS
accelerate launch scripts/pseudo_label.py --model TUNED --dataset coco-stuff --data-dir COCO --keep-labels
    --unseen unseen --output-dir LABELS
"""

import argparse
import sys


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub name of the model that labels")
    parser.add_argument(
        "--dataset", help="photos with masks: a folder with dataset.json, coco-stuff, ... or owner/name"
    )
    parser.add_argument("--data-dir", help="folder that coco-stuff or ade20k was unpacked to")
    parser.add_argument("--split", help="part of the data set (default: train, where there are parts)")
    parser.add_argument("--photos", help="folder of photos without masks, in place of --dataset")
    parser.add_argument(
        "--categories", help="words, or which of the data set's names count as which (default: its own)"
    )
    parser.add_argument("--output-dir", required=True, help="folder for the new data set")
    parser.add_argument(
        "--keep-labels", action="store_true", help="keep the labels there are, guess where there is none"
    )
    parser.add_argument(
        "--unseen", help="categories whose labels count as none and which alone are guessed, with commas, or a subset"
    )
    parser.add_argument(
        "--smoothing-neighbors", type=int, default=3, metavar="K", help="patches averaged, itself included (3)"
    )
    parser.add_argument(
        "--smoothing-iterations", type=int, default=25, metavar="N", help="times they are averaged; 0 for none (25)"
    )
    parser.add_argument(
        "--min-confidence", type=float, default=0.0, metavar="P", help="probability below which there is no label (0)"
    )
    parser.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    options = parser.parse_args(arguments)
    if (options.dataset is None) == (options.photos is None):
        parser.error("give either --dataset or --photos")
    if options.photos and options.categories is None:
        parser.error("--photos have no names: give --categories")
    if options.photos and (options.keep_labels or options.unseen):
        parser.error("--photos have no labels for --keep-labels or --unseen")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)

    # The heavy imports come after the arguments, whose mistakes so show at once.
    from accelerate import PartialState

    from ifseg_hf.data.crops import load_training_dataset
    from ifseg_hf.data.segmentation import SegmentationDataset
    from ifseg_hf.data.vocabularies import read_categories
    from ifseg_hf.training.pseudo_labels import PseudoLabelConfig, load_images, write_pseudo_labels

    state = PartialState(cpu=options.cpu)
    try:
        guess = PseudoLabelConfig(options.smoothing_neighbors, options.smoothing_iterations, options.min_confidence)
        names = None if options.categories is None else read_categories(options.categories)
        data: SegmentationDataset
        if options.photos:
            data = load_images(options.photos, list(names))
        else:
            data = load_training_dataset(options.dataset, options.data_dir, options.split, names)
        write_pseudo_labels(
            options.model, data, options.output_dir, guess, options.keep_labels, options.unseen, options.cpu
        )
    except (OSError, ValueError) as error:
        print(f"pseudo_label.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    finally:
        state.destroy_process_group()  # left to the end of the interpreter, gloo's threads at times abort it
    return 0


if __name__ == "__main__":
    sys.exit(main())
