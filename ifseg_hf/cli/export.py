"""`ifseg export`: a model as an ONNX file."""

from pathlib import Path
from typing import Annotated

import typer

from ifseg_hf.cli.app import CommandError
from ifseg_hf.cli.options import Background, at_least, option

__all__ = ["export"]


def export(
    model: Annotated[str, typer.Argument(help="folder or Hub id of a model or an adapter", metavar="MODEL")],
    output: Annotated[Path, typer.Argument(help="file to write", metavar="OUT.onnx")],
    height: Annotated[int, option("height of the images (default: 512)", metavar="PIXELS", callback=at_least(1))] = 512,
    width: Annotated[int, option("width of the images (default: 512)", metavar="PIXELS", callback=at_least(1))] = 512,
    categories: Annotated[
        str | None, option("comma-separated words, or a file of words (default: the model's categories)")
    ] = None,
    background: Background = None,
) -> int:
    """Exports a model to ONNX for images of one size.

    \b
    ifseg export tuned model.onnx --height 512 --width 512

    The metadata of the file has the names of the labels, "id2label", and the words that are merged into "background",
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
        export_onnx(loaded, output, height, width)
    except (ImportError, OSError, ValueError) as error:
        raise CommandError(error) from error
    print(f"{output}: images of {height} x {width} -> {', '.join(loaded.config.id2label.values())}")
    return 0
