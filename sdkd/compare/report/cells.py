"""The cells of a comparison's tables, for terminal, Markdown and page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

STYLES = {"good": "green", "bad": "bold red", "muted": "dim", "": ""}  # of a terminal, by tone
Tone = Literal["", "good", "bad", "muted"]


@dataclass(frozen=True)
class Cell:
    """One cell: what it says, a smaller remark, the value it sorts by, and whether it is good news."""

    text: str
    note: str = ""
    sort: float | str | None = None
    tone: Tone = ""

    @property
    def inline(self) -> str:
        """The text with its remark in parentheses."""
        return f"{self.text} ({self.note})" if self.note else self.text


EMPTY = Cell("–", tone="muted")


def number(value: float) -> str:
    """About three significant digits, without an exponent: 1,234; 123; 12.3; 1.23; 0.123; 0.012."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}" if abs(value) >= 0.1 else f"{value:.2g}"
