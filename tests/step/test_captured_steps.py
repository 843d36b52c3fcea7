"""Steps without the host: captured in a graph, no Python work per parameter, nothing to wait for.

There is no GPU here to capture on. What a captured step must not do can be seen without one: while
`capturing` is made to say yes, operations run as usual, but the optimizer takes its numbers from
the device's counter alone; so calling `step` again and again is what replaying a graph is.
"""

from __future__ import annotations

import gc
import itertools
import re
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.methods import Case
from support.models import loss_of, network, same
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import zo_fused
from zo_fused.noise import keys
from zo_fused.noise.keys import DeviceStep, Stream, stream_keys
from zo_fused.noise.streams import Purpose, as_int64, derive_key
from zo_fused.step import (
    access,
    buckets,
    capture,
    evaluation,
    generators,
    optimizer,
    vectors,
)
from zo_fused.sweeps import conversions, dispatch, reference
from zo_fused.sweeps.backends import cpu

needs_extension = pytest.mark.skipif(
    dispatch.why_not("cpu", "cpu") is not None,
    reason="no C++ extension; the reference copies from the host, parameter by parameter",
)


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """`with recording():` steps are recorded; nothing may be made from the host's numbers."""
    # numbers are tensors then, as they are on GPUs, wherever a module has the name
    for module in (buckets, capture, evaluation, vectors):
        monkeypatch.setattr(module, "on_host", lambda device: False)

    def no_copies(*args: Any, **kw: Any) -> None:
        raise AssertionError("something was copied from the host")

    @contextmanager
    def recorded() -> Iterator[None]:
        with monkeypatch.context() as inside:
            for module in (access, buckets, capture, optimizer):
                inside.setattr(module, "capturing", lambda: True)
            inside.setattr(conversions, "on_device", no_copies)
            inside.setattr(keys, "on_device", no_copies)
            inside.setattr(torch, "tensor", no_copies)
            yield

    return recorded


NEW_SEEDS = itertools.count(2**40)

# With a reason each (`test_what_cannot_be_captured_says_why`).
NOT_CAPTURED = re.compile(
    "ZOConservative|KerZOO|LOREN|SparseMeZO|HiZOO|ES(?!.*low rank)|PGAP|SVD-0|ZOMuon|ZO-MOPI|"
    "SubZero|LOZO-M|LOZO of activations|SeeZO|MeZO.(GV|Greedy|survivor)|TeZO-|(LO|Te)ZO.*deferred|"
    ".*(history|factored|paired|in turn)"
)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replays_are_the_next_steps(
    make: Case, dtype: torch.dtype, recording: Callable[[], Any]
) -> None:
    one, two = network(dtype), network(dtype)
    kw = {"lr": 1e-2, "weight_decay": 0.1, "rounding": "stochastic", "seed": 7}
    kw = {name: value for name, value in kw.items() if name in make(one).defaults | {"seed": 0}}
    eager, captured = make(one, **kw), make(two, **kw)
    if NOT_CAPTURED.match(make.name):
        for _ in range(2):
            captured.step(loss_of(two))
        with recording(), pytest.raises(RuntimeError, match="can't be captured in a graph: "):
            captured.step(loss_of(two))
        return
    for step in range(12):
        eager.step(loss_of(one))
        if 2 <= step < 9:
            with recording():
                captured.step(loss_of(two))
        else:
            captured.step(loss_of(two))
        assert torch.equal(eager.projected_grad, captured.projected_grad)
    assert captured.step_count == eager.step_count == 12
    assert captured.state_dict()["param_groups"] == eager.state_dict()["param_groups"]
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


@needs_extension
def test_the_learning_rate_may_be_a_tensor_on_the_device(recording: Callable[[], Any]) -> None:
    """A scheduler of the user's can then change it between replays."""
    one, two = network(), network()
    lr = torch.full((), 1e-2, dtype=torch.float64)
    eager, captured = zo_fused.MeZO(one, lr=1e-2), zo_fused.MeZO(two, lr=lr)
    for step in range(6):
        eager.param_groups[0]["lr"] = 1e-2 * 0.5**step
        lr.fill_(1e-2 * 0.5**step)
        eager.step(loss_of(one))
        captured.step(loss_of(two))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


@needs_extension
def test_a_number_that_is_new_in_a_capture_is_not_kept(recording: Callable[[], Any]) -> None:
    """A graph fills its memory at every replay; before the first one nobody may read it."""
    models = [network(), network()]
    groups = [[{"params": part.parameters()} for part in model] for model in models]
    for two in groups:
        del two[1]  # nothing to tune
    opts = [zo_fused.MeZO(two, lr=1e-2, weight_decay=0.1) for two in groups]
    (eager, captured), (one, two) = opts, models
    for step in range(6):
        for opt in opts:
            opt.param_groups[1]["lr"] = 1e-2 if step < 2 else 5e-3 / step
        eager.step(loss_of(one))
        if step in (2, 3):
            before = [dict(bucket._constants) for bucket in captured.weights.buckets]
            with recording():
                captured.step(loss_of(two))
            assert [dict(bucket._constants) for bucket in captured.weights.buckets] == before
        else:
            captured.step(loss_of(two))
    assert same(one, two)


