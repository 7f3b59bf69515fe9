"""Tables that read well as text and as Markdown."""

from typing import Any, Sequence


def markdown_table(rows: Sequence[Sequence[Any]]) -> str:
    """The rows, the first of which is the head; floats get two digits."""
    cells = [[f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|")
    return "\n".join(lines)
