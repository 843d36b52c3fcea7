"""What Triton's compiler makes of the kernels, for NVIDIA and AMD GPUs, on a machine with neither.

Run as a script, this file compiles the kernels for one target with `bench/gpu/sass.py` and prints
what it found as JSON. The tests start it so, once a target, because Triton can't compile in a
process that interprets.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import roofline, sass
from zo_fused.sweeps.backends.triton import PAIRS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NVIDIA = [target for target in sass.TARGETS if target.startswith("sm_")]

# Every Triton that some PyTorch requires has a column in the tables. To add one: install it, run
# ``python -m tests.sweeps.test_triton_compile TARGET`` and read `per_element` and `local` of every
# case.
VERSIONS = tuple(dict.fromkeys(PAIRS.values()))  # 3.6.0, 3.7.1, 3.8.0, 3.9.0

# Instructions per element, of everything, with the search for the parameter shared out, as they
# were measured. A compiler makes the same code of the same source, so there is no room to get worse
# but what rounding to a decimal takes. An H100 can issue 39.5 in the time that its memory takes for
# one element in 16 bits.
ROUNDING = 0.1
UNKNOWN = math.inf  # not measured with that version
INSTRUCTIONS: dict[str, dict[str, tuple[float, ...]]] = {
    "sm_80": {
        "dense, signs fp16": (8.2, 8.1, 8.0, 8.0),
        "dense fp16": (33.1, 34.0, 33.7, 33.7),
        "dense, stochastic fp16": (50.1, 51.6, 48.5, 48.5),
        "moments, adam, m fp32 fp16": (68.4, 69.3, 67.8, 67.8),
        "low-rank r=4 fp16": (10.0, 10.0, 10.0, 10.0),
        "dense, stochastic bf16": (44.1, 45.6, 43.7, 43.7),
        "dense, fast bf16": (23.9, 24.8, 23.4, 23.4),
        "moments, adam, m fp32 bf16": (68.9, 69.8, 68.3, 68.3),
        "dense, 2 directions fp32": (62.5, 64.5, 61.5, 61.5),
        "dense, stochastic fp32": (32.9, 33.8, 32.4, 32.4),
        "moments, adam, m fp32 fp32": (67.5, 68.5, 65.3, 65.3),
        "shaped, mask fp16": (UNKNOWN, 41.5, UNKNOWN, UNKNOWN),
        "shaped, scale fp16": (UNKNOWN, 59.8, UNKNOWN, UNKNOWN),
        "low-rank r=64 fp32": (91.4, 91.3, 91.1, 91.1),
    },
    "sm_90": {
        "dense fp16": (34.1, 35.1, 33.7, 33.9),
        "dense bf16": (34.6, 35.6, 34.2, 34.4),
        "dense fp32": (34.0, 35.0, 33.5, 33.8),
        "dense, 2 directions fp16": (64.0, 66.0, 63.6, 63.6),
        "dense, 2 directions fp32": (62.5, 64.5, 61.3, 61.7),
        "dense, stochastic fp16": (52.8, 53.2, 51.7, 52.2),
        "dense, stochastic bf16": (44.2, 45.7, 45.7, 46.3),
        "dense, signs fp16": (8.1, 8.1, 8.5, 8.5),
        "dense, signs fp32": (9.6, 9.5, 9.6, 9.5),
        "dense, hadamard fp16": (15.0, 15.3, 14.6, 14.6),
        "dense, hadamard bf16": (15.5, 15.8, 15.1, 15.1),
        "dense, hadamard fp32": (15.0, 14.4, 14.9, 15.0),
        "dense, hadamard, 2 directions fp16": (26.4, 26.8, 27.2, 26.3),
        "dense, hadamard, 2 directions fp32": (28.5, 28.5, 28.9, 28.9),
        "moments, momentum, m fp32, hadamard fp16": (26.9, 27.0, 26.3, 25.9),
        "dense, fast fp16": (23.4, 24.3, 23.5, 23.2),
        "dense, fast fp32": (22.7, 24.0, 22.2, 22.4),
        "moments, momentum, m fp32 fp16": (44.6, 45.3, 43.7, 44.0),
        "moments, adam, m fp32 fp16": (68.1, 69.1, 69.3, 67.8),
        "moments, adam, m fp32 fp32": (67.2, 68.2, 66.2, 67.9),
        "shaped, mask fp16": (UNKNOWN, 41.9, UNKNOWN, UNKNOWN),
        "moments, sign fp16": (44.8, 45.7, 44.3, 44.5),
        "low-rank r=1 fp16": (7.2, 7.2, 7.0, 7.1),
        "low-rank r=4 fp16": (10.2, 10.2, 10.2, 10.0),
        "low-rank r=8 fp16": (14.2, 14.2, 14.2, 14.2),
        "low-rank r=16 fp16": (28.1, 28.2, 28.3, 28.3),
        "low-rank r=64 fp16": (81.1, 81.1, 81.5, 81.5),
        "low-rank r=4 fp32": (11.2, 11.2, 11.2, 10.5),
    },
    "sm_100": {
        "dense fp16": (33.1, 33.1, 32.7, 32.9),
        "dense, signs fp16": (8.1, 8.2, 7.5, 7.5),
        "dense, signs fp32": (9.5, 9.6, 9.5, 9.5),
        "dense, hadamard fp16": (11.9, 11.9, 11.8, 11.8),
        "dense, hadamard, 2 directions fp16": (21.3, 21.0, 21.9, 21.1),
        "moments, momentum, m fp32, hadamard fp16": (25.8, 25.8, 25.7, 20.6),
        "dense, hadamard, 2 directions fp32": (30.3, 29.0, 29.8, 29.6),
        "dense, stochastic fp16": (51.1, 51.0, 50.0, 50.7),
        "moments, adam, m fp32 fp16": (68.1, 69.3, 64.3, 63.4),
        "low-rank r=4 fp16": (10.2, 10.2, 10.2, 9.2),
        "dense, stochastic bf16": (45.2, 45.1, 44.5, 45.2),
        "dense, fast bf16": (23.6, 23.4, 23.1, 23.2),
        "moments, adam, m fp32 bf16": (68.6, 69.7, 64.8, 63.9),
        "dense, 2 directions fp32": (62.7, 62.7, 63.4, 63.9),
        "dense, stochastic fp32": (34.0, 34.2, 33.3, 33.6),
        "moments, adam, m fp32 fp32": (67.2, 67.3, 59.0, 62.0),
        "low-rank r=64 fp32": (121.6, 121.2, 121.2, 121.2),
    },
}

ROOTS = re.compile("moments, adam|scale|hizoo")  # kernels with roots and quotients

# Local accesses, that is registers that didn't suffice, where there are any.
LOCAL: dict[str, dict[str, tuple[float, ...]]] = {
    "sm_80": {
        "dense, hadamard, 2 directions fp16": (0, 0, 4, 4),
        "moments, momentum, m fp32, hadamard fp16": (0, 4, 12, 12),
        "dense, any directions fp32": (0, 8, 0, 0),
        "script, stochastic fp16": (12, 0, 0, 0),
        "shaped, mask fp16": (UNKNOWN, 4, UNKNOWN, UNKNOWN),
        "shaped, mask fp32": (UNKNOWN, 4, UNKNOWN, UNKNOWN),
    },
    "sm_90": {
        "moments, momentum, m fp32, hadamard fp16": (0, 0, 0, 2),
        "moments, momentum, m fp32, hadamard bf16": (0, 0, 0, 2),
        "dense, fast fp16": (0, 0, 9, 0),
        "dense, any directions fp32": (0, 8, 0, 0),
        "script fp16": (16, 0, 0, 0),
        "script fp32": (0, 2, 0, 0),
        "script, stochastic fp16": (12, 0, 12, 0),
    },
    "sm_100": {
        "dense, hadamard, 2 directions fp16": (6, 0, 0, 0),
        "dense, hadamard, 2 directions fp32": (4, 0, 0, 0),
        "dense, signs fp32": (0, 2, 0, 0),
        "moments, adam, m fp32 fp16": (0, 2, 0, 0),
        "dense, fast bf16": (2, 0, 0, 0),
        "moments, adam, m fp32 bf16": (0, 2, 0, 0),
        "dense, 2 directions fp32": (0, 0, 4, 0),
    },
}


def wanted(target: str, name: str) -> bool:
    """Compiling takes a second a case: everything that has a budget or a form of its own, once."""
    if target == "sm_90":
        return name in INSTRUCTIONS[target] or "r=" not in name
    singles = (
        "dense fp16",
        "dense, fast bf16",
        "low-rank r=4 fp16",
        "low-rank r=64 fp32",
    )
    several = (
        "stochastic",
        "moments, adam",
        "shaped, scale fp16",
        "hizoo fp16",
        "shaped, mask fp",
        "directions fp32",
        "dense, signs fp",
        "hadamard fp16",
        "hadamard, 2 directions fp16",
    )
    return name in singles or any(part in name for part in several)


# ---- the script ---------------------------------------------------------------------------------


def kernels_of_twenty_steps(compiled: list[Any]) -> list[str]:
    """Names of the kernels that twenty steps of MeZO and LOZO-M compile, where lr, seed and
    projected gradient change from step to step."""
    import torch

    import zo_fused
    from zo_fused.sweeps import dispatch
    from zo_fused.sweeps.backends import triton

    dispatch.select = lambda device_type: triton  # type: ignore[assignment]
    shapes = ((64, 48), (48,), (16, 64))
    for method, options in ((zo_fused.MeZO, {}), (zo_fused.LOZO, {"rank": 4, "momentum": 0.9})):
        for seed in (0, 2**63 + 1):
            params = [torch.nn.Parameter(torch.zeros(s, dtype=torch.float16)) for s in shapes]
            opt = method(params, lr=1e-3, seed=seed, **options)
            for step in range(10):
                opt.param_groups[0]["lr"] = 1e-3 / (1 + step)
                opt.param_groups[0]["weight_decay"] = 0.1 * step
                opt.step(lambda step=step: float(step**2))
    return sorted(kernel.metadata.name for kernel in {id(k): k for k in compiled}.values())


def report(target: str) -> dict[str, Any]:
    import triton
    from zo_fused_kernels import lowrank

    compiled = sass.record_kernels(target)
    found = sass.examine(target, compiled, lambda name: wanted(target, name))
    compiled.clear()
    names = kernels_of_twenty_steps(compiled)
    compiled.clear()
    # What the tests would see if contraction were on.
    lowrank.OPTIONS["enable_fp_fusion"] = True
    contracted = sass.examine(target, compiled, lambda name: name == "momentum of factors")
    return {
        "triton": triton.__version__,
        "cases": found,
        "twenty steps": names,
        "contracted": contracted["momentum of factors"],
    }


# ---- the tests ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reports() -> Iterator[Callable[[str], dict[str, Any]]]:
    """A function: what the script printed for a target. All targets are compiled side by side."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    running = {
        target: subprocess.Popen(
            [sys.executable, "-m", "tests.sweeps.test_triton_compile", target],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for target in sass.TARGETS
    }
    done: dict[str, dict[str, Any]] = {}

    def report(target: str) -> dict[str, Any]:
        if target not in done:
            output, errors = running[target].communicate(timeout=500)
            assert running[target].returncode == 0, errors[-3000:]
            done[target] = json.loads(output)
        return done[target]

    yield report
    for process in running.values():
        if process.poll() is None:
            process.kill()
        process.communicate()