@needs_extension
def test_numbers_that_a_graph_reads_stay(recording: Callable[[], Any]) -> None:
    model = network()
    opt = zo_fused.MeZO(model, lr=1e-2)
    for _ in range(2):
        opt.step(loss_of(model))
    (bucket,) = opt.weights.buckets
    with recording():
        read = weakref.ref(bucket.constant([1e-2]))
        opt.step(loss_of(model))
    for number in range(100):  # of a scheduler
        bucket.constant([float(number)])
        ones = bucket.ones
    assert bucket.ones is ones  # the numbers that are used most are not the first to go
    gc.collect()
    assert read() is not None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: zo_fused.LOZO(m, deferred=True), "same V"),
        (lambda m: zo_fused.LOZO(m, momentum=0.9), "momentum"),
        (lambda m: zo_fused.LOZO(m, mode="factored"), "window"),
        (lambda m: zo_fused.LOZO(m, basis="activations"), "activations"),
        (lambda m: zo_fused.MeZO(m, block_order="sequential"), "turn"),
        (zo_fused.ZOConservative, "candidates"),
        (lambda m: zo_fused.ZOAdam(m, history=3), "look back"),
    ],
)
def test_what_cannot_be_captured_says_why(
    make: Callable[[nn.Module], Any], message: str, recording: Callable[[], Any]
) -> None:
    model = network()
    opt = make(model)
    for _ in range(2):
        opt.step(loss_of(model))
    with recording(), pytest.raises(RuntimeError, match=message):
        opt.step(loss_of(model))


