"""Set-up of the tests of trainers."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def quick(fresh_heap: None) -> None:
    """A run collects garbage, which would take most of its time."""
