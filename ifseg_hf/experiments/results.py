"""Results of several seeds in Markdown tables."""

from collections.abc import Iterable, Sequence
from statistics import mean, stdev


def mean_and_deviation(values: Sequence[float]) -> str:
    """Mean and sample standard deviation of one number per seed, such as "44.1 ± 0.5"; "-" without values."""
    if not values:
        return "-"
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, without a line break at its end."""
    return "\n".join([_line(header), "|---" * len(header) + "|", *map(_line, rows)])


def _line(cells: Sequence[str]) -> str:
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"
