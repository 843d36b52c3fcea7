"""The pages of the docs, and their blocks."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


def blocks(page: Path, *languages: str) -> list[str]:
    """A page's blocks in some languages. `python` is run as it stands (test_readme.py), `py` needs
    several processes or what the page leaves to the reader."""
    found = re.findall(r"^```([^\n]*)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    return [text for language, text in found if language in languages]


def commands_of(block: str) -> list[list[str]]:
    """The arguments of every `zo-fused` in a block of commands."""
    lines = re.findall(r"^(?:\$ )?zo-fused (.*)", block.replace("\\\n", " "), re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]
