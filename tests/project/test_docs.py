"""Docs: pictures are drawn from the code, and what they name exists."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from zo_fused.cli.main import make_parser
from zo_fused.methods.table import arguments, methods

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


def test_the_drawing_of_schedules_is_up_to_date() -> None:
    drawn = runpy.run_path(str(DOCS / "draw_schedules.py"))["draw"]()
    assert (DOCS / "schedules.svg").read_text() == drawn, "python docs/draw_schedules.py"
    for sweeps in ("3 sweeps a step", "2 sweeps a step", "5 sweeps a step"):  # as docs/methods.md
        assert sweeps in drawn


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_that_are_named_exist(page: Path) -> None:
    for file, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page.read_text()):
        assert not name or f"def {name}(" in (ROOT / file).read_text(), name
        assert (ROOT / file).is_file(), file


def ours() -> str:
    """docs/migrating.md without the left-hand sides of its tables, which name other codes."""
    lines = (DOCS / "migrating.md").read_text().splitlines()
    return "\n".join(line.split("|")[-2] if line.startswith("|") else line for line in lines)


def test_options_for_those_who_come_from_other_codes_exist() -> None:
    [commands] = [a for a in make_parser(["finetune"])._actions if a.choices]
    options = set(commands.choices["finetune"]._option_string_actions)  # type: ignore[index]
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", ours()))
    assert {"--micro-batch-size", "--schedule"} <= named <= options, named - options


def test_arguments_for_those_who_come_from_other_codes_exist() -> None:
    calls = re.findall(rf"\b({'|'.join(methods())})\(([^`]*)\)`", ours())
    assert {name for name, _ in calls} >= {"MeZO", "ES", "ZOAdam"}
    for name, given in calls:
        for argument in re.findall(r"(\w+)=", given):
            assert argument in arguments(methods()[name]), f"{name}({argument}=)"
