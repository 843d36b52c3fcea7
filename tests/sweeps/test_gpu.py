"""What only a GPU can show: the same bits as on the CPU, CUDA graphs, streams, launches, memory."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.equality import same_bits
from torch import Tensor, nn

import zo_fused
from bench.gpu import sanitize
from bench.gpu.steps import launches
from bench.gpu.sweep_cases import FAMILIES
from zo_fused import noise
from zo_fused.sweeps import dispatch
from zo_fused.sweeps.conversions import int64_tensor

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

CPU = torch.device("cpu")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
KEYS = [noise.derive_key(3, noise.Purpose.DENSE, step) for step in range(8)]
ROUNDING = noise.derive_key(3, noise.Purpose.ROUNDING)


@pytest.fixture(params=["triton", "cuda"])
def backend(request: pytest.FixtureRequest, use_backend: Callable[[str | None], None]) -> str:
    """A GPU backend, in force. One that can't serve is a failure where a GPU is required."""
    known = request.param in dispatch.BACKENDS
    reason = dispatch.why_not(request.param, "cuda") if known else "no such backend"
    if reason is not None:
        required = request.config.getoption("--require-gpu")
        (pytest.fail if required else pytest.skip)(reason)
    use_backend(request.param)
    backend: str = request.param
    return backend


