"""Export a trained model to ONNX for images of one size: python scripts/export_onnx.py tuned model.onnx"""

import argparse
import sys
from pathlib import Path


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Export a model to ONNX for images of one size.")
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id of a model")
    parser.add_argument("output", metavar="OUT.onnx", type=Path, help="file to write")
    parser.add_argument(
        "--height", type=int, default=512, metavar="PIXELS", help="height of the images (default: %(default)s)"
    )
    parser.add_argument(
        "--width", type=int, default=512, metavar="PIXELS", help="width of the images (default: %(default)s)"
    )
    parser.add_argument(
        "--categories", help="comma-separated words, or a file of words (default: the model's categories)"
    )
    options = parser.parse_args(arguments)
    if min(options.height, options.width) < 1:
        parser.error("--height and --width must be at least 1")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)

    # Imported after the arguments are parsed, so that mistakes in them are reported at once.
    import torch
    from transformers.utils.logging import disable_progress_bar

    from ifseg_hf import IFSegForSemanticSegmentation, IFSegProcessor
    from ifseg_hf.data.vocabularies import read_categories
    from ifseg_hf.hub.export import export_onnx
    from ifseg_hf.hub.published import resolve_checkpoint

    disable_progress_bar()
    try:
        folder = resolve_checkpoint(options.model)
        model = IFSegForSemanticSegmentation.from_pretrained(folder, dtype=torch.float32)
        if options.categories is not None:
            processor = IFSegProcessor.from_pretrained(folder)
            model.set_words(**processor.encode_categories(read_categories(options.categories)))
        elif model.config.category_ids is None:
            raise ValueError(f'{options.model} has no categories: give some, as in --categories "cat, grass".')
        options.output.parent.mkdir(parents=True, exist_ok=True)
        export_onnx(model, options.output, options.height, options.width)
    except (ImportError, OSError, ValueError) as error:
        print(f"export_onnx.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    names = ", ".join(model.config.id2label.values())
    print(f"{options.output}: images of {options.height} x {options.width} -> {names}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
