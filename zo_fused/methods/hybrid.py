"""Hybrid: zeroth-order for a part of a model, backpropagation for the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from zo_fused.recording import capturing
from zo_fused.step.interrupts import uninterrupted
from zo_fused.step.optimizer import ZerothOrderOptimizer


class Hybrid:
    """Hybrid ZO-FO (arXiv 2402.11592, the section on extended studies): zeroth-order steps for the
    first layers, first-order steps for the last ones, from the same forward passes.

    ``zo`` takes its step from the losses at ``theta + eps z`` and ``theta - eps z``, where z moves
    its own parameters only. Each of these evaluations also backpropagates, as far as the first
    parameter of ``fo``, which then steps with the mean of the gradients: that at theta, up to
    O(eps^2) (with ``one_sided=True`` up to O(eps)). Both parts see the same theta.

    A step costs zo's forward passes and sweeps, a backward pass through the last layers for every
    evaluation, and a step of fo. Memory beyond the weights: the state of both, the gradients of
    fo's parameters during a step, and the activations of one evaluation from the first parameter of
    fo on: the layers before it keep none. Parameters that are in neither optimizer get no gradient,
    but autograd keeps activations for those that require one: freeze them:

        first, rest = zo_fused.first_layers(model, 8)
        opt = zo_fused.Hybrid(zo_fused.MeZO(first, lr=1e-6), torch.optim.AdamW(rest, lr=1e-5))
        loss = opt.step(lambda: model(**batch).loss)

    Learning rate schedules are made for `zo` and `fo`. The replay log of zo rebuilds zo's
    parameters; save those of fo. With ``deferred=True`` weights of zo rest perturbed between steps:
    evaluate in ``with opt.unperturbed():``. Losses are not scaled, so gradients in float16 may
    underflow. Gradient checkpointing must be that with ``use_reentrant=False``.

    Args:
        zo: an optimizer of zo_fused that evaluates closures at perturbed weights, over its part.
            LOZO in mode "factored" works, but not paired.
        fo: any optimizer of torch.optim, over other parameters, whose step needs no closure.

    Raises:
        TypeError: zo or fo is of another kind; `ForwardGrad` differentiates forward, and
            `ZOConservative` also evaluates where it will not go.
        ValueError: a parameter is in both; or zo is paired, which runs the closure under
            `torch.vmap`, where nothing can be backpropagated.
    """

    def __init__(self, zo: ZerothOrderOptimizer, fo: torch.optim.Optimizer) -> None:
        if not isinstance(zo, ZerothOrderOptimizer) or zo.needs_closure:
            raise TypeError(
                "zo must be an optimizer of zo_fused that takes losses at perturbed weights, "
                f"got {type(zo).__name__}"
            )
        if not isinstance(fo, torch.optim.Optimizer) or isinstance(fo, ZerothOrderOptimizer):
            raise TypeError(f"fo must be an optimizer of torch.optim, got {type(fo).__name__}")
        if isinstance(fo, torch.optim.LBFGS):
            raise TypeError("fo must be able to step without a closure; LBFGS is not")
        if zo.weights.beside.paired:
            raise ValueError(
                "paired=True evaluates under torch.vmap, where nothing can be backpropagated; "
                "use paired=False"
            )
        self.zo = zo
        self.fo = fo
        self._refuse_shared()

    def _refuse_shared(self) -> None:
        zeroth = {_memory(p) for p in _parameters(self.zo) if p.data_ptr()}
        for group in self.fo.param_groups:
            names = group.get("param_names") or [None] * len(group["params"])
            for name, p in zip(names, group["params"], strict=True):
                if _memory(p) in zeroth:
                    label = repr(name) if name else f"of shape {tuple(p.shape)}"
                    raise ValueError(
                        f"parameter {label} is in both optimizers; "
                        "zo_fused.first_layers(model, k) splits a model in two"
                    )

    @torch.inference_mode(False)  # what fo makes in a caller's could not be changed outside
    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        """One step of both parts.

        Args:
            closure: computes the loss, a tensor of one element, and calls no backward itself.
                Called as often as zo evaluates (see its `step`), with gradients enabled.

        Returns:
            What zo returns: the mean of its losses, float32 tensor [].

        Raises:
            TypeError: the loss is not a tensor of one element.
            ValueError: fo has parameters that require gradients, but the loss has no graph.
            RuntimeError: in a CUDA graph capture, or zo takes its steps with other ranks.
            Whatever the closure raises; the weights of zo are then at theta, fo has not stepped.

        If a loss is not finite, neither part moves. Gradients are None before and after, also when
        something is raised. Ctrl-C is held back outside the evaluations, so that not one part
        alone makes a step.
        """
        if capturing():
            raise RuntimeError("a hybrid step can't be captured: the host looks at the losses")
        if self.zo.ranks.groups():
            raise RuntimeError(
                "Hybrid does not average the gradients of fo over ranks: their weights would drift "
                "apart. Run one process; zo with parallel=None leaves each to itself"
            )
        losses: list[Tensor] = []
        held = uninterrupted()

        def evaluate() -> Tensor:
            try:
                with held.released():
                    losses.append(self._backpropagate(closure))
            except BaseException:  # zo may evaluate once more, from the start
                losses.clear()
                self.fo.zero_grad(set_to_none=True)
                raise
            return losses[-1]

        self.fo.zero_grad(set_to_none=True)
        try:
            with held:
                loss = self.zo.step(evaluate)
                if self._finite(losses):
                    self._step_first_order(len(losses))
        finally:
            self.fo.zero_grad(set_to_none=True)
        return loss

    def _backpropagate(self, closure: Callable[[], Tensor]) -> Tensor:
        """The loss, detached; its gradients are added to those of fo's parameters."""
        inputs = [p for p in _parameters(self.fo) if p.requires_grad]
        with _frozen(_parameters(self.zo)), torch.enable_grad():
            loss = closure()
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
                raise TypeError(f"the closure must return a scalar loss as a tensor, got {got}")
            if inputs:
                if not loss.requires_grad:
                    raise ValueError(
                        "the loss depends on no parameter of fo that requires gradients: "
                        "the closure must compute it without torch.no_grad, item or detach"
                    )
                # Not into other leaves, whose gradients nobody would use or clear.
                torch.autograd.backward(loss.reshape(()), inputs=inputs)
        return loss.detach()

    def _finite(self, losses: list[Tensor]) -> bool:
        """Whether fo may step: as zo judges, and no loss is infinite or NaN. Gradients are fo's.

        zo decides on the device, but an optimizer of torch cannot: it counts steps and moves its
        state whenever it is called. So on a GPU the host waits here, once a step.
        """
        assert self.zo.projected_grad is not None
        told = [torch.isfinite(t).all() for t in (self.zo.projected_grad.detach(), *losses)]
        return bool(torch.stack([t.to(told[0].device) for t in told]).all())

    def _step_first_order(self, evaluations: int) -> None:
        grads = [p.grad for p in _parameters(self.fo) if p.grad is not None]
        if grads:
            torch._foreach_div_(grads, float(evaluations))
        self.fo.step()

    # ---- what both have, and what is zo's -------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of zo, then those of fo; changes reach them, additions to the list don't."""
        return [*self.zo.param_groups, *self.fo.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """``{"zo": ..., "fo": ...}``, bit for bit; the weights are flushed first."""
        return {"zo": self.zo.state_dict(), "fo": self.fo.state_dict()}

    @torch.inference_mode(False)
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave, both parts or none.

        Raises:
            ValueError: a part is missing, or one of them refuses its own.
        """
        for name in ("zo", "fo"):
            if not isinstance(state_dict, Mapping) or name not in state_dict:
                raise ValueError(f"this is no state of a Hybrid: it has no {name!r}")
        before = self.fo.state_dict()
        self.fo.load_state_dict(state_dict["fo"])
        try:
            self.zo.load_state_dict(state_dict["zo"])
        except BaseException:
            self.fo.load_state_dict(before)
            raise

    @property
    def projected_grad(self) -> Tensor | None:
        """zo's, of the last step."""
        return self.zo.projected_grad

    @property
    def step_count(self) -> int:
        """Steps taken, skipped ones included."""
        return self.zo.step_count

    def flush(self) -> None:
        """Put the weights at theta, see `ZerothOrderOptimizer.flush`."""
        self.zo.flush()

    def unperturbed(self) -> AbstractContextManager[None]:
        """``with opt.unperturbed(): evaluate(model)``: a block with the weights at theta."""
        return self.zo.unperturbed()


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return list(chain.from_iterable(group["params"] for group in optimizer.param_groups))


def _memory(p: Tensor) -> tuple[Any, ...]:
    return p.device, p.data_ptr(), tuple(p.shape), tuple(p.stride())


@contextmanager
def _frozen(params: list[Tensor]) -> Iterator[None]:
    """A block in which these parameters require no gradients."""
    trainable = [p for p in params if p.requires_grad]
    try:
        _require_grad(trainable, False)
        yield
    finally:
        _require_grad(trainable, True)


def _require_grad(params: list[Tensor], value: bool) -> None:
    # A factored direction watches what the first evaluation does with its weights: not this.
    with torch._C.DisableTorchFunction():
        for p in params:
            p.requires_grad = value
