"""Logs as earlier versions wrote them: the first query's sign alone, queries of a block apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import loss_of, network
from torch import nn

import zo_fused


def alternating_blocks(model: nn.Module) -> list[dict[str, Any]]:
    named = list(model.named_parameters())
    return [{"params": named[i::2], "block": 3 * i + 2} for i in (0, 1)]


def as_before(entry: Any, queries: int, numbers: list[int] | None) -> Any:
    """An entry of a path as version 0.1.0.dev0 wrote it."""
    if isinstance(entry, dict):
        return entry
    sign, query = entry
    if numbers is not None and sign != 0:
        return [sign, query % queries, numbers[query // queries]]
    return [sign, query] if query else sign


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (zo_fused.MeZO, {}),
        (zo_fused.MeZO, {"queries": 3, "one_sided": True}),
        (zo_fused.MeZO, {"queries": 2, "block_order": "simultaneous"}),
        (zo_fused.ZOAdam, {"one_sided": True, "block_order": "simultaneous"}),
        (zo_fused.MeZO, {"block_order": "sequential"}),
        (zo_fused.ZOConservative, {}),
    ],
    ids=str,
)
def test_they_are_replayed_and_continued(
    method: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    queries = options.get("queries", 1)
    apart = options.get("block_order") == "simultaneous"
    numbers = [2, 5] if apart else None

    def make(model: nn.Module) -> Any:
        return method(
            alternating_blocks(model) if "block_order" in options else model, lr=1e-2, **options
        )

    model = network()
    opt = make(model)
    opt.start_log(tmp_path / "now.jsonl")
    for step in range(5):
        opt.step(loss_of(model))
        if step == 2:  # an unusual path
            opt.perturb(1.0, opt.weights.queries() - 1)
            opt.flush()
    opt.close_log()
    saved = opt.state_dict(), {k: v.clone() for k, v in model.state_dict().items()}
    old = []
    for line in (tmp_path / "now.jsonl").read_text().splitlines():
        value = json.loads(line)
        if isinstance(value, dict):
            value["path"] = [as_before(entry, queries, numbers) for entry in value["path"]]
        elif len(value) == 3:
            value[2] = [as_before(entry, queries, numbers) for entry in value[2]]
        old.append(json.dumps(value))
    log = tmp_path / "before.jsonl"
    log.write_text("\n".join(old) + "\n")
    assert log.read_text() != (tmp_path / "now.jsonl").read_text()
    copy = network()
    assert zo_fused.replay(copy, log) == 5
    for p, q in zip(model.parameters(), copy.parameters(), strict=True):
        assert torch.equal(p, q)

    resumed, end = network(), network()
    resumed.load_state_dict(saved[1])
    again = make(resumed)
    again.load_state_dict(saved[0])
    again.start_log(log, resume=True)
    size = len(log.read_text().splitlines())
    for _ in range(2):
        again.step(loss_of(resumed))
    again.flush()
    assert len(log.read_text().splitlines()) == size + 2
    assert zo_fused.replay(end, log) == 7
    for p, q in zip(resumed.parameters(), end.parameters(), strict=True):
        assert torch.equal(p, q)
