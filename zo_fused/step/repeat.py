"""The events of a replay log, done again to the weights of an optimizer. No losses are taken."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from zo_fused.step.direction import Direction, Recorder
from zo_fused.step.groups import COUNTERS
from zo_fused.step.log_lines import Event
from zo_fused.step.rule import Rule
from zo_fused.step.schedule import Position
from zo_fused.step.vectors import Vector, vector
from zo_fused.step.weights import Place, Weights

Update = Callable[[Vector], None]  # an optimizer's `update`


def repeat(
    weights: Weights, rule: Rule, update: Update, events: Iterable[Event], moving: list[int] | None
) -> None:
    """Do to the weights what events of a log did. If something is raised between two events, the
    weights are where the first one left them. The hyper-parameters of the groups end as they begin.

    Args:
        weights: at rest.
        update: of their optimizer.
        moving: positions of the parameters that move now; None: what moves is said by the log.
    """
    groups, parameters = weights.groups, weights.parameters
    hyper = groups.defaults.keys() - set(COUNTERS)
    before = [{name: group[name] for name in hyper if name in group} for group in groups.all]
    recorder = recorder_of(weights.direction, rule)
    if recorder is not None:
        weights.direction = recorder
    try:
        for event in events:
            # None has buckets made as they will be made afterwards, so that these can stay
            parameters.trainable = None if event.trainable == moving else set(event.trainable)
            groups.take(event.groups)
            _repeat(weights, update, event)
    finally:
        if recorder is not None:
            recorder.run()
            weights.direction = recorder.direction
        parameters.trainable = None
        for group, values in zip(groups.all, before, strict=True):
            group.update(values)


def _repeat(weights: Weights, update: Update, event: Event) -> None:
    weights.groups.count(step=event.step, in_place=tuple(event.in_place))
    weights.direction.take_bases(event.bases, weights.groups.all, weights.buckets, event.step)
    probes = event.probes
    for entry in event.path:
        position = None if isinstance(entry, dict) else Position(*entry)
        if probes is not None and not (position and position.probe):
            weights.learn(probes)
            probes = None
        if position:
            weights.visit(position)
        else:
            weights.look()
            place = Place(tuple(entry["at"]), entry.get("query", 0), entry.get("probe", False))
            weights.go(place)
    if probes is not None:
        weights.learn(probes)
    if event.restored:
        weights.flush()
        return
    if not weights.buckets:
        weights.look()
    grads = event.projected_grads or [math.nan] * weights.queries()
    update(vector(grads, weights.buckets[0].device).float())


def recorder_of(direction: Direction, rule: Rule) -> Recorder | None:
    """What stands in for a direction, to make many sweeps at a time. None: it has no such thing, or
    something would be missed, of rules that make their own sweeps, or do more."""
    return direction.recorder() if rule.takes == (Direction,) and rule.sweeps_alone else None
