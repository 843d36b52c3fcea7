"""`make setup` can be carried out on ordinary machines: uv resolves its requirements.

Against PyPI's metadata alone (a few MB, no package is fetched), whatever this machine has, so that
a pin that only suits its own packages is found.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

uv = pytest.importorskip("uv")

ROOT = Path(__file__).parents[2]
PLATFORMS = ("x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu", "aarch64-apple-darwin")
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
COMBINATIONS = tuple(product(PLATFORMS, PYTHONS))


def extras() -> list[str]:
    """What `make setup` installs, `make docs` and `make test-ray`, into the same environment."""
    match = re.search(r"-e '\.\[(.*)\]'", (ROOT / "Makefile").read_text())
    assert match is not None
    return [f"--extra={name}" for name in [*match[1].split(","), "docs", "ray"]]


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    """uv's resolver, which knows PyPI and nothing of this machine but its caches."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("UV_", "PIP_"))}
    # Without an interpreter that is there, uv fetches one of the version that is asked for.
    options = ("--no-config", "--no-python-downloads", "--python", sys.executable)
    return subprocess.Popen(
        [
            uv.find_uv_bin(),
            "pip",
            "compile",
            *options,
            "--quiet",
            "--only-binary=:all:",
            *arguments,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment | {"MACOSX_DEPLOYMENT_TARGET": "14.0"},  # torch's wheels need macOS 14
    )


def resolve(constraints: Path, platform: str, python: str) -> subprocess.Popen[str]:
    target = ("--python-platform", platform, "--python-version", python)
    return start("pyproject.toml", *extras(), "--constraints", constraints, *target)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skips where the index can't be reached."""
    requirement = tmp_path_factory.mktemp("index") / "requirements.in"
    requirement.write_text("packaging\n")
    probe = start("--no-cache", "--no-deps", requirement)
    _, reason = probe.communicate()
    if probe.returncode != 0:
        pytest.skip(f"the package index can't be reached: {reason}")


@pytest.mark.parametrize(
    "which",
    [COMBINATIONS[0], *(pytest.param(w, marks=pytest.mark.slow) for w in COMBINATIONS[1:])],
    ids="-".join,
)
def test_set_up_resolves(which: tuple[str, str], index: None) -> None:
    """And every version is pinned, but those that torch's own pins decide."""
    resolution = resolve(ROOT / "constraints.txt", *which)
    packages, conflict = resolution.communicate()
    status = resolution.returncode
    if status == 2 and "Failed to fetch" in conflict:
        pytest.skip(f"the package index failed: {conflict}")
    assert status == 0, conflict
    versions = dict(re.findall(r"^([\w.-]+)==(\S+)", packages, re.MULTILINE))
    pinned = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    free = versions.keys() - {re.sub(r"[-_.]+", "-", name).lower() for name in pinned}
    assert {name for name in free if not name.startswith(("cuda-", "nvidia-"))} == set()
    assert ("triton" in versions) == ("linux" in which[0])


@pytest.mark.parametrize(
    ("pin", "reason"),
    [
        ("triton==3.9.0", r"torch==2\.13\.0 depends on triton"),
        ("numpy==1.26.4", r"numpy"),  # has no wheel for Python 3.14
    ],
)
def test_a_conflict_is_found(pin: str, reason: str, index: None, tmp_path: Path) -> None:
    package = pin.partition("==")[0]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    others = [line for line in lines if not line.startswith(f"{package}==")]
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("\n".join([*others, pin]))
    resolution = resolve(constraints, "x86_64-unknown-linux-gnu", "3.14")
    _, conflict = resolution.communicate()
    assert resolution.returncode == 1
    assert re.search(reason, conflict), conflict
