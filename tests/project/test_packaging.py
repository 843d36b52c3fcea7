"""What an installation brings, and that importing the package needs torch and NumPy alone."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path
from typing import Any

import pytest
import set_up
import torch
from setuptools import Distribution, find_packages

import zo_fused

ROOT = Path(__file__).parents[2]


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
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "['zo_fused']"


def test_every_public_name_loads() -> None:
    for name in zo_fused.__all__:
        assert getattr(zo_fused, name) is not None
    assert set(zo_fused.__all__) <= set(dir(zo_fused))
    from zo_fused.ray import Driver  # a module, as it looks

    assert zo_fused.ray.Driver is Driver
    with pytest.raises(AttributeError, match="no attribute 'SGD'"):
        _ = zo_fused.SGD


@pytest.mark.slow
def test_type_checkers_see_the_public_names(tmp_path: Path) -> None:
    """Names load lazily, but a user's editor knows their signatures."""
    api = pytest.importorskip("mypy.api")
    names = [name for name in zo_fused.__all__ if name != "__version__"]
    script = tmp_path / "user.py"
    script.write_text(
        "import zo_fused\n"
        + "".join(f"reveal_type(zo_fused.{name})\n" for name in names)
        + "zo_fused.MeZO([], lr='fast')\n"
    )
    options = ["--strict", "--ignore-missing-imports", f"--cache-dir={tmp_path}"]
    told, errors, _ = api.run([*options, "--follow-imports=silent", str(script)])
    assert not errors
    revealed = re.findall(r'Revealed type is "(.*)"', told)
    assert len(revealed) == len(names)
    assert "Any" not in revealed
    assert "lr: Union[float, torch._tensor.Tensor]" in told or "lr: float | torch" in told
    assert 'has incompatible type "str"' in told


def test_replay_stays_a_function_when_its_module_is_imported() -> None:
    import zo_fused.replaying.rebuild

    assert callable(zo_fused.replay)


