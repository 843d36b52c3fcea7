"""What Triton's compiler makes of the kernels, for NVIDIA and AMD GPUs, on a machine with neither.

Run as a script, this file compiles every kernel for one target and prints what it found as JSON.
The tests start it so, once a target, because Triton can't compile in a process that interprets.
Kernels are compiled by the launchers themselves: only the last step, the launch, is left out.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
NVIDIA = [name for name in TARGETS if name.startswith("sm_")]
DTYPES = ("float16", "bfloat16", "float32")

# ---- the script ---------------------------------------------------------------------------------


class OfflineDriver:
    """As much of a Triton driver as compiling takes."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:
        return "offline"

    def get_current_stream(self, device: str) -> int:
        return 0


def record_kernels(target: str) -> list[Any]:
    """From now on, launching a kernel compiles it for the target and appends it to this list."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(OfflineDriver(GPUTarget(*TARGETS[target])))
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled.append(kernel)
        return kernel

    JITFunction.run = compile_only
    return compiled


def sass(cubin: bytes) -> tuple[list[tuple[int, bool, str, str]], str]:
    """Instructions (address, predicated, opcode, operands) and resource usage of a cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text, usage = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True).stdout
            for option in ("-sass", "-res-usage")
        )
    line = re.compile(
        r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)\s*([^;]*);", re.M
    )
    found = [(int(a, 16), bool(p), op, rest.strip()) for a, p, op, rest in line.findall(text)]
    return [x for x in found if x[2] != "NOP"], usage


def straight_paths(code: list[tuple[int, bool, str, str]]) -> list[list[str]]:
    """Opcodes along every path from the first instruction to an exit, going round no loop."""
    position = {address: i for i, (address, *_) in enumerate(code)}
    paths, unfinished = [], [(0, [])]
    while unfinished:
        i, path = unfinished.pop()
        while i < len(code):
            address, predicated, op, operands = code[i]
            path = [*path, op]
            if op == "EXIT" and not predicated:
                paths.append(path)
                break
            if op.startswith(("BRA", "CALL.REL.NOINC")):  # ptxas may leave a loop by the latter
                conditional = predicated or "," in operands
                target = int(operands.split("0x")[-1].rstrip(" `()"), 16)
                if target > address:
                    if not conditional:
                        i = position[target]
                        continue
                    unfinished.append((position[target], path))
                elif not conditional:
                    break  # back round a loop: some other path leaves it
            i += 1
    return paths


def asked_fmas(llir: str) -> int:
    """Fused multiply-adds that the kernel's source asks for."""
    widths = re.findall(r"call [^\n]*@llvm\.fma\.(?:v(\d+))?f32", llir)
    return sum(int(width or 1) for width in widths)


def facts_of(kernel: Any) -> dict[str, Any]:
    asm = kernel.asm
    facts = {
        "name": kernel.metadata.name,
        "shared": kernel.metadata.shared,
        "asked_fmas": asked_fmas(asm["llir"]),
        "fast_math": re.findall(r"\bf(?:add|mul|sub) (fast|contract|reassoc)\b", asm["llir"]),
    }
    if "amdgcn" in asm:
        text = asm["amdgcn"]
        packed = len(re.findall(r"^\s+v_pk_fma_f32", text, re.M))
        single = len(re.findall(r"^\s+v_(?:fma|mad|fmac|mac)\w*_(?:f32|mix\w+)", text, re.M))
        # Conversion and product in one, with -0 to add. (The mixed instructions round to float32
        # and then to float16, as the source does: github.com/llvm/llvm-project/pull/219723.)
        plain = len(re.findall(r"^\s+v_fma_mix_f32 [^\n]*, neg\(0\)", text, re.M))
        facts["made_fmas"] = single - plain + 2 * packed
        facts["scratch"] = int(re.search(r"ScratchSize: (\d+)", text)[1])
        facts["keeps_subnormals"] = "denorm_mode_32 3" in text
        facts["accesses"] = Counter(re.findall(r"^\s+(?:buffer|global)_(\w+_dwordx4)", text, re.M))
    else:
        code, usage = sass(asm["cubin"])
        ops = [op for _, _, op, _ in code]
        ptx = re.findall(r"\b(?:add|sub|mul|fma)\.[a-z.]*f32(?:x2)?\b", asm["ptx"])
        # ptxas fuses nothing that says `.rn`. Compilers drop what they find twice.
        facts["made_fmas"] = sum(1 + op.endswith("x2") for op in ptx if op.startswith("fma"))
        facts["unrounded"] = [op for op in ptx if ".rn." not in op]
        facts["sass_fmas"] = ops.count("FFMA") + 2 * ops.count("FFMA2")
        facts["flushes"] = [op for op in ops if re.match(r"(FFMA|FMUL|FADD).*FTZ", op)]
        facts["double"] = [op for op in ops if re.match(r"D(ADD|MUL|FMA|SETP|MNMX)|F2F.*F64", op)]
        facts["stack"] = int(re.search(r"STACK:(\d+)", usage)[1])
        facts["local"] = [op for op in ops if op.startswith(("LDL", "STL"))]
        facts["registers"] = int(re.search(r"REG:(\d+)", usage)[1])
        facts["paths"] = [dict(Counter(path)) for path in straight_paths(code)]
    return facts