def column(report: dict[str, Any]) -> int:
    """Of the tables, for the Triton that made the report."""
    version = report["triton"].partition("+")[0]
    if version not in VERSIONS:
        pytest.skip(f"nothing was measured with Triton {version}, only with {VERSIONS}")
    return VERSIONS.index(version)


def test_tables_have_every_supported_version() -> None:
    for table in (INSTRUCTIONS, LOCAL):
        for rows in table.values():
            assert {len(row) for row in rows.values()} <= {len(VERSIONS)}


@pytest.mark.parametrize("target", sass.TARGETS)
def test_fused_are_only_the_operations_that_the_source_fuses(
    target: str, reports: Callable[[str], dict[str, Any]]
) -> None:
    for case, facts in reports(target)["cases"].items():
        assert not facts["fast_math"], case
        if target in NVIDIA:
            assert not facts["unrounded"], case
            assert facts["made_fmas"] <= facts["asked_fmas"], case
        else:
            assert facts["made_fmas"] == facts["asked_fmas"], case
    # And this test can tell.
    contracted = reports(target)["contracted"]
    assert contracted["made_fmas"] > contracted["asked_fmas"]


@pytest.mark.parametrize("target", sass.TARGETS)
def test_kernels_neither_widen_nor_flush(
    target: str, reports: Callable[[str], dict[str, Any]]
) -> None:
    for case, facts in reports(target)["cases"].items():
        if target in NVIDIA:
            assert not facts["double"], case
            # (Root and quotient scale what is subnormal on their slow paths.)
            assert not facts["flushes"] or "fast" in case or ROOTS.search(case), case
        else:
            assert facts["stack"] == 0, case


