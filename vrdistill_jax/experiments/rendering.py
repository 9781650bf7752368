"""Tables as plain data, and their text and Markdown."""

import json
import pathlib
from typing import Any, NamedTuple

import numpy as np


class Table(NamedTuple):
    """A finished table.

    Attributes:
      title: one line.
      columns: headings.
      rows: cells, as text.
      notes: lines below the table.
      data: the same numbers unrounded, for the JSON file.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str]
    data: Any


def as_text(table: Table) -> str:
    """Aligned columns for the terminal."""
    lines = [table.columns, *table.rows]
    widths = [max(len(line[n]) for line in lines) for n in range(len(table.columns))]
    text = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    rule = "-" * max(map(len, text))
    return "\n".join([table.title, rule, text[0], rule, *text[1:], rule, *table.notes])


def as_markdown(table: Table) -> str:
    """For a page."""
    lines = [table.columns, ["---"] * len(table.columns), *table.rows]
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    notes = "\n".join(f"- {note}" for note in table.notes)
    return f"**{table.title}**\n\n{body}\n\n{notes}\n" if notes else f"**{table.title}**\n\n{body}\n"


def write_table(table: Table, path: pathlib.Path) -> None:
    """Writes path.json, path.md and path.txt."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".txt").write_text(as_text(table) + "\n")
    path.with_suffix(".md").write_text(as_markdown(table))
    record = {"title": table.title, "notes": table.notes, "rows": table.data}
    path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")


def mean_and_std(values: list[float]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation; None where there are too few values."""
    if not values:
        return None, None
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def percent(mean: float | None, std: float | None = None, sign: bool = False) -> str:
    """58.8, or 58.8 ± 0.7; "-" for nothing."""
    if mean is None:
        return "-"
    text = f"{100 * mean:+.1f}" if sign else f"{100 * mean:.1f}"
    return text if std is None else f"{text} ± {100 * std:.1f}"