def compile_all(target: str) -> dict[str, Any]:
    import torch
    from zo_fused_kernels import dense, fill, launch, lowrank

    compiled = record_kernels(target)
    elements = launch.NOISE_BLOCK // (launch.NOISE_WARPS * TARGETS[target][2])

    def take() -> list[Any]:
        kernels = list({id(k): k for k in compiled}.values())
        compiled.clear()
        return kernels

    def dense_(p: Any, directions: int, id_: int = 5, offset: int = 0) -> None:
        keys = torch.zeros(directions, dtype=torch.int64)
        dense.dense_(p, id_, offset, keys, torch.zeros(1, directions), torch.zeros(1), 0)

    def lowrank_(p: Any, rank: int, momentum: bool = False) -> None:
        u, v = torch.zeros(p.shape[0], rank), torch.zeros(p.shape[1], rank)
        if momentum:
            coeffs = torch.zeros(1, 4)
            lowrank.lowrank_momentum_(p, u.clone(), u, v, coeffs, torch.zeros(1), 0)
        else:
            lowrank.lowrank_(p, u, v, torch.zeros(1), torch.zeros(1), 0)

    report: dict[str, Any] = {"elements": elements, "triton": __import__("triton").__version__}
    for name in DTYPES:
        dtype = getattr(torch, name)
        dense_(torch.zeros(1 << 20, dtype=dtype), 1)
        (report[f"dense {name}"],) = map(facts_of, take())
        lowrank_(torch.zeros(64, 64, dtype=dtype), 4)
        (report[f"lowrank {name}"],) = map(facts_of, take())
    half = torch.zeros((1 << 20) + 1, dtype=torch.float16)
    dense_(half[:-1], 2)
    (report["dense float16 two directions"],) = map(facts_of, take())
    dense_(half[1:], 1)
    (report["dense float16 misaligned"],) = map(facts_of, take())
    lowrank_(torch.zeros(64, 64), 2, momentum=True)
    report["momentum"], report["momentum tile"] = map(facts_of, take())
    one = torch.zeros(1, dtype=torch.int64)
    fill.bits_(torch.zeros(9, dtype=torch.int64), 5, 0, one, 0)
    (report["bits"],) = map(facts_of, take())
    fill.normal_(torch.zeros(9), 5, 0, one, 0)
    (report["normal"],) = map(facts_of, take())

    # Arguments that change from step to step, and from parameter to parameter.
    for id_ in (0, 1, 16, -5, 2**62):
        for offset in (0, 8, 16, 2**31, 2**40):
            dense_(half[: 8 * (abs(id_) % 7 + 1)], 1, id_, offset)
    report["dense compilations"] = len(take())
    for shape in ((1, 8), (16, 16), (17, 24), (1 << 12, 1 << 12)):
        lowrank_(torch.zeros(shape, dtype=torch.float16), 4)
    report["lowrank compilations"] = len(take())

    # What the tests would see if contraction were on.
    lowrank.OPTIONS["enable_fp_fusion"] = True
    lowrank_(torch.zeros(64, 64), 2, momentum=True)
    report["contracted"] = facts_of(take()[1])
    return report


