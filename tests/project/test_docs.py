"""Pictures of the docs that are drawn from the code."""

from __future__ import annotations

import runpy
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_the_drawing_of_schedules_is_up_to_date() -> None:
    drawn = runpy.run_path(str(DOCS / "draw_schedules.py"))["draw"]()
    assert (DOCS / "schedules.svg").read_text() == drawn, "python docs/draw_schedules.py"
    for sweeps in ("3 sweeps a step", "2 sweeps a step", "5 sweeps a step"):  # as docs/methods.md
        assert sweeps in drawn
