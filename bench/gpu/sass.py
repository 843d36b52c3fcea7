"""What Triton's compiler makes of the kernels, on a machine with no GPU.

``python -m bench.gpu.sass`` (``make sass``) compiles every kernel for each GPU generation and
prints tables: instructions per element on the path that nearly all elements take, registers, memory
accesses, and the fraction of a GPU's bandwidth that `roofline` predicts from them. ``--json
TARGET`` prints all that was found for one target; the tests read that. Kernels are compiled by the
launchers themselves; only the last step, the launch, is left out.

Run it in a process of its own: Triton can't compile where it interprets.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.gpu import roofline
from bench.gpu.machine_code import Unit, fast_path, parse_gcn, parse_sass
from bench.models import DTYPES
from bench.page import publish

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
NVIDIA = [name for name in TARGETS if name.startswith("sm_")]
RANKS = (1, 2, 4, 8, 16, 32, 64)

# ---- compiling ----------------------------------------------------------------------------------


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


# ---- what was compiled --------------------------------------------------------------------------


def cuobjdump(cubin: bytes, option: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [tool, option, file.name], capture_output=True, text=True, check=True
        ).stdout


def asked(llir: str, what: str) -> int:
    """Operations on float32 that the kernel's source asks for: "fma", "sqrt" or "fdiv"."""
    call = rf"call [^\n]*@llvm\.{what}\.(?:v(\d+))?f32"
    widths = re.findall(r"fdiv (?:<(\d+) x )?float" if what == "fdiv" else call, llir)
    return sum(int(width or 1) for width in widths)


def facts_of(kernel: Any, unit: Unit | None = None) -> dict[str, Any]:
    """All that the table shows and the tests check of a compiled kernel."""
    asm = kernel.asm
    facts: dict[str, Any] = {
        "name": kernel.metadata.name,
        "shared": kernel.metadata.shared,
        "asked_fmas": asked(asm["llir"], "fma"),
        "fast_math": re.findall(
            r"\bf(?:add|mul|sub|div) (?:fast|contract|reassoc|arcp|afn)\b|!fpmath", asm["llir"]
        ),
    }
    if "amdgcn" in asm:
        text = asm["amdgcn"]
        code = parse_gcn(text)
        packed = len(re.findall(r"^\s+v_pk_fma_f32", text, re.M))
        single = len(re.findall(r"^\s+v_(?:fma|mad|fmac|mac)\w*_(?:f32|mix\w+)", text, re.M))
        # Conversion and product in one, with -0 to add. (The mixed instructions round to float32
        # and then to float16, as the source does: github.com/llvm/llvm-project/pull/219723.)
        plain = len(re.findall(r"^\s+v_fma_mix_f32 [^\n]*, neg\(0\)", text, re.M))
        facts["made_fmas"] = single - plain + 2 * packed
        # A correctly rounded quotient and root begin with an approximation. Two steps of Newton and
        # the remainder take five fma, the neighbours of a root two.
        quotients, roots = asked(asm["llir"], "fdiv"), asked(asm["llir"], "sqrt")
        facts["asked_fmas"] += 5 * quotients + 2 * roots
        names = [step.opcode for step in code]
        made = {
            "v_div_fixup_f32": quotients,
            "v_div_fmas_f32": quotients,
            "v_rcp_f32": quotients,
            "v_sqrt_f32": roots,
        }
        facts["refined"] = [sum(op.startswith(name) for op in names) for name in made]
        facts["asked_refined"] = list(made.values())
        # Approximations, conversions that cut, products of a number and zero that are always zero,
        # sums of products that flush; all of them but what is refined.
        inexact = r"v_((exp|log|sin|cos|rsq)_|cvt_pkrtz|\w*legacy|mad_f|mac_f)"
        facts["inexact"] = [op for op in names if re.match(inexact, op)]
        facts["modes"] = dict(re.findall(r"\.amdhsa_float_(\w+)\s+(\d)", text))
        facts["mode_changes"] = [op for op in names if re.match(r"s_(setreg|round|denorm)", op)]
        facts["stack"] = int(re.search(r"ScratchSize: (\d+)", text)[1])  # type: ignore[index]
        facts["registers"] = int(re.search(r"NumVgprs: (\d+)", text)[1])  # type: ignore[index]
    else:
        code = parse_sass(cuobjdump(asm["cubin"], "-sass"))
        usage = cuobjdump(asm["cubin"], "-res-usage")
        ops = [step.opcode for step in code]
        ptx = re.findall(r"\b(?:add|sub|mul|fma)\.[a-z.]*f32(?:x2)?\b", asm["ptx"])
        # ptxas fuses nothing that says `.rn` (PTX ISA). Compilers drop what they find twice.
        facts["made_fmas"] = sum(1 + op.endswith("x2") for op in ptx if op.startswith("fma"))
        facts["unrounded"] = [op for op in ptx if ".rn" not in op]
        facts["flushes"] = [op for op in ops if re.match(r"(FFMA|FMUL|FADD).*FTZ", op)]
        facts["double"] = [op for op in ops if re.match(r"D(ADD|MUL|FMA|SETP|MNMX)|F2F.*F64", op)]
        facts["stack"] = int(re.search(r"STACK:(\d+)", usage)[1])  # type: ignore[index]
        facts["local"] = [op for op in ops if op.startswith(("LDL", "STL"))]
        facts["registers"] = int(re.search(r"REG:(\d+)", usage)[1])  # type: ignore[index]
    if unit is not None:
        facts["bytes"] = unit.bytes
        facts["fast"] = fast_path(code, unit)
    return facts


