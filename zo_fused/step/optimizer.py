"""The step that all zeroth-order optimizers share: go somewhere, look at the loss, come back wiser.

A method is a direction (`zo_fused.directions`: how z is made) and a rule (`zo_fused.rules`: what a
projected gradient does). It may also say where losses are taken and what they tell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from zo_fused.recording import capturing
from zo_fused.step.access import plain_tensors
from zo_fused.step.estimates import Estimate, Transform, estimated, slopes, transformed
from zo_fused.step.evaluation import Closure, Loss, check_closure
from zo_fused.step.schedule import Position, Side, pairs
from zo_fused.step.takes_losses import TakesLosses
from zo_fused.step.vectors import Vector
from zo_fused.step.weights import THETA

_NEEDS_LOSSES = (
    "step() needs a closure, step(lambda: model(**batch).loss), or loss_plus and loss_minus. There "
    "is no backward pass: a loop that calls step() itself must call opt.estimate(closure) where it "
    "called loss.backward(); for the Trainer of transformers there is zo_fused.hf.ZOTrainer"
)


class ZerothOrderOptimizer(TakesLosses):
    """Base of the optimizers: estimates along one direction a step.

    ``g = (L(theta + eps z) - L(theta - eps z)) / (2 eps)`` (SPSA; Spall 1992), where z belongs to
    the step: it is drawn anew in every sweep from (seed, step, query, parameter id, element index).
    With ``one_sided=True``, ``g = (L(theta + eps z) - L(theta)) / eps``: one sweep less (two in
    both schedules), for an estimate that is biased by the curvature. With ``queries=q`` a step
    takes q such estimates, each with a z of its own, and their mean is the gradient (one-sided ones
    share L(theta)): ``2 q`` or ``q + 1`` losses, and one sweep for the whole update.

    Blocks: with ``block_order`` the param groups that have the same number under "block"
    (`zo_fused.layer_blocks` makes them) are perturbed without the others. "sequential": every step
    is of one block, in turn (give a whole round the same batch for the sweep through all blocks of
    arXiv 2402.11592). "simultaneous": a step estimates every block at the same weights, with losses
    of its own, and then updates them all: less variance, at the price of 2 losses a block.

    The sweeps of a step are ``+eps``, ``-2 eps``, and restore together with the update; with
    ``deferred=True`` the last one also moves to ``+eps`` of the next step, so that there are two,
    and weights rest perturbed between steps. Whoever looks at a parameter then finds it at theta
    all the same (`zo_fused.step.guard`), at the price of one more sweep: saves, copies, merges of
    an adapter, forward passes between steps, other optimizers. `flush` or `eval` put them there
    beforehand. Memory that was taken out of a parameter earlier (``p.data``) shows what is there.

    In 16 bits a restore is exact only up to the rounding of the dtype (docs/noise.md, "Rounding").
    With ``rounding="stochastic"`` updates are rounded at random, without bias, so that those far
    below a weight's last place add up (docs/performance.md); perturbations are rounded to nearest.

    Args:
        params: ``model.named_parameters()`` (best: noise is tied to names), ``model.parameters()``
            (noise is tied to positions), param groups, or the module itself. Only parameters that
            require gradients move; this is looked up at every step.
        direction, rule: see above.
        defaults: hyper-parameters of the groups.
        options: arguments of the method that groups don't tell, recorded in the replay log.
        eps, weight_decay, rounding: perturbation radius; decay, with the learning rate as factor;
            of the update in 16-bit weights, "nearest" or "stochastic".
        seed: of the run, below ``2**64``. The global generators are never used.
        deferred, one_sided, queries, block_order: see above.
        parallel: "auto": if torch.distributed is initialized, the loss of a step is the mean over
            all ranks; `zo_fused.Parallel`: which ranks, and which of them share a step's
            perturbations; None: this process is on its own (docs/parallel.md).

    Attributes:
        projected_grad: g of the last step, float32 tensor [] on the device of the first parameter;
            with several queries or blocks [blocks * queries].
        timings: None, or a dict to which `step` adds seconds under "perturb", "forward", "update"
            (on GPUs this waits for the device).
    """

    needs = _NEEDS_LOSSES  # what `step` says when it has nothing to go by
    takes_rewards = False  # whether higher is better of what closures return
    needs_closure = False  # whether `step` can't do with losses
    differentiates = False  # whether the loss must have a derivative
    quantized = False  # whether, of a model, it tunes the scales of quantized layers alone

    # ---- what a method may say ------------------------------------------------------------------

    def measure(self, closure: Closure) -> Estimate:
        """The losses of a step and their projected gradients."""
        if self.weights.beside.paired:
            return self.difference(self._evaluation.losses_in_pairs(self.schedule.queries, closure))
        if self.schedule.block_order is not None:
            self.weights.look()  # what blocks there are
        positions, probes = self.positions(), self.probes()
        if not probes:
            return self.difference(self._evaluation.losses_at(positions, closure))
        ahead = self.schedule.deferred and not self.direction.begins_with_probe
        _check_probes(type(self).__name__, probes, ahead)
        of_probes = self.losses_at(probes, closure)
        if not self._learn(of_probes):  # then the step is skipped
            self.weights.go(THETA)
            return self.difference(dict.fromkeys(positions, math.nan))
        known = self.known(of_probes)
        missing = [position for position in positions if position not in known]
        return self.difference({**known, **self.losses_at(missing, closure, again=True)})

    def known(self, of_probes: Mapping[Position, Any]) -> dict[Position, Any]:
        """The losses of a step that its probes, which were learnt from, have taken already."""
        return {}

    def transform(self, grads: Vector, plus: Sequence[Any], minus: Sequence[Any]) -> Vector:
        """What the rule gets instead of the projected gradients, float64 [queries]. It is what
        `projected_grad` and the replay log have. If a projected gradient is not finite, the step is
        skipped, whatever this returns, as it is if this returns a number that isn't. Called when
        the step is taken: an estimate that is dropped leaves no trace in `state`.

        Args:
            plus, minus: the losses, a query each; one-sided: minus is ``L(theta)``.
        """
        return grads

    def update(self, grads: Vector) -> None:
        """Take back the perturbation and apply the update of these projected gradients."""
        step = self._groups.step
        try:
            skipped = self.weights.update(self.rule, grads, self.state)
        finally:
            self._capture.follow()
        self.projected_grad = grads.reshape(() if len(grads) == 1 else -1)
        self._report.step(step, self.projected_grad, skipped, wait=self.weights.log.is_open)

    # ---- what a method may use ------------------------------------------------------------------

    def difference(self, losses: Mapping[Position, Any]) -> Estimate:
        """What `measure` returns, from losses at the two sides of every query."""
        return self._estimated(pairs(losses))

    def _estimated(self, sides: list[Side]) -> Estimate:
        exact = self._transform is not None
        return estimated(sides, self._groups.eps()[0], self.weights.buckets[0], exact)

    @property
    def _transform(self) -> Transform | None:
        changed = type(self).transform is not ZerothOrderOptimizer.transform
        return self.transform if changed else None

    def _learn(self, losses: Mapping[Position, Any]) -> bool:
        """The direction gets what the probes found; False if that is not finite."""
        eps, bucket = self._groups.eps()[0], self.weights.buckets[0]
        found = slopes(pairs(losses), eps, bucket.device).float().tolist()
        if all(map(math.isfinite, found)):
            self.weights.learn(found)
            return True
        return False

    # ---- the step -------------------------------------------------------------------------------

    @plain_tensors
    def estimate(self, closure: Closure, weight: Any = 1.0) -> Tensor:
        """The first half of a step: the losses and what they tell. `step` without arguments is the
        second. For loops that call ``optimizer.step()`` themselves: this takes the place of their
        ``loss.backward()``.

        Args:
            closure, weight: as in `step`.

        Returns:
            The mean loss, as `step`.

        Raises:
            As `step`; also RuntimeError in a CUDA graph capture.

        Whoever looks at the weights before `step` finds theta, at the price of a sweep. Another
        estimate takes the place of one that waits.
        """
        check_closure(closure)
        if capturing():
            raise RuntimeError("only step(closure) can be captured in a graph, not its halves")
        with self._access.a_step():
            self.ranks.weigh(weight)
            self._access.drop_pending()
            estimate = self.measure(self._access.interruptible(closure))
            self._access.pending = lambda: estimate
            self.weights.beside.attach([])  # who looks meets the guard
            return estimate.loss

    @plain_tensors
    def step(  # type: ignore[override]
        self,
        closure: Closure | None = None,
        *,
        loss_plus: Loss | Sequence[Loss] | None = None,
        loss_minus: Loss | Sequence[Loss] | None = None,
        weight: Any = 1.0,
    ) -> Tensor:
        """One step, from a closure, from losses, or from what `estimate` found.

        Args:
            closure: computes the loss, any number that says how bad the weights are (also one
                without a derivative), without a backward pass; a large batch in parts, if it likes.
                Called twice, at ``theta + eps z`` and ``theta - eps z`` (one-sided: theta), under
                `torch.no_grad`, with the same state of torch's global generators, so dropout masks
                agree; these generators end where one call leaves them. The model's train or eval
                mode is yours. Several queries or blocks call it more often.
            loss_plus, loss_minus: the two losses, from `perturb` or `perturbed`; with several
                queries, sequences of them.
            weight: of this rank's losses, where ranks have batches of their own: how many examples
                or tokens they are means of. A number >= 0 or a tensor of one; the loss of the step
                is ``sum(weight * loss) / sum(weight)``. Without effect in `step` after `estimate`.

        Returns:
            The mean over the queries of ``(L+ + L-) / 2``, float32 tensor [].

        Raises:
            TypeError: the loss is not a scalar.
            Whatever the closure raises; the weights are then at theta.

        The closure must not rebind a parameter (``p.data = ...``) while something else keeps its
        old memory: sweeps would go on there. Between steps it may be done.

        Where ranks take a step together, an error on one of them is an error on all, with all
        weights at theta.

        If a loss is not finite, the weights go back to theta, the step is counted in
        `skipped_steps` and nothing is applied.

        On a GPU a step with a closure can be captured in a CUDA graph, after two ordinary ones, and
        replayed as often as you like: each replay is the next step, with its own noise. What the
        host gives (eps, a lr that is no tensor on the device) stays as it was when captured.
        """
        if closure is not None:
            check_closure(closure)
        with self._access.a_step():
            self.ranks.weigh(weight)
            if capturing():
                return self._captured(closure)
            pending = self._access.pending
            if closure is None and loss_plus is None and loss_minus is None and pending:
                return self._step_pending(pending)
            self._access.drop_pending()
            if closure is not None:
                if loss_plus is not None or loss_minus is not None:
                    raise TypeError("step() takes a closure or two losses, not both")
                return self._finish(self.measure(self._access.interruptible(closure)))
            self.weights.look_again()
            if loss_plus is None and loss_minus is None and _probed(self.param_groups):
                self.weights.make_state(self.rule, self.state)
                return None  # type: ignore[return-value]
            if loss_plus is None or loss_minus is None:
                raise TypeError(self.needs)
            if self.needs_closure or self.probes():
                raise TypeError(f"{type(self).__name__}.step() needs a closure")
            self._groups.check_changes()
            apart = 1 if self.schedule.one_sided else 2
            plus, minus = self._evaluation.given(loss_plus), self._evaluation.given(loss_minus)
            sides = [(above, below, apart) for above, below in zip(plus, minus, strict=True)]
            return self._finish(self._estimated(sides))

    def _finish(self, estimate: Estimate) -> Tensor:
        with self._timer("update"):
            self.update(transformed(self._transform, estimate))
        return estimate.loss

    def _step_pending(self, pending: Callable[[], Estimate]) -> Tensor:
        """The second half of a step."""
        estimate = pending()  # if something is missing there, it goes on waiting
        self._access.pending = None
        self.weights.look_again()
        self._groups.hold_eps()
        if self.weights.parameters.changed(self.direction):
            raise RuntimeError("parameters changed between estimate() and step(): estimate anew")
        return self._finish(estimate)

    def _captured(self, closure: Closure | None) -> Tensor:
        if closure is None:
            raise RuntimeError("only a step with a closure can be captured")
        evaluate = self._access.interruptible(closure)
        return self._capture.record(self.rule, lambda: self._finish(self.measure(evaluate)))


def _check_probes(name: str, probes: Sequence[Position], ahead: bool) -> None:
    """Raises:
    ValueError: probes can't be taken there, or not now: a sweep has gone ahead of them.
    """
    if ahead:
        raise ValueError(
            f"{name} learns its directions before a step, which a deferred sweep would need at the "
            "end of the last one: deferred=False"
        )
    for position in probes:
        if position.sign and not position.probe:
            raise ValueError(f"{name}.probes(): {position} is along the z of a query: probe=True")


def _probed(param_groups: list[dict[str, Any]]) -> bool:
    """Whether this is torch.distributed.checkpoint, which makes the state of optimizers by a
    step with zero gradients and lr 0, and puts both back only if nothing is raised. What it loads
    goes into the state that it finds."""
    grads = [p.grad for group in param_groups for p in group["params"] if p.grad is not None]
    return (
        bool(grads)
        and not any(float(group["lr"]) for group in param_groups)
        and not any(bool(grad.any()) for grad in grads)
    )
