"""What an installation brings, and that importing the package needs torch alone."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from setuptools import find_packages

import zo_fused

ROOT = Path(__file__).parent.parent


def test_top_level_packages_are_ours_alone() -> None:
    """A package named `kernels` would overwrite Hugging Face's, which transformers imports."""
    packages = [*find_packages(str(ROOT), include=["zo_fused*"]), *find_packages(ROOT / "kernels")]
    assert {name.partition(".")[0] for name in packages} == {"zo_fused", "zo_fused_kernels"}
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_huggingface_kernels_is_not_shadowed() -> None:
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is None or not Path(spec.origin).is_relative_to(ROOT)


def test_import_needs_torch_alone() -> None:
    """Names are lazy: a step loads no top-level package but ours that a step of SGD doesn't."""
    code = """
import sys, torch
def loaded():
    return {name.partition(".")[0] for name in sys.modules}
w = torch.nn.Parameter(torch.ones(3))
torch.optim.SGD([w]).step()
before = loaded()
import zo_fused
zo_fused.LOZO([w]).step(lambda: w.sum())
print(sorted(loaded() - before - set(sys.stdlib_module_names)))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "['zo_fused']"


def test_every_public_name_loads() -> None:
    for name in zo_fused.__all__:
        assert getattr(zo_fused, name) is not None
    assert set(zo_fused.__all__) <= set(dir(zo_fused))
    with pytest.raises(AttributeError, match="no attribute 'SGD'"):
        _ = zo_fused.SGD


def test_replay_stays_a_function_when_its_module_is_imported() -> None:
    import zo_fused.rebuild

    assert callable(zo_fused.replay)


def test_versions_agree() -> None:
    assert importlib.metadata.version("zo_fused") == zo_fused.__version__
    released = re.findall(r"^## \[?(\d[^\s\]]*)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert not released or released[0] == zo_fused.__version__


def test_constraints_pin_the_tested_torch() -> None:
    pinned = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    assert torch.__version__.startswith(pinned["torch"]) or torch.cuda.is_available()
