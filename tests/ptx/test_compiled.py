"""What Triton and nvcc make of the kernels computes what the reference does, bit for bit: their PTX
runs on the CPU, every access checked. What that proves and what it doesn't is in docs/noise.md.

One call of each kind runs always, all of them in `make test-all`.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable

import pytest
from support.builds import shared_folder

from tests.ptx.faults import FAULTS
from tests.ptx.rows import CUDA_ONLY, FAMILIES, rows
from tests.ptx.worker import Report, report

COMPILERS = ("triton", "cuda")
# Of Triton.
KERNELS = ("key", "fill", "dense", "shaped", "dense_steps", "moments", "lowrank", "momentum")

# Every kernel, rule and transform, straight-line code and loops; the dtypes take turns.
SLICE = (
    *("keys: 5", "fills: words", "fills: portable", "factors: 1 2 8"),
    *("dense: float32, 1, nearest, portable", "dense: float16, 1, stochastic, hadamard"),
    *("dense: bfloat16, 2, nearest, signs", "dense: float16, 3, nearest, fast"),
    *("shaped: mask, float16, 1, stochastic, hadamard", "shaped: mask, float32, 2, nearest, signs"),
    *(
        "shaped: scale, float32, 2, nearest, portable",
        "shaped: mask, bfloat16, 1, nearest, portable",
    ),
    "steps: bfloat16, portable, stochastic",
    "moments: momentum, like weights, float16, 1, stochastic, portable",
    "moments: sign, nothing, bfloat16, 2, nearest, hadamard",
    "moments: adam, float32, float32, 1, nearest, signs",
    "moments: adam, squares, bfloat16, 3, stochastic, portable",
    "moments: hizoo, hessian, bfloat16, 1, nearest, portable",
    "low rank: 4, float16, momentum, nearest",
    "low rank: 17, bfloat16, nothing, stochastic",
    "low rank: 1, float32, nothing, nearest",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Report]:
    """`report` in a folder that all tests share."""
    folder = shared_folder(tmp_path_factory)

    def run(compiler: str, target: str, wanted: list[tuple[str, str]]) -> Report:
        if compiler == "triton":
            pytest.importorskip("triton")
        elif shutil.which("nvcc") is None:
            pytest.skip("no nvcc")
        return report(compiler, target, folder, wanted)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("target", ["sm_90", "sm_80", "sm_100"])
def test_kernels_of_each_kind(run: Callable[..., Report], compiler: str, target: str) -> None:
    found = run(compiler, target, [("", name) for name in SLICE])
    assert not found.wrong
    assert found.instructions > 1e6
    kinds = {name.partition(" ")[0] for name in found.kernels}
    if compiler == "triton":
        assert kinds == {f"_{kind}_kernel" for kind in KERNELS}


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in CUDA_ONLY])
def test_every_pair_of_options_with_triton(run: Callable[..., Report], family: str) -> None:
    found = run("triton", "sm_90", [("", name) for name in rows(family)])
    assert not found.wrong


@pytest.mark.slow
def test_every_kernel_of_cuda(run: Callable[..., Report]) -> None:
    """They are compiled all at once, and dense ones have a kernel for each combination."""
    wanted = [name for family in FAMILIES for name in rows(family, every=family == "dense")]
    found = run("cuda", "sm_90", [("", name) for name in wanted])
    assert not found.wrong
    assert len(found.kernels) == 89
    assert found.kernels == found.entries


# A call that shows each fault, and what is said of it.
SHOWN = {
    "another constant": ("dense: float32, 1, nearest, portable", "AssertionError: .* differ"),
    "no masks": ("dense: float32, 1, nearest, portable", "Fault: out of bounds: 'st.global"),
    "flushes": ("dense: float32, 0, nearest, portable", "AssertionError: .* differ"),
    "contracts": ("factors: 1 2 8", "AssertionError: .* differ"),
}


@pytest.mark.slow
@pytest.mark.parametrize("compiler", COMPILERS)
def test_faults_are_found(run: Callable[..., Report], compiler: str) -> None:
    assert SHOWN.keys() == FAULTS.keys() - {""}
    wanted = [(fault, row) for fault, (row, _) in SHOWN.items()]
    wrong = run(compiler, "sm_90", [*wanted, *(("", row) for _, row in wanted)]).wrong
    assert len(wrong) == len(SHOWN)
    for fault, (row, said) in SHOWN.items():
        assert re.match(said, wrong[f"{fault}: {row}"]), wrong
