"""Set-up of the tests of trainers."""

from __future__ import annotations

from typing import Any

import pytest


def pytest_pycollect_makemodule(module_path: Any, parent: Any) -> None:
    """These modules import it first of all."""
    pytest.importorskip("transformers", reason="trainers need the extra hf")


@pytest.fixture(autouse=True)
def quick(fresh_heap: None, one_thread: None) -> None:
    """A run collects garbage, which would take most of its time; threads wait for each other."""