# ---- the cases ----------------------------------------------------------------------------------


class Case(NamedTuple):
    name: str
    run: Callable[[], None]
    unit: Unit | None  # None: no path is counted


class FakeLaunch(NamedTuple):
    """What launchers read of a `zo_fused.sweeps.backends.table.Launch`."""

    dtype: torch.dtype
    state_dtypes: tuple[torch.dtype, ...] = ()
    rank: int = 0
    programs: int = 7
    rows: int = 3

    @property
    def chunk(self) -> int:
        """Of large models."""
        from zo_fused_kernels import launch

        return launch.CHUNK

    @property
    def table(self) -> torch.Tensor:
        return torch.zeros(self.rows, 12, dtype=torch.int64)


def cases(target: str) -> Iterator[Case]:
    """Every kernel in the forms that users meet."""
    from zo_fused_kernels import launch, sweeps

    warp = TARGETS[target][2]
    keys = torch.zeros(3, dtype=torch.int64)
    key, one = keys[:1], torch.zeros(1)

    def noise_unit(block: int, *dtypes: torch.dtype, read_only: bool = False) -> Unit:
        """read_only: only the first of the dtypes is written. (The bits of masks don't count.)"""
        elements = block // (launch.NOISE_WARPS * warp)
        width = sum(dtype.itemsize for dtype in dtypes)
        written = dtypes[0].itemsize if read_only else width
        return Unit(elements, elements * written // 16, launch.CHUNK // block, width + written)

    def dense(dtype: torch.dtype, directions: int, rounding: bool, transform: str) -> None:
        sweeps.dense(
            FakeLaunch(dtype), keys[:directions], torch.zeros(1, directions), one,
            key if rounding else None, transform,
        )  # fmt: skip

    def moments(
        dtype: torch.dtype, rule: str, states: tuple[torch.dtype, ...], transform: str = "portable"
    ) -> None:
        scalars = (torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 6), one)
        sweeps.moments(FakeLaunch(dtype, states), key, *scalars, rule, None, transform, None)

    def squares(dtype: torch.dtype) -> None:
        table = torch.zeros(1, 3)
        scalars = (table, table, torch.zeros(1, 6), one)
        sweeps.moments(FakeLaunch(dtype), keys, *scalars, "adam", None, "portable", table)

    def shaped(dtype: torch.dtype, shape: torch.dtype, transform: str) -> None:
        launch = FakeLaunch(dtype, (shape,))
        sweeps.shaped(launch, key, torch.zeros(1, 1), one, None, transform)

    def hizoo(dtype: torch.dtype) -> None:
        row, launch = torch.zeros(1, 1), FakeLaunch(dtype, (torch.float32,))
        scalars = (row, row, torch.zeros(1, 6), one)
        sweeps.moments(launch, key, *scalars, "hizoo", None, "portable", row)

    def lowrank(dtype: torch.dtype, rank: int, rounding: bool = False) -> None:
        sweeps.lowrank(FakeLaunch(dtype, rank=rank), one, one, key if rounding else None)

    def lowrank_unit(dtype: torch.dtype, rank: int) -> Unit | None:
        if warp == 64 and rank > launch.HELD_RANK:
            return None  # AMD's compiler unrolls the loop over ranks as it likes
        elements = launch.GROUP * launch.TILE[1] // (2 * dtype.itemsize * warp)
        # Factors that don't stay in registers stream by in a loop, after their first part.
        trips = 1 if rank <= launch.HELD_RANK else rank // math.gcd(rank, 4) - 1
        in_program = launch.TILE[0] // launch.GROUP
        return Unit(
            elements, elements * dtype.itemsize // 16, in_program, 2 * dtype.itemsize, trips
        )

    for name, dtype in DTYPES.items():
        for label, options in (
            ("dense", (1, False, "portable")),
            ("dense, 2 directions", (2, False, "portable")),
            ("dense, any directions", (3, False, "portable")),
            ("dense, stochastic", (1, True, "portable")),
            ("dense, signs", (1, False, "signs")),
            ("dense, hadamard", (1, False, "hadamard")),
            ("dense, hadamard, 2 directions", (2, False, "hadamard")),
            ("dense, fast", (1, False, "fast")),
        ):
            yield Case(
                f"{label} {name}",
                lambda dtype=dtype, options=options: dense(dtype, *options),  # type: ignore[misc]
                # No path tells how often the loop over any number of directions runs.
                None
                if "any" in label
                else noise_unit(launch.noise_block(options[0], dtype.itemsize, options[2]), dtype),
            )
        for rule, states in (
            ("momentum", (torch.float32,)),
            ("momentum", (dtype,)),
            ("adam", (torch.float32, torch.float32)),
            ("sign", ()),
        ):
            kept = f", m {next(n for n, d in DTYPES.items() if d == states[0])}" if states else ""
            if rule == "momentum" and name == "fp32" and states == (dtype,):
                continue
            if rule == "momentum" and states == (torch.float32,):
                yield Case(
                    f"moments, {rule}{kept}, hadamard {name}",
                    lambda dtype=dtype, states=states: moments(  # type: ignore[misc]
                        dtype, "momentum", states, "hadamard"
                    ),
                    noise_unit(launch.moments_block("hadamard"), dtype, *states),
                )
            yield Case(
                f"moments, {rule}{kept} {name}",
                lambda dtype=dtype, rule=rule, states=states: moments(dtype, rule, states),  # type: ignore[misc]
                noise_unit(launch.MOMENTS_BLOCK, dtype, *states),
            )
        for label, shape, transform in (
            ("mask", torch.uint8, "portable"),
            ("mask, hadamard", torch.uint8, "hadamard"),
            ("scale", torch.float32, "portable"),
        ):
            # The loop over directions is taken once, here and where most sweeps have one.
            yield Case(
                f"shaped, {label} {name}",
                lambda dtype=dtype, shape=shape, transform=transform: shaped(  # type: ignore[misc]
                    dtype, shape, transform
                ),
                noise_unit(
                    launch.moments_block(transform),
                    dtype,
                    *([shape] if shape == torch.float32 else []),
                    read_only=True,
                ),
            )
        yield Case(f"moments, hizoo {name}", lambda dtype=dtype: hizoo(dtype), None)  # type: ignore[misc]
        yield Case(f"moments, adam of squares {name}", lambda dtype=dtype: squares(dtype), None)  # type: ignore[misc]
        for rank in RANKS:
            yield Case(
                f"low-rank r={rank} {name}",
                lambda dtype=dtype, rank=rank: lowrank(dtype, rank),  # type: ignore[misc]
                lowrank_unit(dtype, rank),
            )
    half = torch.float16
    yield Case("low-rank, stochastic r=4 fp16", lambda: lowrank(half, 4, True), None)
    for label, dtype, rounding in (
        ("script fp16", half, -1),
        ("script fp32", torch.float32, -1),
        ("script, stochastic fp16", half, 0),
    ):
        script = torch.tensor([[0, -1, rounding]])
        yield Case(
            label,
            lambda dtype=dtype, script=script: sweeps.dense_steps(  # type: ignore[misc]
                FakeLaunch(dtype), key, script, torch.zeros(1, 1, 2), torch.zeros(1, 1), "portable"
            ),
            None,
        )
    yield Case(
        "momentum of factors",
        lambda: sweeps.factor_momentum(FakeLaunch(torch.float32, (torch.float32,)), one, one),
        None,
    )
    yield Case("normals", lambda: sweeps.normal(FakeLaunch(torch.float32), key, "portable"), None)
    yield Case("words", lambda: sweeps.bits(FakeLaunch(torch.int64), key), None)


