"""What a user hears of the choice of a backend: once, why it is a slow one, and how to mend it."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import zo_fused
from zo_fused.cli.main import main
from zo_fused.sweeps import dispatch
from zo_fused.sweeps.backends import cpu, cuda, extension
from zo_fused.sweeps.backends import triton as backend

ROOT = Path(__file__).parents[2]

# Two steps; prints the warnings.
STEPS = """
import sys, warnings
# An editable installation finds its extension from everywhere.
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]
import torch, zo_fused
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = zo_fused.MeZO([weight], lr=0.1)
    for _ in range(2):
        optimizer.step(lambda: weight.sum())
for warning in caught:
    print(warning.category.__name__, warning.message)
print(zo_fused.backend_of("cpu"), zo_fused.__file__)
"""


@pytest.fixture
def package(tmp_path: Path) -> Callable[[], list[str]]:
    """A function: the lines that STEPS prints with a copy of the package without its extensions."""
    leave = shutil.ignore_patterns("*.so", "__pycache__", "embedded", "task", "cli")
    shutil.copytree(ROOT / "zo_fused", tmp_path / "zo_fused", ignore=leave)

    def run() -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", STEPS],
            cwd=tmp_path,  # first on Python's path
            env={**os.environ, "ZO_FUSED_BACKEND": ""},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        *lines, last = done.stdout.splitlines()
        assert last == f"reference {tmp_path}/zo_fused/__init__.py"
        return lines

    return run


@pytest.fixture
def fresh(use_backend: Callable[[str | None], None]) -> Iterator[None]:
    """Automatic choice, as in a process that has said nothing yet."""
    said = dispatch._said.copy()
    dispatch._said.clear()
    use_backend(None)
    yield
    dispatch._said.clear()
    dispatch._said.update(said)


def chosen_for(device: str) -> tuple[str, str]:
    """The backend, chosen twice, and the text of the one warning."""
    with warnings.catch_warnings(record=True, action="always") as caught:
        names = set()
        for _ in range(2):
            dispatch.select.cache_clear()
            names.add(zo_fused.backend_of(device))
    (name,), (warning,) = names, caught
    assert warning.category is RuntimeWarning
    return name, str(warning.message)


def test_one_warning_where_the_extension_was_not_built(package: Callable[[], list[str]]) -> None:
    (line,) = package()
    assert line.startswith("RuntimeWarning the slow reference serves 'cpu' tensors: ")
    assert "zo_fused._C is not built" in line
    assert "`pip install --force-reinstall --no-deps --no-cache-dir .`" in line


def test_one_warning_where_the_extension_does_not_load(
    package: Callable[[], list[str]], tmp_path: Path
) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler (cc, gcc)")
    source, library = tmp_path / "one.c", tmp_path / "zo_fused" / "_C.abi3.so"
    source.write_text(
        "void *torch_of_another_version(void);\n"
        "void *PyInit__C(void) { return torch_of_another_version(); }\n"
    )
    command = [compiler, "-shared", "-fPIC", "-Wl,-undefined,dynamic_lookup"]
    if sys.platform != "darwin":
        command.pop()
    subprocess.run([*command, source, "-o", library], check=True)
    (line,) = package()
    assert line.startswith("RuntimeWarning the slow reference serves 'cpu' tensors: ")
    assert "zo_fused._C does not load (" in line
    assert "torch_of_another_version" in line
    assert "it was built for another PyTorch; reinstall it: `pip install" in line


def test_a_file_that_is_no_library_does_not_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "zo_damaged.abi3.so").write_text("half a download")
    monkeypatch.syspath_prepend(tmp_path)
    error = extension.load("zo_damaged")
    assert error is not None
    assert extension.is_broken("zo_damaged", error)
    reason = extension.why_not("the extension", "zo_damaged", error, "`make`")
    assert "does not load" in reason
    assert "or is damaged; reinstall it: `make`" in reason
    assert extension.load("json") is None
    assert not extension.is_broken("json", None)


def test_a_gpu_without_triton_is_one_warning(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    absent = ModuleNotFoundError("No module named 'zo_fused._CUDA'", name="zo_fused._CUDA")
    monkeypatch.setattr(cuda, "import_error", absent)
    name, text = chosen_for("cuda")
    assert name == "reference"
    assert "the slow reference serves 'cuda' tensors: Triton can't be imported" in text
    assert f"`pip install triton=={backend.fitting()}`" in text
    assert "the CUDA extension zo_fused._CUDA is not built" in text


@pytest.mark.parametrize("name", ["reference", None])
def test_no_warning_of_what_is_chosen_or_fast(
    name: str | None, fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    zo_fused.set_backend(name)
    if name is None:
        monkeypatch.setattr(cpu, "why_not", lambda device_type: None)
    with warnings.catch_warnings(action="error"):
        assert zo_fused.backend_of("cpu") == (name or "cpu")
        assert dispatch.why_slow("xpu") is None  # nothing faster is possible there


# ---- Triton and PyTorch -------------------------------------------------------------------------


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function: pretends that these versions are installed."""

    def pretend(
        triton: str,
        torch_version: str = "2.13.0",
        requires: str | None = None,
        interprets: bool = False,
    ) -> None:
        launch = SimpleNamespace(INTERPRETING=SimpleNamespace(value=interprets))
        monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=triton))
        monkeypatch.setitem(sys.modules, "zo_fused_kernels.launch", launch)
        monkeypatch.setattr(torch, "__version__", torch_version)
        lines = ["numpy"] + [f'triton=={requires}; platform_system == "Linux"'] * bool(requires)
        monkeypatch.setattr(backend, "requires", lambda name: lines)

    return pretend


