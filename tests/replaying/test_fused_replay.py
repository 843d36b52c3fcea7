"""Many sweeps in one pass: scripts on every backend, and replays that are made of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.equality import assert_same_bits
from support.methods import CASES
from support.models import loss_of, network
from torch import Tensor, nn

import zo_fused
from zo_fused.directions import tape as recorder
from zo_fused.directions.dense import Dense
from zo_fused.noise.streams import as_int64
from zo_fused.step import repeat
from zo_fused.sweeps import reference
from zo_fused.sweeps import script as scripts
from zo_fused.sweeps.numbers import EXACT

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
KEYS = torch.tensor([as_int64(k) for k in (0x0123456789ABCDEF, 1, 2**64 - 1, 7 << 60, 42)])
FAR = 2**34 - 7  # the low word of a counter wraps

# numpy warns where Triton's interpreter makes NaN of infinities
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


# ---- scripts ------------------------------------------------------------------------------------


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weights(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """With both zeros and both infinities."""
    x = random(*shape).mul(0.02).to(dtype)
    for i, value in enumerate((0.0, -0.0, math.inf, -math.inf)[: x.numel() // 4]):
        x.view(-1)[3 * i] = value
    return x


class Call:
    """Arguments of a script, and the sweeps that it stands for."""

    def __init__(
        self, shapes: list[tuple[int, ...]], dtype: torch.dtype, rows: list[tuple[int, ...]]
    ) -> None:
        count, sweeps = len(shapes), len(rows)
        self.params = [weights(s, dtype) for s in shapes]
        self.streams = (torch.arange(5, 5 + count), torch.arange(count) * (FAR // 2))
        self.script = torch.tensor(rows, dtype=torch.int64).view(-1, 3)
        self.coeffs = random(count, sweeps, 2, seed=1) * 0.01
        # zero takes a weight to the zero of its sign
        self.decay = (1 + random(count, sweeps, seed=2)) * (random(count, sweeps, seed=3) > -1)

    def copies(self) -> list[Tensor]:
        return [p.clone(memory_format=torch.preserve_format) for p in self.params]

    def dense(self) -> tuple[Tensor, ...]:
        return KEYS, self.script, self.coeffs, self.decay

    def check(self, by: Any) -> None:
        """Fused on the current backend, against the single sweeps of `by`."""
        for transform in EXACT:
            fused, single = self.copies(), self.copies()
            zo_fused.sweeps.operators.dense_steps_(fused, *self.streams, *self.dense(), transform)
            for rows in scripts.dense(*self.dense()):
                by.dense_(single, *self.streams, *rows, transform)
            self.same(fused, single)

    @staticmethod
    def same(fused: list[Tensor], single: list[Tensor]) -> None:
        for a, b in zip(fused, single, strict=True):
            assert torch.equal(a.isnan(), b.isnan())
            assert_same_bits(a.nan_to_num(1.5), b.nan_to_num(1.5))


# Plain, deferred and stochastic steps, a direction from before, the same twice, none.
SCRIPT = [(0, -1, -1)] * 2 + [(0, -1, 3), (1, -1, -1), (1, 2, 4), (2, 3, -1), (1, 1, 3)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_script_is_its_sweeps(backend: str, dtype: torch.dtype) -> None:
    Call([(3, 7), (9,), (), (2, 0), (1, 33)], dtype, SCRIPT).check(reference)


def test_permuted_parameters(backend: str) -> None:
    call = Call([(5, 7), (4, 6)], torch.bfloat16, SCRIPT)
    call.params[0] = call.params[0].t().contiguous().t()
    assert not call.params[0].is_contiguous()
    call.check(zo_fused.sweeps.operators)


def test_an_empty_script_changes_nothing(backend: str) -> None:
    call = Call([(3, 7)], torch.float16, [])
    before = call.copies()
    zo_fused.sweeps.operators.dense_steps_(call.params, *call.streams, *call.dense())
    Call.same(call.params, before)


@given(
    rows=st.lists(st.tuples(st.integers(0, 4), st.integers(-1, 4), st.integers(-1, 4)), max_size=9),
    shapes=st.lists(st.lists(st.integers(1, 40), max_size=2).map(tuple), min_size=1, max_size=3),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=40)
def test_any_script(rows: Any, shapes: Any, dtype: torch.dtype) -> None:
    Call(shapes, dtype, rows).check(zo_fused.sweeps.operators)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (0, 5, "column 0"),
        (0, -1, "column 0"),
        (1, 5, "column 1"),
        (1, -2, "column 1"),
        (2, 5, "column 2"),
    ],
)
def test_indices_out_of_range_are_refused(column: int, value: int, message: str) -> None:
    call = Call([(3, 7)], torch.float16, SCRIPT)
    before = call.copies()
    with pytest.raises(ValueError, match="transform='quick'"):
        zo_fused.sweeps.operators.dense_steps_(call.params, *call.streams, *call.dense(), "quick")
    call.script[2, column] = value
    with pytest.raises(ValueError, match=message):
        zo_fused.sweeps.operators.dense_steps_(call.params, *call.streams, *call.dense())
    Call.same(call.params, before)
    with pytest.raises(ValueError, match="script must be"):
        zo_fused.sweeps.operators.dense_steps_(
            call.params, *call.streams, KEYS, call.script[:, :2], call.coeffs, call.decay
        )


# ---- replay -------------------------------------------------------------------------------------

REPLAYED = ["MeZO", "LOZO", "LOZO-M"]


def replayed(
    log: Path, patch: pytest.MonkeyPatch, dtype: torch.dtype, limit: int | None
) -> nn.Module:
    """A replay with so many sweeps in a pass; None: step by step."""
    model = network(dtype)
    with patch.context() as context:
        if limit is None:
            context.setattr(Dense, "recorder", lambda d: None)
        else:
            context.setattr(Dense, "recorder", lambda d: recorder.DenseRecorder(d, limit))
        zo_fused.replay(model, log)
    return model


def assert_same_models(a: nn.Module, b: nn.Module) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert_same_bits(p.detach(), q.detach())


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stochastic": {"rounding": "stochastic"},
    "deferred": {"deferred": True},
    "deferred, stochastic": {"deferred": True, "rounding": "stochastic"},
}


def log_of(path: Path, method: str, variant: str, dtype: torch.dtype, **options: Any) -> nn.Module:
    """Nine steps and their log; returns the model."""
    model = network(dtype)
    module: Any = model
    if options.pop("groups", False):
        named = list(model.named_parameters())
        module = [{"params": named[:1], "weight_decay": 0.1}, {"params": named[1:], "eps": 2e-3}]
    opt = CASES[method](module, **{"lr": 1e-2, **VARIANTS[variant], **options})
    opt.start_log(path)
    for _ in range(9):
        opt.step(loss_of(model))
    opt.flush()
    return model


@pytest.mark.parametrize("groups", [False, True], ids=["one group", "two groups"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method", REPLAYED)
def test_cut_anywhere(
    method: str, variant: str, groups: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many sweeps a pass has, the bits are those of the run and of a replay without."""
    log = tmp_path / "log.jsonl"
    model = log_of(log, method, variant, torch.float16, groups=groups)
    assert_same_models(model, replayed(log, monkeypatch, torch.float16, None))
    for limit in (1, 2, 3, 4, 5, recorder.SWEEPS):
        assert_same_models(model, replayed(log, monkeypatch, torch.float16, limit))


