"""What the tests of tasks share."""

import importlib
import importlib.util

import pytest


@pytest.fixture(autouse=True)
def no_network(monkeypatch, one_thread):
    if importlib.util.find_spec("huggingface_hub") is not None:
        module = importlib.import_module("huggingface_hub.constants")
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