def test_amd_rounds_as_the_source_says(reports: Callable[[str], dict[str, Any]]) -> None:
    """To nearest, subnormals kept, in the mode that a kernel starts in and stays in; and what is
    approximate is the start of a quotient or root that is then made exact."""
    nearest, kept, version = "0", "3", reports("gfx942")["triton"]
    for case, facts in reports("gfx942")["cases"].items():
        assert facts["modes"] == {
            "round_mode_32": nearest,
            "round_mode_16_64": nearest,
            "denorm_mode_32": kept,
            "denorm_mode_16_64": kept,
        }, case
        assert not facts["mode_changes"], case
        if "fast" in case:
            assert facts["inexact"], case
        else:
            # Triton 3.6 makes the root itself, of this and the fma that follow it.
            own = {"v_rsq_f32_e32"} if ROOTS.search(case) and version.startswith("3.6.") else set()
            assert set(facts["inexact"]) == own, case
            assert facts["refined"] == facts["asked_refined"], case
            assert any(facts["refined"]) == bool(ROOTS.search(case)), case


@pytest.mark.parametrize("target", sass.TARGETS)
def test_nothing_is_shared_between_threads(
    target: str, reports: Callable[[str], dict[str, Any]]
) -> None:
    for case, facts in reports(target)["cases"].items():
        assert facts["shared"] == 0, case


