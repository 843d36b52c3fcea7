"""Anything may happen to a run: its weights stay those of a plain one to which the same happens."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support.hostile_run import KINDS, Failed, Run
from torch import nn

import zo_fused

# Schedules round otherwise: by 2**-24 a sweep, through slopes by some of it a step.
CLOSE = {"rtol": 0, "atol": 3e-5}

RAISES = [ValueError, KeyboardInterrupt, SystemExit, Failed, MemoryError, StopIteration]
NO_LOSS = [
    None,
    "1",
    1j,
    torch.ones(2),
    torch.ones(0),
    [1.0],
    torch.tensor(1j),
    object(),
    Decimal(1),
]
NOT_FINITE = [math.nan, math.inf, -math.inf, torch.tensor(math.nan), np.float64("nan")]
NO_RATES = [math.nan, math.inf, -1.0, "0.1", None, 1j, True, torch.ones(2), 1e39, [0.1]]
NO_RADII = [*NO_RATES, 0, 0.0, 1e-300, -0.0]
STATES = {
    "MeZO": lambda net: zo_fused.MeZO(net, distribution="rademacher"),
    "ZOSignSGD": zo_fused.ZOSignSGD,
    "LOZO": lambda net: zo_fused.LOZO(net, momentum=0.5, basis="activations"),
    "SGD": lambda net: torch.optim.SGD(net.parameters(), 0.1),
}


def raising(error: type[BaseException]) -> Callable[[], Any]:
    def closure() -> Any:
        raise error("of the closure")

    return closure


class Anything(RuleBasedStateMachine):
    """Every rule does the same to both runs."""

    @initialize(kind=st.sampled_from(list(KINDS)))
    def begin(self, kind: str) -> None:
        self.runs = Run(kind, disturbed=True), Run(kind, disturbed=False)
        self.steps, self.skipped = 0, [0, 0]

    def both(
        self, act: Callable[[Run], Any], error: Any = None, match: str | None = None
    ) -> list[Any]:
        """Done to both; each raises the error, if there is one."""
        if error is None:
            return [act(run) for run in self.runs]
        for run in self.runs:
            with pytest.raises(error, match=match):
                act(run)
        return []

    @invariant()
    def counts(self) -> None:
        if hasattr(self, "runs"):
            for run, skipped in zip(self.runs, self.skipped, strict=True):
                assert (run.opt.step_count, run.opt.skipped_steps) == (self.steps, skipped)

    def teardown(self) -> None:
        if hasattr(self, "runs"):
            self.look()

    # ---- steps ----------------------------------------------------------------------------------

    def tunable(self) -> bool:
        return any(p.requires_grad for p in self.runs[0].net.body.parameters())

    @precondition(tunable)
    @rule(times=st.integers(1, 4))
    def step(self, times: int) -> None:
        for _ in range(times):
            one, other = self.both(Run.step)
            assert one == pytest.approx(other, abs=1e-4)
        self.steps += times

    @precondition(tunable)
    @rule(act=st.sampled_from([Run.split_step, Run.halves, Run.from_a_thread]))
    def step_otherwise(self, act: Callable[[Run], None]) -> None:
        if act is Run.split_step and self.runs[0].opt.needs_closure:
            return
        if act is Run.split_step and self.runs[0].opt.weights.beside.paired:
            act = Run.halves
        self.both(act)
        self.steps += 1

    @precondition(tunable)
    @rule(error=st.sampled_from(RAISES), evaluation=st.integers(0, 1))
    def a_closure_raises(self, error: type[BaseException], evaluation: int) -> None:
        if self.runs[0].opt.weights.beside.paired:
            evaluation = 0
        self.both(lambda run: run.step_with(raising(error), evaluation), error, "of the closure")

    @precondition(tunable)
    @rule(loss=st.sampled_from(NO_LOSS), evaluation=st.integers(0, 1))
    def no_loss(self, loss: Any, evaluation: int) -> None:
        if not self.runs[0].opt.weights.beside.paired:
            self.both(lambda run: run.step_with(lambda: loss, evaluation), TypeError, "loss")

    @precondition(tunable)
    @rule(loss=st.sampled_from(NOT_FINITE), evaluation=st.integers(0, 1))
    def a_loss_is_not_finite(self, loss: Any, evaluation: int) -> None:
        if not self.runs[0].opt.weights.beside.paired:
            self.both(lambda run: run.step_with(lambda: loss, evaluation))
            self.steps, self.skipped = self.steps + 1, [n + 1 for n in self.skipped]

    @precondition(tunable)
    @rule(
        use=st.sampled_from(["step", "flush", "state_dict", "eval", "estimate", "perturb", "look"])
    )
    def used_within(self, use: str) -> None:
        uses: dict[str, Callable[[Run], Any]] = {
            "step": lambda run: run.opt.step(run.loss),
            "estimate": lambda run: run.opt.estimate(run.loss),
            "perturb": lambda run: run.opt.perturb(-1),
        }
        use_it = uses.get(use, lambda run: getattr(run.opt, use)())
        self.both(
            lambda run: run.step_with(lambda: use_it(run), 0), RuntimeError, "in the middle of"
        )

    @precondition(tunable)
    @rule()
    def a_thread_within(self) -> None:
        for found in self.both(Run.thread_within):
            assert {type(error) for error in found} == {RuntimeError}
            assert "another thread" in str(found[0])
        self.steps += 1

    # ---- looks ----------------------------------------------------------------------------------

    @rule()
    def look(self) -> None:
        one, other = (run.theta for run in self.runs)
        torch.testing.assert_close(one, other, **CLOSE)

    @rule()
    def evaluate(self) -> None:
        with self.runs[0].opt.unperturbed():
            one, other = (float(run.loss().detach()) for run in self.runs)
        assert one == pytest.approx(other, abs=1e-4)

    @rule()
    def flush(self) -> None:
        self.runs[0].opt.flush()

    @precondition(tunable)
    @rule()
    def an_estimate_is_dropped(self) -> None:
        self.runs[0].opt.estimate(self.runs[0].loss)
        self.look()

    # ---- what changes ---------------------------------------------------------------------------

    @rule(name=st.sampled_from(["0.weight", "0.bias", "2.weight", "2.bias"]))
    def freeze_or_thaw(self, name: str) -> None:
        def change(run: Run) -> None:
            p = run.net.body.get_parameter(name)
            p.requires_grad_(not p.requires_grad)

        self.both(change)

    @rule(lr=st.sampled_from([0.0, 0.01, 0.05]), eps=st.sampled_from([0.02, 0.05]))
    def set_hyper(self, lr: float, eps: float) -> None:
        self.both(lambda run: run.groups[0].update(lr=lr, eps=eps))

    @precondition(tunable)
    @rule(
        bad=st.one_of(
            st.tuples(st.just("lr"), st.sampled_from(NO_RATES)),
            st.tuples(st.just("eps"), st.sampled_from(NO_RADII)),
            st.tuples(st.just("weight_decay"), st.sampled_from(NO_RATES)),
        )
    )
    def a_bad_hyper_parameter(self, bad: tuple[str, Any]) -> None:
        name, value = bad
        good = self.runs[0].groups[0][name]
        self.both(lambda run: run.groups[0].update({name: value}))
        self.both(Run.step, (TypeError, ValueError), name)
        self.both(lambda run: run.groups[0].update({name: good}))

    @rule(how=st.sampled_from(["in place", "data", "memory", "state_dict"]))
    def write(self, how: str) -> None:
        self.both(lambda run: run.write(how))

    @precondition(tunable)
    @rule()
    def another_dtype(self) -> None:
        def act(run: Run) -> None:
            with run.another_dtype(), pytest.raises(TypeError, match=r"has dtype torch\.float64"):
                run.step()

        self.both(act)

    @precondition(tunable)
    @rule()
    def another_parameter(self) -> None:
        """In the module, which an optimizer of a list of parameters knows nothing of."""

        def act(run: Run) -> None:
            layer: Any = run.net.body[0]
            kept = layer.weight
            with torch.no_grad():
                layer.weight = nn.Parameter(kept * 2)
            layer.weight = kept

        self.both(act)

    @precondition(lambda self: len(self.runs[0].groups) == 1)
    @rule()
    def add_group(self) -> None:
        self.both(Run.add_late)

    @rule(group=st.sampled_from([{"lr": "x"}, {"epss": 1.0}, {"seed": 1}, {"betas": 3}, {}]))
    def add_no_group(self, group: dict[str, Any]) -> None:
        """Of what is no hyper-parameter, or a name that is taken."""

        def act(run: Run) -> None:
            run.opt.add_param_group({"params": [("0.bias", nn.Parameter(torch.ones(2)))], **group})

        self.both(act, (TypeError, ValueError))

    # ---- others ---------------------------------------------------------------------------------

    @rule(act=st.sampled_from([Run.saved_and_loaded, Run.copied]))
    def go_on_elsewhere(self, act: Callable[[Run], None]) -> None:
        """The other one just goes on."""
        act(self.runs[0])
        self.skipped[0] = 0  # is no part of a state

    @rule(other=st.sampled_from(list(STATES)))
    def load_the_state_of_another(self, other: str) -> None:
        def act(run: Run) -> None:
            net = copy.deepcopy(run.net.body).requires_grad_(True)
            run.opt.load_state_dict(STATES[other](net).state_dict())

        self.both(act, ValueError)

    @rule(name=st.sampled_from(["SGD", "MeZO", "LOZO"]))
    def another_optimizer(self, name: str) -> None:
        if all(p.requires_grad for p in self.runs[0].net.parameters()):
            self.both(lambda run: run.other_step(name))

    @precondition(tunable)
    @rule(name=st.sampled_from(["MeZO", "LOZO"]))
    def another_optimizer_in_between(self, name: str) -> None:
        if not all(p.requires_grad for p in self.runs[0].net.parameters()):
            return
        self.both(lambda run: run.opt.perturb(1))
        self.both(lambda run: run.other_step(name), RuntimeError, "has perturbed parameters of")
        self.both(lambda run: run.opt.flush())


@pytest.mark.parametrize("amount", [12, pytest.param(400, marks=pytest.mark.slow)])
def test_anything(amount: int) -> None:
    run_state_machine_as_test(
        Anything,
        # without shrinking, which takes minutes
        settings=settings(max_examples=amount, stateful_step_count=25, phases=[Phase.generate]),
    )
