"""The site of `make docs`: what a build can't see, and what its hook does to links."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import site_links

import zo_fused.hf
import zo_fused.noise

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def pages_of(nav: Any) -> list[str]:
    """The pages of a part of the navigation, in order."""
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [page for part in parts for page in pages_of(part)]


def test_every_page_is_in_the_navigation() -> None:
    yaml = pytest.importorskip("yaml")
    listed = pages_of(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    files = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert files | {site_links.placed(page) for page in site_links.ALWAYS} == set(listed)
    assert len(listed) == len(set(listed))


def test_every_public_name_is_in_the_reference() -> None:
    text = "".join(path.read_text() for path in (DOCS / "reference").glob("*.md"))
    shown = re.findall(r"^::: (\S+)", text, re.MULTILINE)
    names = {f"zo_fused.{name}" for name in zo_fused.__all__} - {"zo_fused.__version__"}
    names |= {f"zo_fused.hf.{name}" for name in zo_fused.hf.__all__}
    names |= {f"zo_fused.noise.{name}" for name in zo_fused.noise.__all__}
    others = {"zo_fused.step.optimizer.ZerothOrderOptimizer", "zo_fused.ray.Driver"}
    assert {*shown, "zo_fused.noise", "zo_fused.ray"} == names | others
    assert len(shown) == len(set(shown))


def test_make_docs_installs_the_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = project["optional-dependencies"]["docs"]
    match = re.search(r"\ndocs:.*\n.* -c \S+ (.*)\n", (ROOT / "Makefile").read_text())
    assert match is not None
    assert match[1].split() == [re.split("[<>=]", name)[0] for name in extra]


SHOWN = {"README.md", "docs/noise.md", "docs/methods/mezo.md", "bench/results/es.md", "docs/x.svg"}


@pytest.mark.parametrize(
    ("page", "text", "expected"),
    [
        ("docs/methods/es.md", "[a](../noise.md#b)", "[a](../noise.md#b)"),
        ("docs/methods/es.md", "[a](../../bench/results/es.md)", "[a](../bench/results/es.md)"),
        (
            "docs/plan.md",
            "[a](../README.md#status), ![p](x.svg)",
            "[a](overview.md#status), ![p](x.svg)",
        ),
        ("README.md", "[a](docs/noise.md) [b](#c)", "[a](noise.md) [b](#c)"),
        ("bench/results/es.md", "[a](../../docs/noise.md)", "[a](../../noise.md)"),
        ("docs/plan.md", "[a](https://b.c/d.md)", "[a](https://b.c/d.md)"),
        (
            "docs/plan.md",
            "`a[0](../setup.py)` and [`a`](../setup.py)",
            "`a[0](../setup.py)` and `a`",
        ),
        ("docs/plan.md", "```\n[a](../setup.py)\n```\n", "```\n[a](../setup.py)\n```\n"),
    ],
)
def test_links_lead_to_the_same_place_on_the_site(page: str, text: str, expected: str) -> None:
    assert site_links.rewritten(page, text, SHOWN, None) == expected


def test_links_to_code_lead_to_a_repository_that_is_known() -> None:
    text = site_links.rewritten(
        "docs/methods/es.md", "[a](../../setup.py#L3)", SHOWN, "https://b.c/d/"
    )
    assert text == "[a](https://b.c/d/blob/main/setup.py#L3)"


def test_pages_bring_what_they_lead_to() -> None:
    shown = site_links.shown_from(["docs/methods.md"])
    assert {"docs/methods/es.md", "bench/results/es.md"} <= shown  # the latter by the former
    assert "bench/results/compare-embedded.png" in shown
    assert not {path for path in shown if path.endswith(".py")}


def test_docstrings_have_no_markup_of_sphinx() -> None:
    """They are rendered as Markdown, which shows `::` and `:class:` as they stand."""
    for path in (ROOT / "zo_fused").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = ast.get_docstring(node) or ""
                assert not re.search(r"::$|:\w+:`", text, re.MULTILINE), f"{path}: {text}"