@pytest.mark.parametrize("target", sass.TARGETS)
def test_twenty_steps_compile_every_kernel_once(
    target: str, reports: Callable[[str], dict[str, Any]]
) -> None:
    assert reports(target)["twenty steps"] == [
        "_dense_kernel",
        "_fill_kernel",
        "_lowrank_kernel",
        "_momentum_kernel",
    ]


@pytest.mark.parametrize("target", sass.TARGETS)
def test_weights_and_states_move_128_bits_at_a_time(
    target: str, reports: Callable[[str], dict[str, Any]]
) -> None:
    narrow = r"(LDG|STG)\..*[US](8|16)$|(buffer|global)_(load|store)_(u?short|[us]byte)"
    for case, facts in reports(target)["cases"].items():
        if "fast" not in facts:
            continue
        fast = facts["fast"]
        assert fast is not None, f"{case}: no path with all stores in 128 bits"
        # A thread reads a byte of a mask for eight weights.
        bytes_ = [op for op in fast["inside"] if re.match(narrow, op)]
        assert not bytes_ or ("mask" in case and all("LDG" in op or "load" in op for op in bytes_))
        stores = [op for op in fast["inside"] if re.match(r"STG|(buffer|global)_store", op)]
        assert all("128" in op or "x4" in op for op in stores), case


@pytest.mark.parametrize("target", NVIDIA)
def test_registers_suffice(target: str, reports: Callable[[str], dict[str, Any]]) -> None:
    version = column(reports(target))
    for case, facts in reports(target)["cases"].items():
        measured = LOCAL[target][case][version] if case in LOCAL[target] else 0
        assert len(facts["local"]) <= measured, case


@pytest.mark.parametrize("target", NVIDIA)
def test_instructions_an_element(target: str, reports: Callable[[str], dict[str, Any]]) -> None:
    version = column(reports(target))
    for case, row in INSTRUCTIONS[target].items():
        count = reports(target)["cases"][case]["fast"]["per_element"]
        if row[version] == UNKNOWN:
            continue
        assert count <= row[version] + ROUNDING, case
        assert count > 0.5 * row[version], f"{case}: the path that was counted isn't the whole"


def test_the_model_predicts_what_was_published() -> None:
    """Triton's own noise, an element a Philox: 119.4 instructions (mostly arithmetic that runs at
    full rate), 8 bytes; measured 210 G elements/s of float32 on a 132-unit Hopper."""
    fraction, limit = roofline.predict({"LOP3": 59.4, "FFMA": 60.0}, 8, "H100")
    assert limit == "issue"
    assert fraction * 3.0e12 / 8 == pytest.approx(210e9, rel=0.15)
    assert roofline.predict({"FFMA": 4.0}, 4, "H100") == (1.0, "memory")
    # Special functions at an eighth of the rate come first; a 64-bit product takes two slots.
    assert roofline.predict({"MUFU.SIN": 10.0}, 4, "A100")[1] == "special"
    assert roofline.slots({"IMAD.WIDE.U32": 2.0})["multiply"] == 4


if __name__ == "__main__":
    print(json.dumps(report(sys.argv[1])))