def examine(
    target: str, compiled: list[Any], wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, Any]:
    """What was found for the cases whose names are wanted; compiled: from `record_kernels`."""
    found: dict[str, Any] = {}
    for case in cases(target):
        if wanted(case.name):
            case.run()
            found[case.name] = facts_of(compiled.pop(), case.unit)
    return found


# ---- tables -------------------------------------------------------------------------------------


def reports(targets: list[str], wanted: str = "") -> dict[str, dict[str, Any]]:
    """`examine` for several targets, each in a process of its own, two at a time."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}

    def report(target: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "bench.gpu.sass", "--json", target, "--only", wanted]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{target}: {done.stderr[-3000:]}")
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(targets, pool.map(report, targets), strict=True))


def tables(found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Markdown: instructions and registers by target, then predicted fractions of copy by GPU."""
    names = [name for name, facts in next(iter(found.values())).items() if facts.get("fast")]
    yield f"`make sass`, Triton {version('triton')}\n"
    yield "Instructions per element / registers (s: shared memory, L4: four local accesses)\n"
    yield "| sweep | " + " | ".join(found) + " |"
    yield "|---|" + "---|" * len(found)
    for name in names:
        cells = []
        for target in found:
            facts = found[target][name]
            local = len(facts.get("local", []))
            marks = " s" * bool(facts["shared"]) + f" L{local}" * bool(local)
            count = "not counted"
            if "fast" in facts:
                fast = facts["fast"]
                count = f"{fast['per_element']:.1f}" if fast else "no 128-bit path"
            cells.append(f"{count} / {facts['registers']}{marks}")
        yield f"| {name} | " + " | ".join(cells) + " |"
    gpus = {name: gpu for name, gpu in roofline.GPUS.items() if gpu.target in found}
    yield "\nPredicted fraction of copy bandwidth, and what limits it where that is not memory\n"
    yield "| sweep | " + " | ".join(gpus) + " |"
    yield "|---|" + "---|" * len(gpus)
    for name in names:
        cells = []
        for gpu, model in gpus.items():
            facts = found[model.target][name]
            if not facts.get("fast"):
                cells.append("")
                continue
            fraction, limit = roofline.predict(facts["fast"]["mix"], facts["bytes"], gpu)
            cells.append(f"{fraction:.2f}" + (f" {limit}" if limit != "memory" else ""))
        yield f"| {name} | " + " | ".join(cells) + " |"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("targets", nargs="*", default=list(TARGETS), help="default: all")
    parser.add_argument(
        "--json", metavar="TARGET", choices=TARGETS, help="print JSON for one target"
    )
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    options = parser.parse_args()
    if options.json:
        compiled = record_kernels(options.json)
        print(json.dumps(examine(options.json, compiled, lambda name: options.only in name)))
        return
    publish(tables(reports(options.targets, options.only)), options.out)


if __name__ == "__main__":
    main()
