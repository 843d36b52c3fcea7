"""Pages of results in Markdown: tables, and where a page goes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]


def cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        if value == int(value) and abs(value) < 1e6:
            return str(int(value))
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def table(rows: Sequence[Row], names: Mapping[str, str]) -> list[str]:
    """Lines, with the columns that some row has; names: column -> heading."""
    kept = {c: h for c, h in names.items() if any(row.get(c) is not None for row in rows)}
    lines = ["| " + " | ".join(kept.values()) + " |", "|" + "---|" * len(kept)]
    return [*lines, *("| " + " | ".join(cell(row.get(c)) for c in kept) + " |" for row in rows)]


def publish(lines: Iterable[str], out: Path | None) -> None:
    """Print a page; write it to the file, too, if there is one."""
    text = "\n".join(lines)
    print(text)
    if out:
        out.write_text(text + "\n", encoding="utf-8")
