"""SeeZO: SGD along directions in the space of what the layers see."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zo_fused.checks import choice, whole
from zo_fused.directions.activations import Activations
from zo_fused.directions.factored.direction import Factored
from zo_fused.directions.low_rank import LowRank
from zo_fused.methods.activations import SeesActivations
from zo_fused.methods.beside import evaluated_module, rounding_of
from zo_fused.methods.table import Recipe, method
from zo_fused.parallel.options import Option
from zo_fused.rules.sgd import SGD
from zo_fused.step.optimizer_state import check_form, in_order

INTERVAL = 50


@method(Recipe("seezo", "SeeZO"))
class SeeZO(SeesActivations):
    """Several one-sided queries a step, in the space of what linear layers are given.

    For the weight (m, n) of an `nn.Linear`: ``z = U A^T``, U (m, rank) ~ N(0, 1) drawn for every
    query, A (n, rank) the top right singular vectors of the layer's inputs, found once; vectors get
    dense z. Those are orthonormal coordinates of a space of ``sum(m) * rank`` and the vectors'
    dimensions, which has 20 to 100 times fewer than the weights, and most of the gradient of the
    layers, whose rows lie in the span of the inputs (as AGZO and ZO-Act use). With q queries,
    ``g_i = (L(theta + eps z_i) - L(theta)) / eps``,
    ``theta = theta - lr * (1/q sum_i g_i z_i + weight_decay * theta)``.

    ``q + 1`` forward passes a step and q + 1 sweeps, one fewer with ``deferred``; once, two more
    passes. State: A, 4 n rank bytes a layer, which replay logs hold, too. The first step must be
    ``step(closure)``.

    Args:
        params: the module, or param groups beside ``module=``.
        lr: learning rate: MeZO's times the ratio of dimensions, and more. SmolLM2-135M took 3e-4.
        rank: columns of A.
        queries: q.
        rows: by the name of a matrix, its rows that move. A head has a row for every token of the
            vocabulary, of which few are answers: ``{"lm_head.weight": ids of the answers}``. A head
            that is tied to the embedding moves in these rows or not at all; others move
            in all rows if none are named, and the vocabulary's size times the rank is a lot.
        refresh: steps after which A is found anew, which takes no pass more; None: it stays.
        others: matrices that no `nn.Linear` alone holds and of which no rows are named, such as
            embeddings: "frozen", or "random": A of random vectors, other ones every 50 steps.
        mode: "inplace", or "factored": linear layers are not written within windows of 50 steps or
            `refresh`; see `LOZO`.
        module: the model that the closure evaluates, where `params` is not it.
        rounding: see `LOZO`.
        distribution: of U and of the z of vectors: see `MeZO`.
        eps, weight_decay, seed, parallel, and for mode "inplace" deferred, block_order: see
            `ZerothOrderOptimizer`.

    Raises:
        ValueError: rows are named of what is no matrix that moves, or that it doesn't have, or
            beside weight_decay, which would move the others.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 3e-4,
        rank: int = 16,
        queries: int = 8,
        rows: Mapping[str, Sequence[int]] | None = None,
        refresh: int | None = None,
        others: str = "frozen",
        mode: str = "inplace",
        module: nn.Module | None = None,
        rounding: str | None = None,
        distribution: str = "gaussian",
        *,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        seed: int = 0,
        parallel: Option = "auto",
        deferred: bool = False,
        block_order: str | None = None,
    ) -> None:
        schedule = {"deferred": deferred, "block_order": block_order}
        evaluated = evaluated_module("SeeZO", params, module, mode, False, schedule)
        model = params if isinstance(params, nn.Module) else module
        if model is None:
            raise ValueError(
                "SeeZO looks at the layers of a module: SeeZO(model, ...), or module=model beside "
                "param groups"
            )
        choice("others", others, ("frozen", "random"))
        if refresh is not None:
            refresh = whole("refresh", refresh, 1)
        named = {
            name: sorted({whole(f"a row of {name!r}", row, 0) for row in of})
            for name, of in (rows or {}).items()
        }
        modules = dict(model.named_parameters(remove_duplicate=False))
        shared = [modules[name] for name in named if name in modules]
        activations = Activations(model, refresh, still=True, unit=True, shared=shared)
        of_z: dict[str, Any] = {"distribution": distribution, "activations": activations}
        super().__init__(
            params,
            LowRank(**of_z) if evaluated is None else Factored(evaluated, **of_z),
            SGD(),
            {
                "lr": lr,
                "rank": rank,
                "interval": refresh or INTERVAL,
                "rounding": rounding_of(rounding, mode),
            },
            # a replay, which has no model, moves what the log has
            {
                "mode": mode,
                "distribution": distribution,
                "refresh": refresh,
                "others": "random",
            },
            eps=eps,
            weight_decay=weight_decay,
            seed=seed,
            parallel=parallel,
            deferred=deferred,
            one_sided=True,
            queries=queries,
            block_order=block_order,
        )
        if others == "frozen":
            self.freeze_others()
        self._keep_rows(named, modules, activations.layers())
        for group in self.param_groups:
            self.check_group(group)

    def is_other(self, p: Tensor) -> bool:
        return p.dim() >= 2

    def _keep_rows(
        self, named: Mapping[str, list[int]], known: Mapping[str, Tensor], layers: Container[int]
    ) -> None:
        moving = {id(p) for group in self.param_groups for p in group["params"]}
        for name, rows in named.items():
            p = known.get(name)
            if p is None or id(p) not in layers or id(p) not in moving:
                raise ValueError(
                    f"rows has {name!r}, which is no weight of a linear layer that moves"
                )
            if not rows or rows[0] < 0 or rows[-1] >= len(p):
                raise ValueError(f"rows of {name!r} must be some of 0 to {len(p) - 1}, got {rows}")
            self.state[p]["rows"] = torch.tensor(rows, dtype=torch.int64, device=p.device)

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        if not group["weight_decay"]:
            return
        names = group.get("param_names") or range(len(group["params"]))
        for name, p in zip(names, group["params"], strict=True):
            rows = self.state.get(p, {}).get("rows")
            if rows is not None:
                raise ValueError(
                    f"weight_decay would move all {len(p)} rows of {name!r}, of which SeeZO tunes "
                    f"{len(rows)} (those in rows, on the command line those of the answers): leave "
                    "weight_decay out"
                )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of other optimizers.

        Raises:
            ValueError: the state is of a run in which other rows moved.
        """
        check_form(state_dict)
        groups = in_order(state_dict["param_groups"], self.param_groups)
        saved = [state_dict["state"].get(i, {}) for group in groups for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for p, state in zip(params, saved, strict=False):  # how many there are is looked at next
            theirs, mine = (one.get("rows") for one in (state, self.state.get(p, {})))
            told = [None if rows is None else rows.tolist() for rows in (theirs, mine)]
            if told[0] != told[1]:
                raise ValueError(
                    f"the state is of a run in which rows {told[0]} of a matrix moved, here "
                    f"{told[1]} do: make the optimizer with the rows of that run"
                )
        super().load_state_dict(state_dict)
