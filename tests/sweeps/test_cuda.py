"""What only the CUDA backend has: its choice, transforms, launches, parameters too large to exist;
nvcc's code for its kernels has the shape it should have; the extension builds.

Kernels are emulated on the CPU, or run on a GPU if there is one. `test_parity.py` compares its
sweeps with the reference.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import mmap
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from support.calls import (
    DTYPES,
    ID,
    KEYS,
    ROUNDING,
    Place,
    check,
    dense,
    int64,
    lowrank,
    places,
    random,
    streams,
)
from support.equality import assert_same_bits
from support.served import Served, serve
from torch import Tensor

from zo_fused.sweeps import dispatch, reference
from zo_fused.sweeps.backends import cuda, table
from zo_fused.sweeps.numbers import TRANSFORMS

ROOT = Path(__file__).parents[2]
CHUNK = 1 << 15


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return serve(request.param, tmp_path_factory)


# ---- the backend --------------------------------------------------------------------------------


def test_backend_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "NVIDIA" in str(dispatch.why_not("cuda", "cpu"))
    missing = ModuleNotFoundError("it is missing", name="zo_fused._CUDA")
    monkeypatch.setattr(cuda, "import_error", missing)
    assert "_CUDA is not built (it is missing)" in str(cuda.why_not("cuda"))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "NVIDIA" in str(cuda.why_not("cuda"))


def test_backend_says_that_a_gpu_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "import_error", None)
    monkeypatch.setattr(cuda, "architectures", lambda: [(8, 0), (9, 0)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, expected in (((7, 5), "this one has 7.5"), ((12, 0), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda c=capability: c)
        reason = cuda.why_not("cuda")
        assert reason is None if expected is None else expected in str(reason)


def test_backend_comes_behind_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    served = {"cuda", "reference"}
    monkeypatch.setattr(dispatch, "why_not", lambda name, _: None if name in served else "broken")
    dispatch.select.cache_clear()
    try:
        assert dispatch.backend_of("cuda") == "cuda"
        served.add("triton")
        dispatch.select.cache_clear()
        assert dispatch.backend_of("cuda") == "triton"
    finally:
        dispatch.select.cache_clear()


def test_sizes(served: Served) -> None:
    assert served.kernels.CHUNK == CHUNK
    assert served.kernels.TILE == (64, 256)


# ---- transforms ---------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [-1, len(TRANSFORMS)])
def test_operators_refuse_transforms_that_they_lack(served: Served, number: int) -> None:
    out = torch.zeros(5, device=served.device)
    rows = table.noise_rows([out], [ID], [0], (), CHUNK)
    (launch,) = table.launches(rows, served.device)
    keys, one = int64(KEYS[0]).to(served.device), torch.ones(1, device=served.device)
    operators, noise = served.operators, (launch.table, launch.programs)
    for call in (
        lambda: operators.normal(*noise, keys, number, 0),
        lambda: operators.dense(*noise, 2, keys, one, one, None, number, 0),
        lambda: operators.moments(
            *(*noise, 2, 0, keys, one, one, torch.ones(6), one, 0, None, number, None, 0)
        ),
    ):
        with pytest.raises(RuntimeError, match="no transform number"):
            call()
    assert not out.any()


def test_fast_is_close_to_portable(served: Served) -> None:
    sizes = (3 * CHUNK + 1, 100)
    where = streams(Place((n,), torch.float32, 3) for n in sizes)
    made = {}
    for transform in ("portable", "fast"):
        outs = [torch.zeros(n, device=served.device) for n in sizes]
        keys = int64(*KEYS[:2]).to(served.device)
        served.sweeps.normal_(outs, **where, keys=keys, transform=transform)
        made[transform] = torch.cat(outs).cpu()
    portable, fast = made["portable"], made["fast"]
    error = (fast - portable).abs()
    assert error[portable.abs() > 0.05].max() < 3e-5
    assert error.max() < 1e-3  # near u = 1 the root magnifies the error of the logarithm


@pytest.mark.parametrize("directions", [1, 2])
def test_fast_sweeps_add_fast_normals(served: Served, directions: int) -> None:
    n, device = 1000, served.device
    where = streams([Place((n,), torch.float32, 5)])
    normals = [torch.zeros(n, device=device) for _ in range(directions)]
    keys = int64(*KEYS[:directions]).to(device)
    for k, z in enumerate(normals):
        served.sweeps.normal_([z], **where, keys=keys[k : k + 1], transform="fast")
    one = torch.ones(1, device=device)
    only_last = torch.zeros(1, directions, device=device)
    only_last[0, -1] = 1
    rest = {"keys": keys, "decay": one, "transform": "fast"}
    got = torch.zeros(n, device=device)
    served.sweeps.dense_([got], **where, coeffs=only_last, **rest)
    assert_same_bits(got + 0.0, normals[-1] + 0.0)
    got = torch.zeros(n, device=device)
    coeffs = torch.tensor([[0.0, 1, 0, 0, 0, 1]], device=device)
    zeros = torch.zeros_like(only_last)
    rest |= {"grads": only_last, "restores": zeros, "coeffs": coeffs, "rule": "momentum"}
    served.sweeps.moments_([got], [], [], **where, **rest)
    assert_same_bits(got + 0.0, normals[-1] + 0.0)


# ---- launches -----------------------------------------------------------------------------------


def test_one_launch_for_each_dtype(served: Served) -> None:
    if served.launches is None:
        pytest.skip("launches are counted under emulation")
    before = served.launches()
    check(served, dense(places((9, 0, 100, 8, 5), dtypes=DTYPES[:1])))
    assert served.launches() - before == 1
    check(served, dense(places((9, 0, 100, 8, 5))))
    assert served.launches() - before == 4
    check(served, lowrank(places(((5, 8),) * 3, dtypes=DTYPES[:1]), 2, momentum=True))
    assert served.launches() - before == 7  # the factors twice, the weights
    check(served, dense(places((0,))))
    assert served.launches() - before == 7


def test_more_programs_than_blocks(served: Served) -> None:
    shapes = ((3, 9), (1, 256 * 2100 + 5), (9, 8))
    check(served, lowrank(places(shapes, (0,), (0,), DTYPES[:1]), 1))


@pytest.mark.parametrize("places", [3 * 132, 2 * 132, 3 * 148, 1])
def test_grids_are_whole_waves(served: Served, places: int) -> None:
    if served.blocks_of is None:
        pytest.skip("told under emulation")
    for programs in (1, places, places + 1, 3815, 17 * places, 400_000):
        blocks = served.blocks_of(programs, places)
        assert blocks == programs or blocks % places == 0
        rounds = -(-programs // blocks) * -(-blocks // places)
        assert rounds <= 1.05 * -(-programs // places)


def at_end_of_memory(x: Tensor) -> Tensor:
    """A copy that ends where the memory of the process does: reading behind it kills it."""
    page = mmap.PAGESIZE
    size = -(-x.nbytes // page) * page
    memory = mmap.mmap(-1, size + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + size), ctypes.c_size_t(page), 0) == 0
    copy = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=size - x.nbytes)
    return copy.view(x.shape).copy_(x)


@pytest.mark.parametrize("rank", [1, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_nothing_behind_a_tensor(served: Served, dtype: torch.dtype, rank: int) -> None:
    if served.device.type != "cpu":
        pytest.skip("compute-sanitizer tells on a GPU")
    one = torch.ones(1)
    for shape in ((5, 7), (9, 24), (3, 300)):
        p, first = (at_end_of_memory(random(*shape, dtype=dtype)) for _ in range(2))
        u, v = (at_end_of_memory(random(n, rank)) for n in shape)
        served.sweeps.lowrank_([p], [u], [v], one, one)
        rest = {"keys": int64(1), "decay": one}
        served.sweeps.dense_([p], **streams([Place(shape, dtype, 3)]), coeffs=one[None], **rest)
        rest |= {"grads": one[None], "restores": one[None], "coeffs": torch.ones(1, 6)}
        served.sweeps.moments_(
            [p], [first], [], **streams([Place(shape, dtype)]), rule="sign", **rest
        )


# ---- beyond 32 bits -----------------------------------------------------------------------------
# Parameters too large to exist. A row whose first program has a negative number makes a launch
# begin in the middle of it, and there is memory.


def row(**cells: int) -> Tensor:
    numbers = [0] * table.WIDTH
    for name, value in cells.items():
        numbers[getattr(table, name)] = value
    return int64(*numbers)[None]


@pytest.mark.parametrize("shift", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_beyond_32_bits(served: Served, dtype: torch.dtype, shift: int) -> None:
    offset, program = 2**34 + 3 * CHUNK + shift, 2**33 // CHUNK + 1
    inside = program * CHUNK - shift  # index in the tensor of what the program begins with
    start = offset + inside
    wanted = random(CHUNK, dtype=dtype)
    memory = wanted.to(served.device, copy=True)
    rows = row(
        FIRST=-program,
        ADDRESS=memory.data_ptr() - inside * memory.element_size(),
        ID=ID,
        OFFSET=offset,
        ALIGNED=1,
        NUMEL=2**35,
    )
    launch = table.Launch(rows.to(served.device), 1, dtype, ())
    keys, coeffs, decay = int64(KEYS[0]), torch.tensor([[0.3]]), torch.tensor([0.9])
    args = [x.to(served.device) for x in (keys, coeffs, decay, ROUNDING)]
    served.kernels.dense(launch, *args, "portable")
    reference.dense_([wanted], int64(ID), int64(start), keys, coeffs, decay, ROUNDING)
    assert_same_bits(memory, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [4, 5])
def test_lowrank_beyond_32_bits(served: Served, rank: int, dtype: torch.dtype) -> None:
    columns, top, offset = 512, 64 * (2**18 + 1), 2**34 + 3
    wanted = random(64, columns, dtype=dtype)
    u, v = random(64, rank, seed=1), random(columns, rank, seed=2)
    memory, us, vs = (x.to(served.device, copy=True) for x in (wanted, u, v))
    rows = row(
        FIRST=-(top // 64 * columns // 256),
        ADDRESS=memory.data_ptr() - top * columns * memory.element_size(),
        ID=ID,
        OFFSET=offset,
        ALIGNED=1,
        ROWS=2 * top,
        COLUMNS=columns,
        RANK=rank,
        U=us.data_ptr() - top * rank * 4,
        V=vs.data_ptr(),
    )
    launch = table.Launch(rows.to(served.device), columns // 256, dtype, (), rank)
    coeffs, decay = torch.tensor([0.3]), torch.tensor([0.9])
    served.kernels.lowrank(launch, *(x.to(served.device) for x in (coeffs, decay, ROUNDING)))
    start = int64(offset + top * columns)
    reference.lowrank_([wanted], [u], [v], coeffs, decay, int64(ID), start, ROUNDING)
    assert_same_bits(memory, wanted)


# ---- what nvcc makes of the kernels -------------------------------------------------------------

ARCHITECTURES = ("8.0", "9.0", "10.0")
BUILD = """
import runpy, sys
from setuptools import setup

