"""Global state of torch changes nothing: defaults, autocast, inference mode, threads and others.

Every method runs under every state, from its construction to a replay; weights, losses and
projected gradients are those of the plain run, bit for bit. The closure is the user's: it computes
in the plain state, so that only the package's own code meets the strange one.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from support.equality import assert_same_bits
from support.methods import CASES, rounds
from support.models import loss_of, network
from torch import Tensor, nn

import zo_fused
from zo_fused import noise

State = Callable[[], AbstractContextManager[Any]]


def setting(set_: Callable[[Any], Any], value: Any, normal: Any) -> State:
    @contextmanager
    def state() -> Iterator[None]:
        set_(value)
        try:
            yield
        finally:
            set_(normal)

    return state


STATES: dict[str, State] = {
    "default dtype float64": setting(torch.set_default_dtype, torch.float64, torch.float32),
    "default dtype bfloat16": setting(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "default device meta": setting(torch.set_default_device, "meta", None),
    "with meta": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "flush denormal": setting(torch.set_flush_denormal, True, False),
    "deterministic": setting(torch.use_deterministic_algorithms, True, False),
    "threads": setting(torch.set_num_threads, 3, torch.get_num_threads()),
    "matmul precision": setting(torch.set_float32_matmul_precision, "medium", "highest"),
}


@contextmanager
def plain() -> Iterator[None]:
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.set_default_dtype(dtype)


def hybrid(model: nn.Sequential) -> Any:
    return zo_fused.Hybrid(
        zo_fused.MeZO(list(model[0].named_parameters("0")), lr=1e-2, eps=1e-2),
        torch.optim.SGD(model[2].parameters(), lr=1e-2, momentum=0.9),
    )


METHODS_IN_STATES: list[Any] = [pytest.param(case, id=name) for name, case in CASES.items()]
METHODS_IN_STATES.append(pytest.param(hybrid, id="Hybrid"))
in_states = pytest.mark.parametrize("method", METHODS_IN_STATES)


def made_by(method: Callable[..., Any], model: nn.Module) -> Any:
    """With a rate in float64, which no default dtype may change, and rounding at random."""
    if method is hybrid:
        return hybrid(model)
    lr = torch.tensor(1e-2, dtype=torch.float64, device="cpu")
    more = {"rounding": "stochastic", "weight_decay": 0.1} if rounds(method) else {}
    return method(model, lr=lr, **more)


def closure_of(model: nn.Module) -> Callable[[], Tensor]:
    loss = loss_of(model)

    def closure() -> Tensor:
        with plain():
            return loss()

    return closure


def run(method: Callable[..., Any], set_up: State, steps: State, folder: Path) -> list[Tensor]:
    """All that a run of a method gives: three steps, a state, two steps after it, a replay."""
    model, base, twin = network(torch.bfloat16), network(torch.bfloat16), network(torch.bfloat16)
    made = []
    with set_up():
        opt = made_by(method, model)
        zo = getattr(opt, "zo", opt)
        zo.start_log(folder / "log.jsonl")
    with steps():
        for _ in range(3):
            made += [opt.step(closure_of(model)), opt.projected_grad]
        opt.flush()
    state = copy.deepcopy(opt.state_dict())  # the user's: in inference mode, of inference tensors
    with set_up():
        twin.load_state_dict(model.state_dict())
        again = made_by(method, twin)
        again.load_state_dict(state)
    with steps():
        for _ in range(2):
            made += [again.step(closure_of(twin)), again.projected_grad]
        again.flush()
        zo.close_log()
        if method is not hybrid:  # whose log has zo's part only
            zo_fused.replay(base, folder / "log.jsonl")
    made += [p.detach() for m in (model, base, twin) for p in m.parameters()]
    return [tensor.clone() for tensor in made]


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], list[Tensor]]:
    """What a method gives in the plain state; made once."""
    folder = tmp_path_factory.mktemp("plain")

    @functools.cache
    def of(method: Callable[..., Any]) -> list[Tensor]:
        made = run(method, nullcontext, nullcontext, folder)
        count = len(list(network(torch.bfloat16).parameters()))
        if method is not hybrid:
            for p, replayed in zip(
                made[-3 * count : -2 * count], made[-2 * count : -count], strict=True
            ):
                assert_same_bits(replayed, p)
        return made

    return of


@pytest.mark.parametrize("state", list(STATES))
@in_states
def test_a_method_under_a_global_state(
    method: Callable[..., Any], state: str, plain_run: Callable[[Any], list[Tensor]], tmp_path: Path
) -> None:
    wanted = plain_run(method)
    for got, tensor in zip(
        run(method, STATES[state], STATES[state], tmp_path), wanted, strict=True
    ):
        assert_same_bits(got, tensor)


@pytest.mark.parametrize("where", ["set-up", "steps"])
@in_states
def test_inference_mode_for_a_part_of_the_run(
    method: Callable[..., Any], where: str, plain_run: Callable[[Any], list[Tensor]], tmp_path: Path
) -> None:
    """What is made in it is an inference tensor, which can't be changed outside."""
    states: list[State] = [nullcontext, torch.inference_mode]
    made = run(method, *(states if where == "steps" else states[::-1]), tmp_path)
    for got, wanted in zip(made, plain_run(method), strict=True):
        assert_same_bits(got, wanted)


