"""`ifseg export`: a model as an ONNX file."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from ifseg_hf.cli.app import CommandError
from ifseg_hf.cli.options import Background, at_least, option

__all__ = ["export"]


def export(
    model: Annotated[str, typer.Argument(help="folder or Hub id of a model or an adapter", metavar="MODEL")],
    output: Annotated[Path, typer.Argument(help="file to write", metavar="OUT.onnx")],
    height: Annotated[
        int | None, option("height of all images (default: any)", metavar="PIXELS", callback=at_least(1))
    ] = None,
    width: Annotated[
        int | None, option("width of all images (default: any)", metavar="PIXELS", callback=at_least(1))
    ] = None,
    categories: Annotated[
        str | None, option("comma-separated words, or a file of words (default: the model's categories)")
    ] = None,
    background: Background = None,
) -> int:
    """Exports a model to ONNX, for batches of images of any size.

    \b
    ifseg export tuned model.onnx
    ifseg export tuned model.onnx --height 512 --width 512

    A file for images of one size is faster to write and to run; other models than OFA need --height and --width. The
    metadata of the file has the names of the labels, "id2label", and the words that are merged into "background",
    "background", both in JSON. An adapter is merged into its base model. A single word gets a background unless
    --background is none.
    """
    # Imports that take seconds come after the arguments, so that wrong arguments are reported at once.
    from ifseg_hf import IFSegProcessor
    from ifseg_hf.adapters import load_adapter, merge_adapter, split_adapter
    from ifseg_hf.data.vocabularies import read_background, read_categories
    from ifseg_hf.hub.export import export_onnx
    from ifseg_hf.hub.published import resolve_checkpoint
    from ifseg_hf.loading import load_segmentation_model
    from ifseg_hf.processing.segmenter_ifseg import IFSegSegmenter
    from ifseg_hf.tuning import choose_background, report_background

    try:
        base, adapter = split_adapter(model)
        folder = resolve_checkpoint(base)
        loaded = load_segmentation_model(folder)
        if adapter is not None:
            load_adapter(loaded, adapter)
            merge_adapter(loaded)
        rest = read_background(background)
        names = None if categories is None else read_categories(categories)
        if names is not None:
            rest = choose_background(names, rest, model)
        elif loaded.config.category_ids is None:
            raise ValueError(f'{model} has no categories: give some, as in --categories "cat, grass".')
        if names is not None or rest is not None:
            segmenter = IFSegSegmenter(loaded, IFSegProcessor.from_pretrained(folder), untuned=True)
            segmenter.set_words(names, background=rest)
        if background is None and rest == "default":
            report_background(names, "--background none")
        output.parent.mkdir(parents=True, exist_ok=True)
        print(f"Writing {output}, which may take minutes ...", file=sys.stderr, flush=True)
        export_onnx(loaded, output, height, width)
    except (ImportError, OSError, ValueError) as error:
        raise CommandError(error) from error
    size = "any size" if height is None else f"{height} x {width}"
    print(f"{output}: images of {size} -> {', '.join(loaded.config.id2label.values())}")
    return 0