# ---- the tests ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reports() -> Iterator[Callable[[str], dict[str, Any]]]:
    """A function: what the script printed for a target. All targets are compiled side by side."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, __file__]
    running = {
        target: subprocess.Popen(
            [*command, target],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for target in TARGETS
    }
    done: dict[str, dict[str, Any]] = {}

    def report(target: str) -> dict[str, Any]:
        if target not in done:
            output, errors = running[target].communicate(timeout=300)
            assert running[target].returncode == 0, errors[-3000:]
            done[target] = json.loads(output)
        return done[target]

    yield report
    for process in running.values():
        if process.poll() is None:
            process.kill()
        process.communicate()


def kernels(report: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for case, facts in report.items():
        if isinstance(facts, dict) and case != "contracted":
            yield case, facts


def narrow(path: dict[str, int]) -> int:
    """Global accesses of less than 32 bits."""
    return sum(n for op, n in path.items() if re.match(r"(LDG|STG)\..*[US](8|16)$", op))


def fast_path(facts: dict[str, Any]) -> dict[str, int]:
    """The path that a block takes that its tensor fills: it stores 128 bits at a time."""
    paths = [p for p in facts["paths"] if p.get("STG.E.128")]
    assert paths, facts["name"]
    return min(paths, key=lambda path: sum(path.values()))


@pytest.mark.parametrize("target", TARGETS)
def test_fused_are_only_the_operations_that_the_source_fuses(
    target: str, reports: Callable[[str], dict[str, Any]]
) -> None:
    report = reports(target)
    for case, facts in kernels(report):
        assert not facts["fast_math"], case
        if target in NVIDIA:
            assert not facts["unrounded"], case
            assert facts["sass_fmas"] <= facts["made_fmas"] <= facts["asked_fmas"], case
        else:
            assert facts["made_fmas"] == facts["asked_fmas"], case
    # And this test can tell.
    contracted = report["contracted"]
    assert contracted["made_fmas"] > contracted["asked_fmas"]
    assert target not in NVIDIA or contracted["sass_fmas"] > contracted["asked_fmas"]


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_neither_spill_nor_flush(
    target: str, reports: Callable[[str], dict[str, Any]]
) -> None:
    for case, facts in kernels(reports(target)):
        if target in NVIDIA:
            assert facts["stack"] == 0, case
            assert not facts["local"], case
            assert not facts["flushes"], case
            assert not facts["double"], case
        else:
            assert facts["scratch"] == 0, case
            assert facts["keeps_subnormals"], case


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_compiled_anew_from_step_to_step(
    target: str, reports: Callable[[str], dict[str, Any]]
) -> None:
    assert reports(target)["dense compilations"] == 1
    assert reports(target)["lowrank compilations"] == 1


@pytest.mark.parametrize("target", TARGETS)
def test_noise_stays_in_registers(target: str, reports: Callable[[str], dict[str, Any]]) -> None:
    for dtype in DTYPES:
        assert reports(target)[f"dense {dtype}"]["shared"] == 0
        assert reports(target)[f"lowrank {dtype}"]["shared"] == 0


@pytest.mark.parametrize("target", NVIDIA)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_move_128_bits_at_a_time(
    dtype: str, target: str, reports: Callable[[str], dict[str, Any]]
) -> None:
    report = reports(target)
    accesses = report["elements"] * (4 if dtype == "float32" else 2) // 16
    for family in ("dense", "lowrank"):
        path = fast_path(report[f"{family} {dtype}"])
        assert path["LDG.E.128"] >= accesses
        assert path["STG.E.128"] == accesses
        assert narrow(path) == 0
        assert sum(n for op, n in path.items() if op.startswith("STG")) == accesses


def test_weights_move_128_bits_at_a_time_on_amd(
    reports: Callable[[str], dict[str, Any]],
) -> None:
    for dtype in DTYPES:
        accesses = reports("gfx942")["elements"] * (4 if dtype == "float32" else 2) // 16
        for family in ("dense", "lowrank"):
            found = reports("gfx942")[f"{family} {dtype}"]["accesses"]
            assert found == {"load_dwordx4": accesses, "store_dwordx4": accesses}


@pytest.mark.parametrize("target", NVIDIA)
def test_instructions_an_element(target: str, reports: Callable[[str], dict[str, Any]]) -> None:
    report = reports(target)
    # An H100 can issue 39.5 an element in the time that its memory takes for one in 16 bits.
    limits = {
        "dense float16": 34.0,
        "dense bfloat16": 34.5,
        "dense float32": 33.0,
        "lowrank float16": 16.0,
        "lowrank bfloat16": 16.5,
        "lowrank float32": 16.5,
    }
    older = 1.5 if report["triton"] < "3.9" else 0  # it splits `x & A | B` all the same
    for case, limit in limits.items():
        per_element = sum(fast_path(report[case]).values()) / report["elements"]
        assert per_element <= limit + older, case
        assert per_element > 0.5 * limit, "the path that was counted isn't the whole of it"


if __name__ == "__main__":
    print(json.dumps(compile_all(sys.argv[1])))