# ---- the functional layer -----------------------------------------------------------------------


def functional() -> list[Tensor]:
    """What every function makes of the same weights."""
    made = []

    def weights() -> list[Tensor]:
        generator = torch.Generator().manual_seed(3)
        shapes = ((5, 4), (7,))
        made.extend(
            torch.randn(shape, dtype=torch.float32, device="cpu", generator=generator).to(dtype)
            for shape, dtype in zip(shapes, (torch.float32, torch.bfloat16), strict=True)
        )
        return made[-2:]

    zo_fused.update_(weights(), [1, 2], [0.5, 0.25], 0.9, rounding_key=3)
    zo_fused.perturb_(weights(), 1, 0.5, transform="signs")
    zo_fused.moments_update_(weights(), [1], [0.5], "sign", -0.1, beta=0.9)
    zo_fused.lowrank_update_(weights(), 1, 2, 0.5, [0.9, 1.0], rank=2)
    zo_fused.lowrank_perturb_(weights(), 1, 2, 0.5, rank=2)
    moments = [torch.zeros(rows, 2, dtype=torch.float32, device="cpu") for rows in (5, 7)]
    zo_fused.lowrank_momentum_(weights(), moments, 1, 2, 0.5, 0.1, 0.9, rank=2)
    made.extend([noise.normal(9, 1), noise.random_bits(9, 1), *moments])
    return made


@contextmanager
def all_states() -> Iterator[None]:
    with ExitStack() as stack:
        for state in STATES.values():
            stack.enter_context(state())
        yield


@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
def test_functions_under_global_states(
    backend: str, use_backend: Callable[[str | None], None]
) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    use_backend(backend)
    wanted = [tensor.clone() for tensor in functional()]
    # one by one where it is fast: a state could hide what another one does
    states = {**(STATES if backend == "cpu" else {}), "all": all_states}
    for name, state in states.items():
        with state():
            made = functional()
        for got, tensor in zip(made, wanted, strict=True):
            assert_same_bits(got.clone(), tensor, name)


def test_terms_of_a_script_are_made_on_the_host() -> None:
    steps = pytest.importorskip("zo_fused_kernels.steps", reason="needs Triton")
    script = ((0, 1, -1), (1, -1, 2))
    make = steps.terms_of.__wrapped__  # not what is kept
    wanted = make(script, torch.device("cpu"))
    with all_states():
        made = make(script, torch.device("cpu"))
    for got, tensor in zip(made, wanted, strict=True):
        assert_same_bits(got.clone(), tensor)
