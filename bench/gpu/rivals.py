"""The rivals on a GPU, and one perturbing sweep of each beside those of zo_fused."""

from __future__ import annotations

import functools
import signal
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from bench.gpu.measure import LOZO_RANK, Bench, Call, summary
from bench.gpu.sweeps import Weights, dense, lowrank
from bench.published import METHODS, MeZO
from bench.rivals import RIVALS, Compiled


def rivals_of(
    bench: Bench, method: str, params: Iterable[nn.Parameter], what: str
) -> dict[str, MeZO]:
    """The published code of a method and its rivals, by name, over the same parameters.

    One that cannot be made here is recorded as skipped. Empty if nobody published the method.
    """
    if method not in METHODS:
        return {}
    published = METHODS[method](params)
    makers: dict[str, Callable[[MeZO], MeZO]] = {**RIVALS}
    makers["compiled"] = functools.partial(compiled, bench)
    if method == "MeZO":
        makers["tl.randn"] = functools.partial(tl_randn, bench)
    made = {"published": published}
    for name, make in makers.items():
        try:
            made[name] = make(published)
        except Exception as error:
            bench.record.skip(f"{what}, {name}", f"{type(error).__name__}: {error}")
    return made


def compiled(bench: Bench, published: MeZO) -> MeZO:
    left = bench.record.data["deadline"] - time.time()
    with alarm(max(1, min(bench.count(45, 30), int(left)))):
        return Compiled(published, "aot_eager" if bench.quick else "inductor")


def tl_randn(bench: Bench, published: MeZO) -> MeZO:
    if not published.params[0].is_cuda:
        raise RuntimeError("Triton compiles for GPUs")
    from bench.gpu.tl_randn import TlRandn

    return TlRandn(published)


def rivals(bench: Bench) -> None:
    """Section: a sweep ``theta + eps z`` over the same fp16 weights, by all in turns."""
    weights = Weights(bench, torch.float16)
    contenders: dict[str, Call] = {}
    for backend in bench.served("rivals"):
        contenders[f"zo_fused MeZO, {backend}"] = bench.on(backend, dense(weights))
        contenders[f"zo_fused LOZO, {backend}"] = bench.on(backend, lowrank(weights, LOZO_RANK))
    for method in METHODS:
        params = [nn.Parameter(p.clone()) for p in weights.params]
        for name, rival in rivals_of(bench, method, params, "rivals").items():
            contenders[f"{name} {method}"] = functools.partial(rival.perturb, 1e-3)
    for name, times in bench.race(contenders, bench.count(21, 3)).items():
        seconds = statistics.median(times)
        bench.record.row(
            "rivals",
            perturbation=name,
            dtype="fp16",
            **{
                "of copy": weights.bytes / seconds / bench.copy_rate(),
                "G elements/s": 1e-9 * weights.elements / seconds,
            },
            **summary(times),
        )


@contextmanager
def alarm(seconds: int) -> Iterator[None]:
    """Raises TimeoutError in the block when the time is over."""

    def ring(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    previous = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
