"""`ifseg pseudo-label`: images labelled by a model, as a dataset for self-training."""

from typing import Annotated

import typer

from ifseg_hf.cli.app import CommandError
from ifseg_hf.cli.options import (
    Background,
    Cpu,
    DataDir,
    OnError,
    SmoothingIterations,
    SmoothingNeighbors,
    TrustRemoteCode,
    Untuned,
    flag,
    option,
)

__all__ = ["pseudo_label"]


# Arguments of this command alone
Masks = Annotated[
    str | None,
    option(
        "folder of masks without names for --images: grey or palette PNGs with the images' names, whose pixels have "
        "the number of their mask; each mask gets one label, of the highest mean probability"
    ),
]
Categories = Annotated[
    str | None,
    option(
        "comma-separated words or a file; or a YAML or JSON file, word: [categories of the dataset] (default: the "
        "dataset's categories)"
    ),
]
Unseen = Annotated[
    str | None,
    option(
        "comma-separated categories, or the name of a subset: only these are predicted, and their given labels are "
        "dropped"
    ),
]


def pseudo_label(
    model: Annotated[str, option("folder or Hub id of the model that predicts the labels")],
    output_dir: Annotated[str, option("folder for the new dataset")],
    dataset: Annotated[
        str | None, option("images with masks: a folder with dataset.json, coco-stuff, ... or owner/name")
    ] = None,
    data_dir: DataDir = None,
    split: Annotated[str | None, option("split of the dataset (default: train, where there are splits)")] = None,
    images: Annotated[str | None, option("folder of images without masks, in place of --dataset")] = None,
    masks: Masks = None,
    ignore_index: Annotated[int | None, option("number of pixels that belong to none of the --masks")] = None,
    categories: Categories = None,
    background: Background = None,
    keep_labels: Annotated[
        bool, flag("keep the given labels, and predict labels for the other pixels", "--keep-labels")
    ] = False,
    unseen: Unseen = None,
    smoothing_neighbors: SmoothingNeighbors = None,
    smoothing_iterations: SmoothingIterations = None,
    min_confidence: Annotated[
        float, option("probability below which a pixel or a mask gets no label (default: 0)", metavar="P")
    ] = 0.0,
    on_error: OnError = "fail",
    untuned: Untuned = False,
    trust_remote_code: TrustRemoteCode = False,
    cpu: Cpu = False,
) -> int:
    """Labels images with a model, as a dataset for ifseg tune --stage self-training.

    \b
    ifseg pseudo-label --model TUNED --images IMAGES --categories "cat, grass" --output-dir LABELS
    ifseg pseudo-label --model TUNED --dataset coco-stuff --data-dir COCO --keep-labels --unseen unseen \\
        --output-dir LABELS
    ifseg pseudo-label --model TUNED --images IMAGES --masks MASKS --categories coco-stuff --output-dir LABELS

    The same command continues a stopped run. With a background, as a single word always has unless --background is
    none, "background" is the last category of the new dataset.
    """
    if (dataset is None) == (images is None):
        raise typer.BadParameter("give either --dataset or --images")
    if images and categories is None:
        raise typer.BadParameter("--images needs --categories")
    if images and (keep_labels or unseen):
        raise typer.BadParameter("--keep-labels and --unseen need the labels of a --dataset, not --images")
    if masks and not images:
        raise typer.BadParameter("--masks needs --images")
    if ignore_index is not None and not masks:
        raise typer.BadParameter("--ignore-index is for --masks")

    # Imports that take seconds come after the arguments, so that wrong arguments are reported at once.
    from accelerate import PartialState

    from ifseg_hf.data.crops import load_training_dataset
    from ifseg_hf.data.segmentation import SegmentationDataset
    from ifseg_hf.data.unnamed_masks import load_unnamed_masks
    from ifseg_hf.data.vocabularies import read_background, read_categories
    from ifseg_hf.hub.published import resolve_checkpoint
    from ifseg_hf.training.pseudo_labels import PseudoLabelConfig, load_images, write_pseudo_labels

    state = PartialState(cpu=cpu)
    try:
        config = PseudoLabelConfig(smoothing_neighbors, smoothing_iterations, min_confidence)
        names = None if categories is None else read_categories(categories)
        data: SegmentationDataset
        if images and masks:
            data = load_unnamed_masks(images, masks, list(names or ()), ignore_index)
        elif images:
            data = load_images(images, list(names or ()))
        else:
            data = load_training_dataset(dataset, data_dir, split, names)
        resolve_checkpoint(model)
        rest = read_background(background)
        write_pseudo_labels(
            model, data, output_dir, config, keep_labels, unseen, cpu, trust_remote_code, untuned, on_error, rest
        )
    except (OSError, ValueError) as error:
        raise CommandError(error) from error
    finally:
        state.destroy_process_group()  # otherwise gloo's threads sometimes abort the interpreter when it ends
    return 0
