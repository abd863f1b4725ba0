"""Convert a published ClipCap checkpoint to a folder that `from_pretrained` loads.

python scripts/convert_clipcap.py conceptual_weights.pt clipcap
python scripts/convert_clipcap.py coco_weights.pt clipcap --clip clip-vit-base-patch32 --gpt2 gpt2
"""

import argparse
import sys

from ifseg_hf.cli.convert import summary
from ifseg_hf.cli.output import escape_unprintable


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a ClipCap .pt file")
    parser.add_argument("output_dir", help="new folder for weights, configuration and processor")
    parser.add_argument(
        "--clip",
        default="openai/clip-vit-base-patch32",
        help="folder or Hub id of the CLIP that ClipCap was trained with, and its tokenizer (default: %(default)s)",
    )
    parser.add_argument(
        "--gpt2",
        default="openai-community/gpt2",
        help="folder or Hub id of GPT-2, for its configuration and tokenizer (default: %(default)s)",
    )
    parser.add_argument(
        "--normalize-features",
        action="store_true",
        help="CLIP features of unit length, for a mapping network that was trained with --normalize_prefix",
    )
    parser.add_argument(
        "--patch-features",
        choices=("clip", "maskclip"),
        default="clip",
        help="features of an image's patches: CLIP's, or MaskCLIP's value path (default: %(default)s)",
    )
    parser.add_argument("--image-size", type=int, default=512, help="side of an image in pixels (default: %(default)s)")
    parser.add_argument("--max-shard-size", default="1GB", help="largest weight file (default: %(default)s)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    escape_unprintable()
    options = parse_arguments(arguments)

    # Imported after the arguments are parsed, so that mistakes in them are reported at once.
    from ifseg_hf.hub.conversion import ConversionError
    from ifseg_hf.hub.conversion_clipcap import convert_clipcap_checkpoint

    try:
        report = convert_clipcap_checkpoint(**vars(options))
    except ConversionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    tune = f'accelerate launch scripts/train.py --model {report.output_dir} --categories "..." --output-dir OUT'
    print(summary(report, [tune]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