@needs_extension
def test_a_closure_that_draws_on_the_gpu_is_not_captured(
    recording: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two signs would have different dropout."""
    drawn = torch.zeros(16, dtype=torch.uint8)  # what a GPU's generator counts
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: drawn.clone())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: drawn.copy_(state))
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(evaluation, "GeneratorStates", lambda _: generators.GeneratorStates([gpu]))
    model, dropout = network(), True

    def loss() -> Any:
        drawn.add_(dropout)
        return loss_of(model)()

    opt = zo_fused.MeZO(model)
    for _ in range(3):
        opt.step(loss)
    assert drawn.tolist() == [3] * 16  # what one evaluation draws, a step
    with recording(), pytest.raises(RuntimeError, match=r"dropout.*eval\(\)"):
        opt.step(loss)
    dropout = False
    opt.step(loss)
    with recording():
        opt.step(loss)


@needs_extension
def test_capture_needs_ordinary_steps_first(recording: Callable[[], Any], tmp_path: Any) -> None:
    model = network()
    opt = zo_fused.MeZO(model)
    with recording(), pytest.raises(RuntimeError, match="two steps"):
        opt.step(loss_of(model))
    opt.start_log(tmp_path / "log.jsonl")
    opt.step(loss_of(model))
    with recording(), pytest.raises(RuntimeError, match="close_log"):
        opt.step(loss_of(model))
    opt.close_log()
    with recording(), pytest.raises(RuntimeError, match="closure"):
        opt.step(loss_plus=0.0, loss_minus=0.0)


@given(
    seed=st.integers(0, 2**64 - 1),
    step=st.integers(0, 2**40),
    ahead=st.integers(0, 3),
    interval=st.integers(1, 100),
    query=st.integers(0, 2**32 - 1),
    purpose=st.sampled_from(list(Purpose)),
)
def test_keys_made_on_the_device_are_those_of_the_host(
    seed: int, step: int, ahead: int, interval: int, query: int, purpose: Purpose
) -> None:
    counter = torch.full((), step, dtype=torch.int64)
    number = DeviceStep(counter, reference.key_)
    streams = [
        Stream(purpose, number + ahead, interval, query),
        Stream(Purpose.PROBE, number, query=query),
    ]
    made = stream_keys(seed, streams, torch.device("cpu"))
    expected = derive_key(seed, purpose, (step + ahead) // interval, query)
    other = derive_key(seed, Purpose.PROBE, step, query)
    assert made.tolist() == [as_int64(expected), as_int64(other)]


# ---- kernels -------------------------------------------------------------------------------------

MOVES_NOTHING = re.compile(
    r"profiler\.|aten\.(empty|view|unbind|select|slice|split|expand|unsqueeze|alias|lift|detach)"
)


class Kernels(TorchDispatchMode):
    """What a GPU would be given besides sweeps over weights: operations of torch, and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if not MOVES_NOTHING.match(name) and not name.startswith("zo_fused_C."):
            self.names.append(name)
        return func(*args, **(kwargs or {}))

    def key(self, *args: Any) -> None:
        """In the place of a backend's `key_`."""
        with _disable_current_modes():
            reference.key_(*args)
        self.names.append("key")

    def copy(self, host: torch.Tensor, device: torch.device) -> torch.Tensor:
        """In the place of `on_device`, of keys."""
        self.names.append("copy")
        return host


@needs_extension
@pytest.mark.parametrize("captured", [True, False])
@pytest.mark.parametrize(
    ("kw", "most"),
    [
        ({}, 12),
        ({"one_sided": True}, 12),
        ({"rounding": "stochastic"}, 13),  # one key more
        ({"deferred": True}, 15),
        ({"weight_decay": 0.1}, 19),
    ],
    ids=str,
)
def test_a_step_is_few_kernels_besides_its_sweeps(
    kw: dict[str, Any],
    most: int,
    captured: bool,
    recording: Callable[[], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A kernel in a graph is some 2 us, and OPT-125M's three sweeps take 250 us on an H100."""
    count = Kernels()
    monkeypatch.setattr(cpu, "key_", count.key)
    if not captured:  # the keys of the host are copied to a GPU
        monkeypatch.setattr(keys, "on_host", lambda device: False)
        monkeypatch.setattr(keys, "on_device", count.copy)
    model, losses = network(), itertools.cycle(torch.ones(2).unbind())  # no copies
    opt = zo_fused.MeZO(model, seed=next(NEW_SEEDS), **kw)
    for _ in range(3):
        opt.step(lambda: next(losses))
    count.names.clear()
    with recording() if captured else nullcontext(), count:
        opt.step(lambda: next(losses))
    assert len(count.names) <= most, count.names
    assert ("key" if captured else "copy") in count.names


# ---- Python work ---------------------------------------------------------------------------------


def events_of_a_step(method: Any, parameters: int, **kw: Any) -> Counter[str]:
    """What the interpreter does in a step after the first ones: calls, also of C functions."""
    module = nn.Module()
    for i in range(parameters):
        shape = (3, 2) if i % 2 else (3,)
        module.register_parameter(f"p{i}", nn.Parameter(torch.ones(shape)))
    opt = method(module, seed=next(NEW_SEEDS), **kw)  # no keys that are known from before
    loss = torch.ones(())
    for _ in range(4):
        opt.step(lambda: loss)
    events: Counter[str] = Counter()

    def note(frame: Any, event: str, function: Any) -> None:
        events[f"{event} {frame.f_code.co_qualname} {getattr(function, '__qualname__', '')}"] += 1

    gc.disable()  # what it would clear away here is of other tests
    sys.setprofile(note)
    try:
        opt.step(lambda: loss)
    finally:
        sys.setprofile(None)
        gc.enable()
    return events


@needs_extension
@pytest.mark.parametrize(
    ("method", "kw"),
    [
        (zo_fused.MeZO, {}),
        (zo_fused.MeZO, {"deferred": True, "rounding": "stochastic"}),
        (zo_fused.MeZO, {"momentum": 0.9}),
        (zo_fused.ZOAdam, {}),
        (zo_fused.MeZO, {"queries": 3}),
        (zo_fused.LOZO, {"interval": 100, "queries": 3}),
        (zo_fused.ZOConservative, {}),
        (zo_fused.LOZO, {"interval": 100}),
        (zo_fused.LOZO, {"interval": 100, "deferred": True}),
        (zo_fused.LOZO, {"interval": 100, "momentum": 0.9, "divide_by_rank": True}),
        (zo_fused.LOZO, {"interval": 100, "momentum": 0.9, "deferred": True}),
    ],
    ids=str,
)
def test_python_work_does_not_grow_with_the_parameters(method: Any, kw: dict[str, Any]) -> None:
    assert events_of_a_step(method, 5, **kw) == events_of_a_step(method, 300, **kw)


@needs_extension
def test_a_closure_that_raises_while_captured_changes_nothing(recording: Callable[[], Any]) -> None:
    """What was recorded until then never runs."""
    model = network()
    opt = zo_fused.MeZO(model, deferred=True)
    for _ in range(2):
        opt.step(loss_of(model))
    before = (opt.weights.place, opt.weights.ahead, dict(opt.param_groups[0]))
    with recording(), pytest.raises(ZeroDivisionError):
        opt.step(lambda: 1 / 0)
    assert (opt.weights.place, opt.weights.ahead, opt.param_groups[0]) == before
    assert opt.weights.log.path == []