@pytest.mark.parametrize(("pytorch", "triton"), backend.PAIRS.items())
def test_supported_pairs_raise_no_doubt(
    pytorch: str, triton: str, installed: Callable[..., None]
) -> None:
    for requires in (triton, None):  # a build for CUDA, and one for CPUs
        installed(triton, f"{pytorch}.1", requires)
        assert backend.fitting() == triton
        assert backend.why_not("cuda") is None
        assert backend.doubt() is None


def test_an_old_triton_is_refused_with_the_cure(installed: Callable[..., None]) -> None:
    installed("3.5.1", "2.13.0", "3.7.1")
    reason = backend.why_not("cuda")
    assert reason is not None
    assert "Triton 3.5.1 is too old, 3.6.0 or newer works; `pip install triton==3.7.1`" in reason


def test_an_untested_triton_works_with_one_warning(
    fresh: None, installed: Callable[..., None]
) -> None:
    installed("3.10.0", "2.16.0")  # as text it comes before 3.6
    name, text = chosen_for("cuda")
    assert name == "triton"
    assert "not tested with Triton 3.10.0, only with 3.6, 3.7, 3.8, 3.9" in text
    assert "`pip install 'zo-fused[triton]'`" in text


def test_another_triton_than_pytorch_requires_is_a_sentence(
    installed: Callable[..., None],
) -> None:
    installed("3.9.0", "2.13.0", "3.7.1")
    assert backend.why_not("cuda") is None
    assert str(backend.doubt()).startswith("PyTorch 2.13.0 requires Triton 3.7.1, and 3.9.0 is")
    installed("3.7.0", "2.12.0", "3.7.1")  # a patch is no other Triton
    assert backend.doubt() is None


def test_the_oldest_interpreter_needs_an_older_numpy(
    installed: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for triton, numpy, works in (
        ("3.6.0", "2.4.6", 0),
        ("3.6.0", "2.3.5", 1),
        ("3.7.1", "2.4.6", 1),
    ):
        installed(triton, interprets=True)
        monkeypatch.setattr("numpy.__version__", numpy)
        reason = backend.why_not("cpu")
        assert (reason is None) == works
        assert works or f"Triton {triton} fails with NumPy {numpy}" in str(reason)


def test_pytorch_of_these_tests_has_its_pair() -> None:
    """Or the table lacks a version that this project is developed with."""
    if backend._own_word() is None:
        pytest.skip(f"PyTorch {torch.__version__} requires no Triton")
    assert importlib.metadata.version("triton") == backend.fitting()


# ---- zo-fused doctor ----------------------------------------------------------------------------


def test_doctor_says_the_same(
    fresh: None,
    installed: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cpu, "import_error", ImportError("_C.abi3.so: undefined symbol: torch_new"))
    installed("3.9.0", "2.13.0", "3.7.1", interprets=True)
    with warnings.catch_warnings(action="error"):
        assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "cpu           backend reference" in text
    assert "C++ extension   does not load" in text
    assert f"PyTorch {importlib.metadata.version('torch')} goes with Triton 3.7.1" in text
    advice = text.partition("what to do")[2]
    assert f"on CPUs the slow reference serves: {cpu.why_not('cpu')}" in advice
    assert "undefined symbol: torch_new" in advice
    assert str(backend.doubt()) in advice
