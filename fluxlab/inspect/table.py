"""Rows with named columns: printed in a terminal, drawn by Jupyter, or handed to pandas."""

from collections.abc import Iterable
from html import escape
from typing import Any


class Table(list[dict[str, Any]]):
    """A list of rows, each a dict; ``pandas.DataFrame(table)`` takes it as it is."""

    def __init__(self, rows: Iterable[dict[str, Any]], title: str = "") -> None:
        super().__init__(rows)
        self.title = title

    def column(self, name: str) -> list[Any]:
        """One column's values, top to bottom.

        Raises:
            KeyError: there is no such column.
        """
        if self and name not in self[0]:
            raise KeyError(f"{name!r} is none of the columns: {', '.join(self[0])}")
        return [row[name] for row in self]

    def __repr__(self) -> str:
        if not self:
            return f"{self.title}: empty".lstrip(": ")
        names, cells, numeric = self._cells()
        widths = [max(len(line[i]) for line in [names, *cells]) for i in range(len(names))]

        def line(parts: list[str]) -> str:
            aligned = zip(parts, widths, numeric, strict=True)
            padded = [part.rjust(width) if right else part.ljust(width) for part, width, right in aligned]
            return "  ".join(padded).rstrip()

        rule = "  ".join("-" * width for width in widths)
        return "\n".join(([self.title] if self.title else []) + [line(names), rule, *map(line, cells)])

    def _repr_html_(self) -> str:
        if not self:
            return f"<p>{escape(repr(self))}</p>"
        names, cells, numeric = self._cells()
        sides = ["right" if right else "left" for right in numeric]

        def row(tag: str, parts: list[str]) -> str:
            pairs = zip(sides, parts, strict=True)
            style = "white-space:pre-wrap;text-align"  # a tree keeps its indentation
            return "".join(f'<{tag} style="{style}:{side}">{escape(part)}</{tag}>' for side, part in pairs)

        body = "".join(f"<tr>{row('td', line)}</tr>" for line in cells)
        caption = f"<caption>{escape(self.title)}</caption>" if self.title else ""
        return f"<table>{caption}<thead><tr>{row('th', names)}</tr></thead><tbody>{body}</tbody></table>"

    def _cells(self) -> tuple[list[str], list[list[str]], list[bool]]:
        names = list(self[0])
        numeric = [all(isinstance(row[name], int | float) or row[name] is None for row in self) for name in names]
        return names, [[_words(row[name]) for name in names] for row in self], numeric


def _words(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return str(value)
