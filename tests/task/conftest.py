"""What the tests of tasks share."""

import importlib
import importlib.util

import pytest
import torch

from zo_fused.cli.defaults import EMBEDDED_MODEL
from zo_fused.task.models import load_model, load_tokenizer


@pytest.fixture(autouse=True)
def no_network(monkeypatch, one_thread):
    if importlib.util.find_spec("huggingface_hub") is not None:
        module = importlib.import_module("huggingface_hub.constants")
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def model():
    """The embedded model."""
    return load_model(str(EMBEDDED_MODEL), "float32", torch.device("cpu"))


@pytest.fixture(scope="module")
def tokenizer():
    """That of the embedded model."""
    return load_tokenizer(str(EMBEDDED_MODEL))


@pytest.fixture(scope="module")
def masked_model(tmp_path_factory):
    """A folder with a tiny RoBERTa."""
    transformers = pytest.importorskip("transformers")
    tiny_models = importlib.import_module("support.tiny_models")
    base = tmp_path_factory.mktemp("roberta")
    tokenizer = tiny_models.roberta_tokenizer()
    tokenizer.save_pretrained(base)
    size = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    config = tiny_models.config("roberta", **size)
    tiny_models.random_model(transformers.AutoModelForMaskedLM, config).save_pretrained(base)
    return base