def weights(
    *shape: int, dtype: torch.dtype = torch.float16, seed: int = 0, device: torch.device = CPU
) -> Tensor:
    """The same numbers on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).mul(0.02).to(dtype).to(device)


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Raises where the host would wait for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- the same bits ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "dtype"),
    [(f, dtype) for f in FAMILIES for dtype in DTYPES if f != "fill" or dtype == torch.float32],
)
def test_every_operator_equals_the_reference(
    backend: str, device: torch.device, family: str, dtype: torch.dtype
) -> None:
    """All operators, ranks, rules, roundings, odd sizes, offsets, alignments."""
    no_weights = [torch.zeros(0)]  # fills and factors are float32
    cases = [
        case
        for case in FAMILIES[family]()
        if case.arguments.get("params", no_weights)[0].dtype == dtype
    ]
    assert cases
    found = []
    for case in cases:
        found += sanitize.differences(case, backend, device, misalignments=(0, 1, 3))
    assert found == []


def test_functions_give_the_same_bits_as_on_the_cpu(backend: str, device: torch.device) -> None:
    shapes = ((33, 70), (129,), (4, 3, 5))

    def run(device: torch.device) -> list[Tensor]:
        params = [weights(*s, dtype=t, device=device) for s in shapes for t in DTYPES]
        firsts = [torch.zeros_like(p, dtype=torch.float32) for p in params]
        seconds = [torch.zeros_like(p, dtype=torch.float32) for p in params]
        sides = [(s[0], torch.Size(s[1:]).numel()) for s in shapes for _ in DTYPES]
        factors = [torch.zeros(m, 2, device=device) for m, _ in sides]
        zo_fused.perturb_(params, KEYS[0], 1e-3)
        zo_fused.update_(params, KEYS[:3], [1e-3, -2e-3, 3e-3], 0.99, rounding_key=ROUNDING)
        zo_fused.moments_update_(
            params, KEYS[:1], [0.7], "adam", -1e-3,
            firsts=firsts, seconds=seconds, beta=0.9, gain=0.1, beta2=0.99, gain2=0.01, eps=1e-6,
        )  # fmt: skip
        zo_fused.lowrank_perturb_(params, KEYS[3], KEYS[4], 1e-3, rank=2)
        zo_fused.lowrank_update_(
            params, KEYS[3], KEYS[4], -1e-3, 0.99, rank=5, rounding_key=ROUNDING
        )
        zo_fused.lowrank_momentum_(
            params, factors, KEYS[3], KEYS[4], 0.5, 1e-3, 0.9, restore=1e-3, rank=2
        )
        return [*params, *firsts, *seconds, *factors]

    got = run(device)
    zo_fused.set_backend(None)
    wanted = run(CPU)
    assert [
        i for i, (g, w) in enumerate(zip(got, wanted, strict=True)) if not same_bits(g, w)
    ] == []


def test_signs_are_fair(backend: str, device: torch.device) -> None:
    n = 1 << 24
    z = noise.normal(n, KEYS[0], device=device, transform="signs").double()
    assert z.abs().eq(1).all()
    for lag in range(5):
        product = z if lag == 0 else z[lag:] * z[:-lag]
        assert abs(float(product.mean())) < 5 / n**0.5


@pytest.mark.parametrize("transform", ["portable", "fast"])
def test_normals_are_normal(backend: str, device: torch.device, transform: str) -> None:
    n = 1 << 24
    z = noise.normal(n, KEYS[0], device=device, transform=transform).double()
    # Standard errors of the moments of n normals: 1, sqrt(2), sqrt(15), sqrt(96) over sqrt(n).
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((z**power).mean()) - moment) < 5 * (variance / n) ** 0.5


def model(device: torch.device, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)  # made on the CPU: the same numbers everywhere
    made = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 40), nn.LayerNorm(40))
    return made.to(device, dtype)


def in_blocks(tuned: nn.Module) -> list[dict[str, Any]]:
    named = list(tuned.named_parameters())
    return [{"params": named[:2], "block": 0}, {"params": named[2:], "block": 1}]


METHODS: dict[str, Callable[..., Any]] = {
    "MeZO": zo_fused.MeZO,
    "LOZO": lambda m, **kw: zo_fused.LOZO(m, rank=3, interval=2, **kw),
    "LOZO-M": lambda m, **kw: zo_fused.LOZO(m, rank=3, interval=2, momentum=0.9, **kw),
    "ZOAdam": zo_fused.ZOAdam,
    "queries, Rademacher": lambda m, **kw: zo_fused.MeZO(
        m, queries=3, distribution="rademacher", **kw
    ),
    "LOZO, queries, deferred": lambda m, **kw: zo_fused.LOZO(
        m, queries=2, interval=2, deferred=True, **kw
    ),
    "history": lambda m, **kw: zo_fused.ZOAdam(m, history=4, **kw),
    "conservative": lambda m, weight_decay, **kw: zo_fused.ZOConservative(m, **kw),
    "blocks at once": lambda m, **kw: zo_fused.MeZO(in_blocks(m), block_order="simultaneous", **kw),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", list(METHODS))
def test_steps_give_the_same_bits_as_on_the_cpu(
    backend: str, device: torch.device, dtype: torch.dtype, method: str
) -> None:
    """Fed the same losses, fine-tuning on the GPU is fine-tuning on the CPU."""

    def tune(device: torch.device) -> nn.Module:
        tuned = model(device, dtype)
        opt = METHODS[method](tuned, lr=1e-2, weight_decay=0.1, seed=5)
        losses = torch.randn(60, generator=torch.Generator().manual_seed(1)).tolist()
        stream = iter([*losses[:4], math.nan, *losses[4:]])
        for _ in range(8):
            opt.step(lambda: next(stream))
        opt.flush()
        assert opt.skipped_steps == (method != "conservative")  # there it is a candidate's
        return tuned

    got = tune(device)
    zo_fused.set_backend(None)
    wanted = tune(CPU)
    before = dict(model(CPU, dtype).named_parameters())
    for (name, g), w in zip(got.named_parameters(), wanted.parameters(), strict=True):
        assert same_bits(g, w), name
        assert not same_bits(w, before[name]), name


def test_replay_on_the_cpu_rebuilds_what_the_gpu_tuned(
    backend: str, device: torch.device, tmp_path
) -> None:  # type: ignore[no-untyped-def]
    log = tmp_path / "replay.jsonl"
    tuned = model(device, torch.float16)
    x = weights(32, 64, device=device, seed=1)
    opt = zo_fused.MeZO(tuned.named_parameters(), lr=1e-3, seed=1)
    opt.start_log(log)
    for _ in range(5):
        opt.step(lambda: tuned(x).float().square().mean())
    zo_fused.set_backend(None)
    rebuilt = model(CPU, torch.float16)
    zo_fused.replay(rebuilt, log)
    for a, b in zip(tuned.parameters(), rebuilt.parameters(), strict=True):
        assert same_bits(a, b)


# ---- torch.compile and CUDA graphs --------------------------------------------------------------


def test_functions_compile_without_graph_breaks(backend: str, device: torch.device) -> None:
    keys, one = int64_tensor(KEYS[:2], device), torch.ones((), device=device)
    coeffs = torch.tensor([1e-2, -2e-2], device=device)
    u, v = (torch.randn(side, 2, device=device) for side in (30, 50))

    def sweeps(p: Tensor) -> Tensor:
        zo_fused.update_([p], keys, coeffs, one)
        zo_fused.lowrank_update_([p], [u], [v], one, one)
        return p * 2

    compiled = torch.compile(sweeps, fullgraph=True)
    a, b = weights(30, 50, device=device), weights(30, 50, device=device)
    for _ in range(2):
        assert same_bits(compiled(a), sweeps(b))
        assert same_bits(a, b)


class Step:
    """A whole MeZO step through the functions, all its numbers in device tensors: keys and
    coefficients that are written between replays, the losses, the projected gradient."""

    def __init__(self, device: torch.device) -> None:
        self.model = model(device, torch.float16)
        self.x = weights(32, 64, device=device, seed=1)
        self.key = int64_tensor(KEYS[:1], device)
        self.eps = torch.tensor([1e-3], device=device)
        self.lr = torch.tensor([1e-2], device=device)
        self.one = torch.ones((), device=device)
        self.grad = torch.zeros(1, device=device)
        self.params = [p.detach() for p in self.model.parameters()]

    def sweep(self, coeff: Tensor) -> None:
        zo_fused.update_(self.params, self.key, coeff, self.one)

    def loss(self) -> Tensor:
        return self.model(self.x).float().square().mean()

    @torch.no_grad()
    def __call__(self) -> None:
        self.sweep(self.eps)
        plus = self.loss()
        self.sweep(-2 * self.eps)
        minus = self.loss()
        self.grad.copy_((plus - minus) / (2 * self.eps))
        self.sweep(self.eps - self.lr * self.grad)

    def set(self, step: int) -> None:
        self.key.copy_(int64_tensor([KEYS[step]]))
        self.lr.fill_(1e-2 / (1 + step))


def test_a_whole_step_replays_from_a_graph(backend: str, device: torch.device) -> None:
    eager, captured = Step(device), Step(device)
    captured()  # compiles the kernels, writes the tables
    for p, q in zip(captured.params, eager.params, strict=True):
        p.copy_(q)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries want a warm-up on a stream of its own
        captured.loss()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured()
    for step in range(5):
        for machine in (eager, captured):
            machine.set(step)
        eager()
        graph.replay()
        assert same_bits(captured.grad, eager.grad), step
        assert float(eager.grad) != 0
        for p, q in zip(captured.params, eager.params, strict=True):
            assert same_bits(p, q), step
    assert not same_bits(eager.params[0], model(CPU, torch.float16).state_dict()["0.weight"])


@pytest.mark.parametrize("name", ["MeZO", "MeZO deferred", "LOZO", "queries", "ZOAdam"])
def test_optimizer_steps_replay_from_a_graph(name: str, backend: str, device: torch.device) -> None:
    """Captured once, `step` is the next step at every replay; ordinary steps may follow."""
    make = {
        "MeZO": zo_fused.MeZO,
        "MeZO deferred": lambda *a, **kw: zo_fused.MeZO(*a, deferred=True, **kw),
        "LOZO": lambda *a, **kw: zo_fused.LOZO(*a, interval=3, **kw),
        "queries": lambda *a, **kw: zo_fused.MeZO(*a, queries=2, distribution="rademacher", **kw),
        "ZOAdam": zo_fused.ZOAdam,
    }[name]
    models = [model(device, torch.bfloat16) for _ in range(2)]
    x = weights(32, 64, device=device, seed=1).bfloat16()
    closures = [lambda m=m: m(x).float().square().mean() for m in models]
    eager, captured = (make(m, lr=1e-2, rounding="stochastic", seed=7) for m in models)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            captured.step(closures[1])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step(closures[1])
    for _ in range(6):
        graph.replay()
    captured.step(closures[1])
    for _ in range(10):
        eager.step(closures[0])
    assert captured.step_count == 10
    for opt in (eager, captured):
        opt.flush()
    assert same_bits(captured.projected_grad, eager.projected_grad)
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        assert same_bits(p, q)


@pytest.mark.parametrize("paired", [False, True])
def test_factored_steps_follow_in_place_steps(
    paired: bool, backend: str, device: torch.device
) -> None:
    one, two = (model(device, torch.float32) for _ in range(2))
    x = weights(32, 64, device=device, seed=1).float()
    kw = {"lr": 1e-3, "eps": 1e-2, "interval": 4}
    plain = zo_fused.LOZO(one, **kw)
    factored = zo_fused.LOZO(two, mode="factored", paired=paired, **kw)
    for _ in range(10):
        plain.step(lambda: one(x).square().mean())
        factored.step(lambda: two(x).square().mean())
    factored.flush()
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-4)  # matrix products may use TF32


def test_two_streams_at_once(backend: str, device: torch.device) -> None:
    size = 1 << 22
    keys = [int64_tensor([key], device) for key in KEYS[:2]]
    coeff, one = torch.tensor([1e-2], device=device), torch.ones((), device=device)
    concurrent = [weights(size, device=device, seed=i) for i in range(2)]
    alone = [weights(size, device=device, seed=i) for i in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    for _ in range(10):
        for p, key, stream in zip(concurrent, keys, streams, strict=True):
            with torch.cuda.stream(stream):
                zo_fused.update_([p], key, coeff, one)
    torch.cuda.synchronize()
    for _ in range(10):
        for p, key in zip(alone, keys, strict=True):
            zo_fused.update_([p], key, coeff, one)
    for p, q in zip(concurrent, alone, strict=True):
        assert same_bits(p, q)


# ---- waiting, launches, compilations ------------------------------------------------------------


def test_no_function_waits_for_the_device(backend: str, device: torch.device) -> None:
    """Given its numbers as tensors on the device; the second call, whose tables exist."""
    params = [weights(30, 50, device=device), weights(70, device=device)]
    firsts = [torch.zeros_like(p, dtype=torch.float32) for p in params]
    seconds = [torch.zeros_like(p, dtype=torch.float32) for p in params]
    us = [torch.randn(len(p), 2, device=device) for p in params]
    vs = [torch.randn(n, 2, device=device) for n in (50, 1)]
    moments = [torch.zeros_like(u) for u in us]
    keys, rounding = int64_tensor(KEYS[:1], device), int64_tensor([ROUNDING], device)
    small, one = torch.full((1,), 1e-3, device=device), torch.ones((), device=device)
    tiny = small[0]
    fills = torch.ops.zo_fused.normal_, int64_tensor([0, 1]), int64_tensor([0, 0])

    def sweeps() -> None:
        zo_fused.update_(params, keys, small, one, rounding_key=rounding)
        zo_fused.moments_update_(
            params, keys, small, "adam", tiny, firsts=firsts, seconds=seconds, beta=tiny,
            gain=one, beta2=tiny, gain2=one, eps=tiny, restores=tiny, decay=one,
        )  # fmt: skip
        fill, ids, offsets = fills
        fill(us, ids, offsets, keys.expand(2))
        zo_fused.lowrank_update_(params, us, vs, tiny, one, rounding_key=rounding)
        double = tiny.double()
        zo_fused.lowrank_momentum_(
            params, moments, us, vs, double, double, double, restore=double, decay=one
        )

    sweeps()
    with no_waiting():
        sweeps()


@pytest.mark.parametrize("count", [1, 200])
def test_a_sweep_is_one_launch_a_dtype(backend: str, device: torch.device, count: int) -> None:
    ops = torch.ops.zo_fused
    ids, one = int64_tensor(range(count)), torch.ones(count, device=device)
    offsets, keys = torch.zeros_like(ids), int64_tensor(KEYS[:1] * count, device)
    coeffs = one[:, None].contiguous()
    halves = [weights(4, 9, device=device) for _ in range(count)]
    mixed = [weights(4, 9, dtype=DTYPES[i % 3], device=device) for i in range(count)]
    us = [torch.randn(4, 2, device=device) for _ in range(count)]
    vs = [torch.randn(9, 2, device=device) for _ in range(count)]
    for sweep, wanted in (
        (lambda: ops.dense_(halves, ids, offsets, keys[:1], coeffs, one), 1),
        (lambda: ops.dense_(mixed, ids, offsets, keys[:1], coeffs, one), min(count, 3)),
        (lambda: ops.lowrank_(halves, us, vs, one, one), 1),
        (lambda: ops.normal_(us, ids, offsets, keys), 1),
    ):
        sweep()
        found = launches(sweep)
        assert sum(found.values()) == wanted, found


def test_nothing_is_compiled_again_as_numbers_change(device: torch.device) -> None:
    """Learning rates, seeds, steps and projected gradients are data, not code."""
    reason = dispatch.why_not("triton", "cuda")
    if reason is not None:
        pytest.skip(reason)
    from triton import knobs

    compiled: list[str] = []

    def note(*args: object, **details: object) -> None:
        compiled.append(str(details.get("repr", args)))

    def tune(seeds: range) -> None:
        for seed in seeds:
            for cls in (zo_fused.MeZO, zo_fused.LOZO):
                tuned = model(device, torch.float16)
                opt = cls(tuned.named_parameters(), lr=1e-3 * (seed + 1), seed=seed)
                for step in range(5):
                    opt.param_groups[0]["lr"] = 1e-3 / (step + 1)
                    opt.step(lambda tuned=tuned, step=step: tuned(x).float().mean() * step)

    x = weights(32, 64, device=device, seed=1)
    previous = zo_fused.set_backend("triton")
    hook = knobs.runtime.jit_post_compile_hook
    try:
        tune(range(1))
        knobs.runtime.jit_post_compile_hook = note
        tune(range(1, 5))
    finally:
        knobs.runtime.jit_post_compile_hook = hook
        zo_fused.set_backend(previous)
    assert compiled == []


# ---- memory -------------------------------------------------------------------------------------


def peak_growth(call: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def need(free: int) -> None:
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < free:
        pytest.skip(f"needs {free / 2**30:.0f} GiB of free GPU memory")


def test_a_sweep_over_a_gigabyte_needs_no_megabyte(backend: str, device: torch.device) -> None:
    need(3 << 30)
    p = torch.zeros(1 << 14, 1 << 15, dtype=torch.float16, device=device)
    key = KEYS[0]
    assert peak_growth(lambda: zo_fused.update_([p], KEYS[:2], [1e-3, 1e-3], 0.9)) < 1 << 20
    assert peak_growth(lambda: zo_fused.update_([p], KEYS[:1], [1e-3], rounding_key=key)) < 1 << 20
    assert peak_growth(lambda: zo_fused.lowrank_perturb_([p], key, key, 1e-3, rank=2)) < 1 << 20


@pytest.mark.parametrize("matrix", [False, True])
def test_more_than_two_billion_elements(backend: str, device: torch.device, matrix: bool) -> None:
    columns = 1 << 15
    rows = (1 << 16) + 3
    n = rows * columns
    assert n > 1 << 31
    need(2 * n + (1 << 30))
    p = torch.zeros(rows, columns, dtype=torch.float16, device=device)
    if matrix:
        u, v = torch.randn(rows, 1, device=device), torch.randn(columns, 1, device=device)
        zo_fused.lowrank_update_([p], [u], [v], 1.0)
        for row in (0, (1 << 16) - 1, 1 << 16, rows - 1):
            assert same_bits(p[row], (u[row] * v[:, 0]).half())
        return
    start = 2**34 - 1000  # of a shard: the low counter word wraps, too
    zo_fused.update_([p], KEYS[:1], [1.0], ids=[9], offsets=[start])
    flat = p.view(-1)
    for at in (0, 900, 2**31 - 500, 2**31, n - 1001):
        wanted = noise.normal(1001, KEYS[0], 9, start + at).half()
        assert same_bits(flat[at : at + 1001], wanted), at
