"""A hook of mkdocs: links that leave docs/ work on the site as they do in the repository.

Pages are written to be read in the repository too, so they link to other files of it. Markdown and
pictures that a page leads to become part of the site, whatever folder they are in. All else (code,
folders) is a link to the repository if mkdocs.yml has a `repo_url`, and plain text if it has none.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).parents[1]
SHOWN = (".md", ".png", ".svg")
ALWAYS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
# Code comes first, so that what looks like a link in it stays as it is.
LINK = re.compile(
    r"^```.*?^```|(?P<ticks>`+).+?(?P=ticks)(?!`)"
    r"|(?P<open>!?\[(?P<text>(?:[^\[\]]|\[[^\[\]]*\])*)\]\()(?P<target>[^)\s]+)\)",
    re.DOTALL | re.MULTILINE,
)


def placed(path: str) -> str:
    """The place of a file of the repository among the site's sources."""
    return "overview.md" if path == "README.md" else path.removeprefix("docs/")


def split(page: str, target: str) -> tuple[str, str]:
    """Where a link of a page leads: a path in the repository, or "", and "#anchor", or ""."""
    parts = urlsplit(target)
    if parts.scheme or not parts.path:
        return "", ""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), parts.path))
    return path, f"#{parts.fragment}" if parts.fragment else ""


def linked(page: str, text: str) -> list[str]:
    """Files of the repository that a page leads to."""
    targets = [match["target"] for match in LINK.finditer(text)]
    return [path for target in targets if target and (path := split(page, target)[0])]


def rewritten(page: str, text: str, shown: set[str], repository: str | None) -> str:
    """A page's text with the links of the site.

    Args:
        page: path in the repository.
        text: Markdown.
        shown: paths in the repository of what is part of the site.
        repository: where its files can be looked at, or None.
    """

    def link(match: re.Match[str]) -> str:
        path, anchor = split(page, match["target"] or "")
        if not path:
            return match[0]
        if path in shown:
            here = posixpath.dirname(placed(page)) or "."
            target = posixpath.relpath(placed(path), here)
        elif repository:
            target = f"{repository.rstrip('/')}/blob/main/{path}"
        else:
            return match["text"]
        return f"{match['open']}{target}{anchor})"

    return LINK.sub(link, text)


def shown_from(pages: list[str]) -> set[str]:
    """These pages, and all Markdown and pictures that they lead to, directly or not."""
    shown: set[str] = set()
    while pages:
        page = pages.pop()
        if page in shown or not page.endswith(SHOWN) or not (ROOT / page).is_file():
            continue
        shown.add(page)
        if page.endswith(".md"):
            pages += linked(page, (ROOT / page).read_text())
    return shown


_shown: set[str] = set()


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File  # `make setup` does not install it

    docs = [f"docs/{file.src_uri}" for file in files]
    _shown.clear()
    _shown.update(docs, shown_from([*ALWAYS, *docs]))
    for path in sorted(_shown.difference(docs)):
        files.append(File.generated(config, placed(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    path = Path(page.file.abs_src_path).relative_to(ROOT).as_posix()
    return rewritten(path, markdown, _shown, config.repo_url)
