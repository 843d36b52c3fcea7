"""Docs: pictures are drawn from the code, and what they name exists."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
import runpy
from pathlib import Path

import pytest
from support.docs import DOCS, PAGES, ROOT, blocks, commands_of

import zo_fused
from zo_fused.cli.main import main, make_parser
from zo_fused.methods.table import arguments, methods


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_is_looked_at(page: Path) -> None:
    known = blocks(page, "python", "py", "sh", "console", "yaml", "text")
    assert len(known) == page.read_text().count("\n```") / 2


FRAGMENTS = [
    pytest.param(block, id=f"{page.name}-{i}")
    for page in PAGES
    for i, block in enumerate(blocks(page, "py"))
]


@pytest.mark.parametrize("block", FRAGMENTS)
def test_fragments_call_what_exists(block: str) -> None:
    """Ours: with arguments that it takes."""
    pytest.importorskip("transformers")
    hf = importlib.import_module("zo_fused.hf")
    names = {"zo_fused": zo_fused, "ZOTrainer": hf.ZOTrainer, "zeroth_order": hf.zeroth_order}
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and f"{node.module}".startswith("zo_fused"):
            try:
                module = importlib.import_module(f"{node.module}")
            except ModuleNotFoundError as error:
                pytest.skip(f"{error}")
            names |= {alias.name: getattr(module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("zo_fused"):
                    importlib.import_module(alias.name)
        elif isinstance(node, ast.Call):
            first, *rest = ast.unparse(node.func).split(".")
            if first in names:
                called = functools.reduce(getattr, rest, names[first])
                given = {f"{keyword.arg}": None for keyword in node.keywords}
                inspect.signature(called).bind(*node.args, **given)


def commands(page: Path) -> list[list[str]]:
    """The arguments of every `zo-fused` in a page's blocks of commands."""
    return [words for block in blocks(page, "sh", "console") for words in commands_of(block)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_understood(page: Path) -> None:
    for command in commands(page):
        make_parser(command).parse_args(command)


def test_there_are_commands() -> None:
    assert sum(len(commands(page)) for page in PAGES) > 10
    assert FRAGMENTS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_other_commands_name_exists(page: Path) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for block in blocks(page, "sh"):
        assert set(re.findall(r"^make ([\w-]+)", block, re.MULTILINE)) <= set(targets)
        for file in re.findall(r" ((?:examples|zo_fused)/[\w/.]+)", block):
            assert (ROOT / file).exists(), file


def test_the_command_of_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the embedded model in the place of a large one, and two steps."""
    pytest.importorskip("transformers")
    page = DOCS / "tutorials/own-data.md"
    [block] = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    command = commands(page)[0]
    command[command.index("--model") + 1] = str(ROOT / "zo_fused/embedded/model")
    command[command.index("--steps") + 1] = "2"
    monkeypatch.chdir(tmp_path)
    exec(compile(block, page.name, "exec"), {})
    assert main(command) in (None, 0)
    listed = set(re.findall(r"^\| `([\w.]+)` \|", page.read_text(), re.MULTILINE))
    assert listed <= {path.name for path in Path("runs/mine").iterdir()}
    assert "replay.jsonl" in listed
