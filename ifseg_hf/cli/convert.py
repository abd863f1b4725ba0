"""`ifseg convert`: a published OFA or IFSeg checkpoint in this project's format."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from ifseg_hf.cli.app import CommandError
from ifseg_hf.cli.options import option
from ifseg_hf.data.vocabularies import read_categories

if TYPE_CHECKING:
    from ifseg_hf.hub.conversion import ConversionReport

__all__ = ["convert", "summary"]


def convert(
    source: Annotated[
        str, typer.Argument(help="folder or Hub id in the transformers format, or a fairseq .pt file", metavar="SOURCE")
    ],
    output_dir: Annotated[
        str, typer.Argument(help="new folder for weights, configuration and processor", metavar="OUTPUT_DIR")
    ],
    tokenizer: Annotated[
        str | None,
        option(
            "folder with dict.txt, encoder.json, vocab.bpe or vocab.json, merges.txt (default: folder of the source)",
            metavar="DIR",
        ),
    ] = None,
    categories: Annotated[
        str | None,
        option("the words that a released IFSeg checkpoint was trained on, comma-separated and in the same order"),
    ] = None,
    prompt: Annotated[str | None, option("question before the categories, or a template with {categories}")] = None,
    max_shard_size: Annotated[str, option("largest weight file (default: 1GB)")] = "1GB",
) -> int:
    """Converts a published OFA or IFSeg checkpoint to a folder that from_pretrained loads.

    \b
    ifseg convert OFA-Sys/ofa-base ofa-base
    ifseg convert ofa_base.pt ofa-base --tokenizer OFA/utils/BPE
    ifseg convert ifseg.pt ifseg --tokenizer OFA/utils/BPE --categories "frisbee, skateboard, cardboard"
    """
    if prompt is not None and categories is None:
        raise typer.BadParameter("--prompt needs --categories")
    try:
        words = None if categories is None else read_categories(categories)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error

    # Imports that take seconds come after the arguments, so that wrong arguments are reported at once.
    from ifseg_hf.hub.conversion import ConversionError, convert_ofa_checkpoint

    try:
        report = convert_ofa_checkpoint(
            source, output_dir, tokenizer=tokenizer, categories=words, prompt=prompt, max_shard_size=max_shard_size
        )
    except ConversionError as error:
        raise CommandError(error) from error
    print(summary(report))
    return 0


def summary(report: "ConversionReport", next_steps: Sequence[str] | None = None) -> str:
    """
    Returns the report as text: tensors that were used, tensors that were left out and why, and the next commands.

    Args:
        next_steps: commands that use the converted model. Default: those for an OFA or a released IFSeg.
    """
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
    lines += [f"Written to {report.output_dir}. Next:", *(f"  {step}" for step in next_steps or _next_steps(report))]
    return "\n".join(lines)


def _next_steps(report: "ConversionReport") -> list[str]:
    """The commands that use the converted model."""
    if report.architecture == "OFAForConditionalGeneration":
        return [f'ifseg segment IMAGE "cat, grass, sky" --model {report.output_dir}']
    words = "" if report.has_words else ' --no-tune --categories "cat, grass, sky"'
    return [f"ifseg segment IMAGE --model {report.output_dir}{words}"]
