"""What the tests of tasks share."""

import importlib
import importlib.util

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread_and_no_network(monkeypatch):
    if importlib.util.find_spec("huggingface_hub") is not None:
        module = importlib.import_module("huggingface_hub.constants")
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
