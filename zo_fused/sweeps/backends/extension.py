"""The package's compiled extensions: load one, or tell why that does not work."""

from __future__ import annotations

import importlib


def load(name: str) -> Exception | None:
    """Import an extension, which registers its operators. None, or what was wrong."""
    try:
        importlib.import_module(name)
    except (ImportError, OSError) as error:
        return error
    return None


def is_broken(name: str, error: Exception | None) -> bool:
    """Whether the extension is there and does not load: otherwise it works, or was never built."""
    missing = isinstance(error, ModuleNotFoundError) and error.name == name
    return error is not None and not missing


def why_not(what: str, name: str, error: Exception, build: str) -> str:
    """The reason, and what to do, in one sentence.

    Args:
        what: the extension in words.
        name: its module.
        error: from `load`.
        build: how to build it.
    """
    if not is_broken(name, error):
        return f"{what} {name} is not built ({error}); build it with {build}"
    # Extensions link to libtorch alone, so symbols that are missing are those of PyTorch.
    foreign = "symbol" in str(error).lower()
    origin = "another PyTorch" if foreign else "another machine, Python or PyTorch, or is damaged"
    return (
        f"{what} {name} does not load ({error}): it was built for {origin}; reinstall it: {build}"
    )
