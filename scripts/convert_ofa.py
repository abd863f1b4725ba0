"""Convert a published OFA or IFSeg checkpoint to a folder that `from_pretrained` loads.

python scripts/convert_ofa.py OFA-Sys/ofa-base ofa-base
python scripts/convert_ofa.py ofa_base.pt ofa-base --tokenizer OFA/utils/BPE
python scripts/convert_ofa.py ifseg.pt ifseg --tokenizer OFA/utils/BPE --categories "frisbee, skateboard, cardboard"
"""

import argparse
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ifseg_hf.hub.conversion import ConversionReport


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder or Hub id in the transformers format, or a fairseq .pt file")
    parser.add_argument("output_dir", help="new folder for weights, configuration and processor")
    parser.add_argument(
        "--tokenizer",
        metavar="DIR",
        help="folder with dict.txt, encoder.json, vocab.bpe or vocab.json, merges.txt (default: folder of the source)",
    )
    parser.add_argument(
        "--categories",
        help="the words that a released IFSeg checkpoint was trained on, comma-separated and in the same order",
    )
    parser.add_argument("--prompt", help="question before the categories, or a template with {categories}")
    parser.add_argument("--max-shard-size", default="1GB", help="largest weight file (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.categories is not None:
        options.categories = [word.strip() for word in options.categories.split(",")]
    elif options.prompt is not None:
        parser.error("--prompt needs --categories")
    return options


def summary(report: "ConversionReport") -> str:
    """The report as text: tensors that were used, tensors that were left out and why, and the next command."""
    names: dict[str, list[str]] = {}
    for name, reason in report.accounted.items():
        names.setdefault(reason, []).append(name)
    lines = [
        f"{report.architecture}, size {report.size}, {report.parameters:,} parameters",
        f"{len(report.used)} tensors used, {len(report.accounted)} accounted for, none missing, none left over",
    ]
    for reason, group in names.items():
        shown = ", ".join(group[:3]) + (f" and {len(group) - 3} more" if len(group) > 3 else "")
        lines.append(f"  {len(group)} x {reason}: {shown}")
    if report.ignored:
        lines.append(f"  other entries, not used: {', '.join(report.ignored)}")
    lines += [f"Note: {note}." for note in report.notes]
    lines += [f"Written to {report.output_dir}. Next:", *_next_steps(report)]
    return "\n".join(lines)


def _next_steps(report: "ConversionReport") -> list[str]:
    """The commands that use the converted model."""
    if report.architecture == "OFAForConditionalGeneration":
        return [f'  accelerate launch scripts/train.py --model {report.output_dir} --categories "..." --output-dir OUT']
    words = "" if report.has_words else ' --categories "..."'
    return [f"  python scripts/segment.py IMAGE --model {report.output_dir}{words} --output-dir OUT"]


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)

    # Imported after the arguments are parsed, so that mistakes in them are reported at once.
    from ifseg_hf.hub.conversion import ConversionError, convert_ofa_checkpoint

    try:
        report = convert_ofa_checkpoint(
            options.source,
            options.output_dir,
            tokenizer=options.tokenizer,
            categories=options.categories,
            prompt=options.prompt,
            max_shard_size=options.max_shard_size,
        )
    except ConversionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(summary(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