def test_versions_agree() -> None:
    assert importlib.metadata.version("zo_fused") == zo_fused.__version__
    released = re.findall(r"^## \[?(\d[^\s\]]*)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert not released or released[0] == zo_fused.__version__


def test_constraints_pin_the_tested_torch() -> None:
    choice = Path(sys.prefix) / ".choice"
    if not choice.exists() or json.loads(choice.read_text())["torch"] == "system":
        pytest.skip("the torch of this environment was not chosen by `make setup`")
    assert torch.__version__.startswith(set_up.pins()["torch"])


# ---- what is published ---------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="about glibc")
def test_the_extension_runs_where_torch_does() -> None:
    """With glibc 2.28; what newer compilers add would need 2.32 (csrc/cpu/glibc.cpp)."""
    extension = importlib.util.find_spec("zo_fused._C")
    if extension is None or extension.origin is None:
        pytest.skip("the C++ extension is not built")
    needed = re.findall(rb"GLIBC_2\.(\d+)", Path(extension.origin).read_bytes())
    assert max(map(int, needed)) <= 28


def test_source_archive_is_complete(tmp_path: Path) -> None:
    """Whoever unpacks it can run what the README and CONTRIBUTING say."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    sources = {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}
    for name in sources:  # a copy: an archive takes over what an earlier one of its folder had
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    code = "from setuptools.build_meta import build_sdist; print(build_sdist('dist'))"
    built = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"ZO_FUSED_NATIVE": "0"},
    )
    archive = tmp_path / "dist" / built.stdout.splitlines()[-1]
    with tarfile.open(archive) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    assert sources - names == {".gitignore"}


def test_data_files_are_installed() -> None:
    """Whatever lies in the package and is no module is package data."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        patterns = tomllib.load(file)["tool"]["setuptools"]["package-data"]["zo_fused"]
    package = ROOT / "zo_fused"
    named = {path for pattern in patterns for path in package.glob(pattern) if path.is_file()}
    built = {".py", ".pyc", ".so"}
    assert {p for p in package.rglob("*") if p.is_file() and p.suffix not in built} == named
    assert package / "task" / "papers" / "mezo_sst2.yaml" in named


def test_links_of_the_description(build: dict[str, Any]) -> None:
    """On a package index, a link to a file would lead nowhere."""
    readme = (ROOT / "README.md").read_text()
    text = build["description"]()
    assert re.findall(r"\]\((?!https?:)", text) == []
    assert "docs/noise.md: the noise contract" in text
    assert re.findall(r"\(https?:[^)]+\)", text) == re.findall(r"\(https?:[^)]+\)", readme)


# ---- setup.py ------------------------------------------------------------------------------------


def test_torch_of_the_environment_that_pip_installs_into(tmp_path: Path) -> None:
    """pip hides it from an isolated build."""
    (tmp_path / "torch.py").touch()
    code = f"""
import runpy, site, sys
sys.path = [path for path in sys.path if not path.endswith("site-packages")]
sys.path.append({str(ROOT)!r})
build = runpy.run_path({str(ROOT / "setup.py")!r}, run_name="build")
site.getsitepackages, site.getusersitepackages = lambda: [], lambda: "nowhere"
assert not build["torch_is_there"]()
site.getsitepackages = lambda: [{str(tmp_path)!r}]
assert build["torch_is_there"]()
import torch
assert torch.__file__.startswith({str(tmp_path)!r})
"""
    ours = f"import setuptools, sys; sys.modules.pop('torch', None)\n{code}"
    subprocess.run([sys.executable, "-c", ours], check=True)


@pytest.fixture
def build() -> dict[str, Any]:
    """The functions of setup.py."""
    return runpy.run_path(str(ROOT / "setup.py"), run_name="build")


@pytest.fixture
def nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A toolkit whose nvcc knows two architectures and compiles nothing."""
    path = tmp_path / "bin" / "nvcc"
    path.parent.mkdir()
    path.write_text(
        "#!/bin/sh\ncase $1 in --list*) echo compute_80 compute_90;; *) exit 3;; esac\n"
    )
    path.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    return path


@pytest.mark.parametrize(
    ("asked", "codes"),
    [
        ("", "80=sm_80 90=sm_90 90=compute_90"),  # the defaults that nvcc knows
        ("8.0;9.0+PTX", "80=sm_80 90=sm_90 90=compute_90"),
        ("8.6 12.0", "86=sm_86 120=sm_120"),
        ("9.0a", "90a=sm_90a"),
    ],
)
def test_architectures_to_compile_for(
    asked: str, codes: str, build: dict[str, Any], nvcc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    pairs = (code.split("=") for code in codes.split())
    wanted = [f"-gencode=arch=compute_{number},code={code}" for number, code in pairs]
    assert build["gencode"](str(nvcc)) == wanted


@pytest.mark.parametrize("asked", ["Hopper", "9.0+SASS", "8.0,9.0"])
def test_unknown_architectures(
    asked: str, build: dict[str, Any], nvcc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    with pytest.raises(RuntimeError, match="is no architecture"):
        build["gencode"](str(nvcc))


def extensions(build: dict[str, Any]) -> list[str]:
    return [extension.name for extension in build["native"]().get("ext_modules", [])]


def test_what_is_built(
    build: dict[str, Any], nvcc: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    cpu, cuda = "zo_fused._C", "zo_fused._CUDA"
    for wanted, version, expected in (
        ("0", "13.0", []),
        ("cpu", "13.0", [cpu]),
        ("cuda", None, [cpu, cuda]),
        ("auto", "13.0", [cpu, cuda]),
        ("", None, [cpu]),
    ):
        monkeypatch.setenv("ZO_FUSED_NATIVE", wanted)
        monkeypatch.setattr(torch.version, "cuda", version)
        assert extensions(build) == expected
    assert "without zo_fused._CUDA: this torch is not built for CUDA" in capsys.readouterr().err
    nvcc.unlink()
    monkeypatch.setenv("ZO_FUSED_NATIVE", "cuda")
    with pytest.raises(SystemExit, match="ZO_FUSED_NATIVE=cuda, but no nvcc"):
        extensions(build)
    monkeypatch.setenv("ZO_FUSED_NATIVE", "auto")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert extensions(build) == [cpu]
    monkeypatch.setenv("ZO_FUSED_NATIVE", "gpu")
    with pytest.raises(SystemExit, match="choose one of auto, cpu, cuda, 0"):
        extensions(build)


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_cuda_code_that_does_not_compile(
    wanted: str,
    build: dict[str, Any],
    nvcc: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    tmp_path: Path,
) -> None:
    """Left out, or an error if it was asked for."""
    monkeypatch.setenv("ZO_FUSED_NATIVE", wanted)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    options = build["native"]()
    command = options["cmdclass"]["build_ext"](Distribution())
    command.build_temp = str(tmp_path / "objects")
    extension = options["ext_modules"][1]
    assert extension.optional == (wanted == "auto")
    if wanted == "cuda":
        with pytest.raises(subprocess.CalledProcessError):
            command.build_extension(extension)
    else:
        command.build_extension(extension)
        assert "LEFT OUT zo_fused._CUDA" in capsys.readouterr().err