build = runpy.run_path("setup.py", run_name="build")
options = build["native"]()
options["ext_modules"] = [e for e in options["ext_modules"] if e.name == build["CUDA"]]
words = ["-q", "build_ext", "--build-lib", sys.argv[1], "--build-temp", sys.argv[1] + "/objects"]
setup(packages=[], long_description="none", script_args=words, **options)
"""


@functools.cache
def tool(name: str) -> str | None:
    """Path of a tool of the CUDA toolkit; Triton brings some."""
    triton = importlib.util.find_spec("triton")
    folder = Path(triton.origin or "").parent / "backends/nvidia/bin" if triton else None
    return shutil.which(name) or (shutil.which(name, path=folder) if folder else None)


@dataclass
class Code:
    """A kernel as it was compiled for one architecture."""

    ops: list[str]
    loop: list[str]  # the innermost loop that has the 128-bit store
    registers: int
    stack: int


def loop_with_store(code: list[tuple[int, str, str]]) -> list[str]:
    position = {address: i for i, (address, *_) in enumerate(code)}
    stores = [i for i, (_, op, _) in enumerate(code) if op.startswith("STG.E.128")]
    loops = []
    for i, (address, op, operands) in enumerate(code):
        found = re.findall(r"0x([0-9a-f]+)", operands) if op.startswith("BRA") else []
        start = position.get(int(found[-1], 16), i) if found else i
        if found and int(found[-1], 16) < address and any(start <= s <= i for s in stores):
            loops.append((i - start, start, i))
    if not loops:
        return []
    _, start, end = min(loops)
    return [op for _, op, _ in code[start : end + 1]]


def disassemble(library: Path, architecture: str) -> dict[str, Code]:
    sm = "sm_" + architecture.replace(".", "")
    cuobjdump = str(tool("cuobjdump"))

    def parts(option: str, name: str) -> list[str]:
        command = [cuobjdump, "-arch", sm, option, str(library)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return re.split(name, text)[1:]

    line = re.compile(
        r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)\s*([^;]*);", re.M
    )
    sass, usage = parts("-sass", r"Function : (\S+)"), parts("-res-usage", r"Function (\S+):")
    used = dict(zip(usage[::2], usage[1::2], strict=True))
    kernels = {}
    for name, text in zip(sass[::2], sass[1::2], strict=True):
        code = [(int(address, 16), op, rest) for address, op, rest in line.findall(text)]
        numbers = re.search(r"REG:(\d+) STACK:(\d+)", used[name])
        assert numbers is not None
        loop = loop_with_store(code)
        kernels[name] = Code([op for _, op, _ in code], loop, int(numbers[1]), int(numbers[2]))
    return kernels


@pytest.fixture(scope="module")
def extension(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """zo_fused._CUDA, built by setup.py with nvcc's warnings as errors."""
    if tool("nvcc") is None:
        pytest.skip("no nvcc")
    folder = tmp_path_factory.mktemp("extension")
    env = {
        **os.environ,
        "ZO_FUSED_NATIVE": "cuda",
        "TORCH_CUDA_ARCH_LIST": " ".join(ARCHITECTURES),
        "NVCC_APPEND_FLAGS": "-Werror all-warnings -Xcompiler=-Werror",
    }
    command = [sys.executable, "-c", BUILD, str(folder)]
    run = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    (library,) = (folder / "zo_fused").glob("_CUDA*")
    return library