@pytest.mark.parametrize("method", ["MeZO", "LOZO"])
def test_on_every_backend(method: str, backend: str, tmp_path: Path) -> None:
    log, base = tmp_path / "log.jsonl", network(torch.bfloat16)
    previous = zo_fused.set_backend(None)
    model = log_of(log, method, "deferred, stochastic", torch.bfloat16)
    zo_fused.set_backend(previous)
    zo_fused.replay(base, log)
    assert_same_models(model, base)


@pytest.mark.parametrize("method", REPLAYED)
def test_permuted_tensors_of_a_model(method: str, tmp_path: Path) -> None:
    log, base = tmp_path / "log.jsonl", network()
    model = log_of(log, method, "plain", torch.float32)
    base[0].weight.data = base[0].weight.data.t().contiguous().t()
    zo_fused.replay(base, log)
    assert_same_models(model, base)


def passes(log: Path, sweeps: list[str]) -> list[str]:
    """The sweeps of a replay."""
    sweeps.clear()
    zo_fused.replay(network(), log)
    return list(sweeps)


def test_weights_are_passed_over_once_for_many_steps(tmp_path: Path, sweeps: list[str]) -> None:
    log = tmp_path / "log.jsonl"
    log_of(log, "MeZO", "plain", torch.float32)
    assert passes(log, sweeps) == ["dense_steps_"]
    log_of(log, "LOZO", "plain", torch.float32)
    assert passes(log, sweeps) == ["lowrank_"] * 27  # nine steps of three sweeps


def test_new_buckets_wait_for_the_old_ones(tmp_path: Path, sweeps: list[str]) -> None:
    """A parameter that stops to move, and moves again, is in another bucket each time."""
    log, model = tmp_path / "log.jsonl", network()
    opt = CASES["MeZO"](model)
    opt.start_log(log)
    for step in range(9):
        model[0].weight.requires_grad_(step // 3 != 1)
        opt.step(loss_of(model))
    base = network()
    sweeps.clear()
    zo_fused.replay(base, log)
    assert sweeps == ["dense_steps_"] * 3
    assert_same_models(model, base)


@pytest.mark.parametrize("method", ["LOZO", "LOZO-M", "MeZO-M", "MeZO-GV", "ZOAdam", "ZOSignSGD"])
def test_other_sweeps_than_dense_ones_are_not_recorded(method: str) -> None:
    opt = CASES[method](network())
    assert repeat.recorder_of(opt.direction, opt.rule) is None


def test_memory_is_bounded() -> None:
    """A tape that never ends: what waits is never more than the limit."""
    opt = CASES["MeZO"](network())
    waiting = repeat.recorder_of(opt.direction, opt.rule)
    assert isinstance(waiting, recorder.DenseRecorder)
    opt.weights.direction = waiting
    for sign in range(2 * recorder.SWEEPS):
        opt.perturb(1 + sign % 5)
        (tape,) = waiting._tapes.values()
        assert len(tape._script) < recorder.SWEEPS
        assert len(tape._script) == len(tape._coeffs) == len(tape._decay)


# ---- the benchmark ------------------------------------------------------------------------------


def test_the_benchmark_compares_both_ways() -> None:
    from bench.cpu import replay

    lines = list(replay.rows("opt-tiny", ["fp16"], ["MeZO", "MeZO deferred"], 3, 1))
    assert [line.split(" | ")[2] for line in lines[2:]] == ["MeZO", "MeZO deferred"]