@pytest.mark.slow  # nvcc
def test_extension_builds_and_imports(extension: Path) -> None:
    """Against any torch, and it needs no CUDA library of torch's."""
    code = f"""
import importlib.util, torch
spec = importlib.util.spec_from_file_location("zo_fused._CUDA", {str(extension)!r})
spec.loader.exec_module(importlib.util.module_from_spec(spec))
from zo_fused.sweeps.backends import cuda
print(cuda.architectures())
kernels = cuda.CudaKernels(torch.ops.zo_fused_CUDA)
print(kernels.CHUNK, kernels.TILE)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.splitlines() == ["[(8, 0), (9, 0), (10, 0)]", "32768 (64, 256)"], run.stderr


def by(transform: str) -> str:
    """A transform in the name of a kernel."""
    return f"LNS_9TransformE{cuda.TRANSFORMS.index(transform)}E"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.slow  # nvcc
def test_machine_code(extension: Path, architecture: str) -> None:
    if tool("cuobjdump") is None:
        pytest.skip("no cuobjdump")
    kernels = disassemble(extension, architecture)
    assert len(kernels) == 89
    # Local memory is where registers are spilled; generic accesses cost more than global ones.
    bad = re.compile(r"LDL|STL|(LD|ST)\.E|D(ADD|MUL|FMA|SETP|MNMX)|[FI]2F\S*F64|LDS|STS|BAR")
    for name, code in kernels.items():
        assert code.stack == 0, name
        assert not list(filter(bad.match, code.ops)), name
        if "10stream_key" in name:
            continue
        assert "STG.E.128" in code.ops, name
        assert "LDG.E.128" in code.ops or "4bits" in name or "6normal" in name, name
        assert code.registers <= (80 if "5dense" in name else 128), name
    # Instructions per element, in the loop that a thread's whole groups go through.
    for part, most in (
        (f"denseINS_4HalfELb1ELb0E{by('portable')}", 34),
        (f"denseINS_8BFloat16ELb1ELb0E{by('portable')}", 34),
        (f"denseIfLb1ELb0E{by('portable')}", 34),
        (f"denseINS_4HalfELb1ELb0E{by('signs')}", 14),
        (f"denseIfLb1ELb0E{by('signs')}", 12.5),
        (f"denseINS_4HalfELb1ELb0E{by('hadamard')}", 24.5),
        (f"denseIfLb1ELb0E{by('hadamard')}", 23.5),
        (f"denseINS_4HalfELb1ELb0E{by('fast')}", 24),
        ("lowrankINS_4HalfELi4ELb0E", 11),
        ("lowrankINS_4HalfELi8ELb0E", 18),
    ):
        (code,) = [code for name, code in kernels.items() if part in name]
        elements = code.loop.count("STG.E.128") * (4 if "If" in part else 8)
        assert 0 < len(code.loop) <= most * elements, (part, len(code.loop), elements)
