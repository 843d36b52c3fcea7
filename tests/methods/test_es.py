"""ES: a float64 textbook, what shaping makes of rewards, and members whose rewards come from
outside."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.models import loss_of, network, same, snapshot
from support.textbook import EPS, SEED, STEPS, Weights, dense, drawn, loss_of_copy, model_and_tokens
from torch import Tensor

import zo_fused
from zo_fused.cli.defaults import EMBEDDED_DATA
from zo_fused.cli.main import main
from zo_fused.methods.es import ES
from zo_fused.noise import Purpose, derive_key, normal, parameter_id
from zo_fused.step.shaping import SHAPINGS
from zo_fused.task import generation
from zo_fused.task.encoding import Encoded
from zo_fused.task.scoring import Scorer

LR = 1e-3


# ---- the textbook -------------------------------------------------------------------------------


def low_rank(name: str, w: Tensor, step: int, query: int) -> Tensor:
    """EGGROLL's E = A B^T / sqrt(r), here of rank 2, with both factors of the query alone."""
    if w.dim() < 2:
        return dense(name, w, step, query)
    m, n, rank = w.shape[0], w[0].numel(), 2
    a, b = (
        drawn(name, (rows, rank), purpose, step, query)
        for rows, purpose in ((m, Purpose.U), (n, Purpose.V))
    )
    return (a @ b.T / math.sqrt(rank)).view(w.shape)


def scores_of(rewards: list[float], shaping: str) -> list[float]:
    """Of rewards that all differ."""
    n = len(rewards)
    if shaping == "zscore":
        mean = sum(rewards) / n
        std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / n)
        return [(r - mean) / (std + 1e-8) for r in rewards]
    if shaping == "centered_rank":
        return [sorted(rewards).index(r) / (n - 1) - 0.5 for r in rewards]
    return [r / EPS for r in rewards]


def textbook(
    reward: Callable[[Weights], float],
    theta: Weights,
    population: int,
    shaping: str,
    antithetic: bool,
    wd: float,
    draw: Callable[[str, Tensor, int, int], Tensor],
) -> list[float]:
    """theta += lr (1/N sum of score_i s_i z_i - wd theta); the mean rewards."""
    means = []
    for t in range(STEPS):
        signed = [(i // 2, 1 - 2 * (i % 2)) if antithetic else (i, 1) for i in range(population)]
        zs = [{k: s * draw(k, w, t, q) for k, w in theta.items()} for q, s in signed]
        rewards = [reward({k: w + EPS * z[k] for k, w in theta.items()}) for z in zs]
        scores = scores_of(rewards, shaping)
        means.append(sum(rewards) / population)
        for k, w in theta.items():
            climb = sum(score * z[k] for score, z in zip(scores, zs, strict=True)) / population
            theta[k] = w + LR * (climb - wd * w)
    return means


@pytest.mark.parametrize("direction", ["dense", "lowrank"])
@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("shaping", ["zscore", "centered_rank", "none"])
def test_fifty_steps_follow_the_textbook(shaping: str, antithetic: bool, direction: str) -> None:
    """Tolerances. A step of N = 4 rounds every weight five times, by at most 2**-24 |w| with
    |w| < 4, at random: after 50 steps rms(error) < sqrt(250 / 3) * 2**-24 * rms(w) < 6e-7 for
    rms(w) <= 1. The reward, about -14 with a gradient of norm 10, differs by that times the
    gradient, 1e-5, and by its own rounding to float32, 1e-6: below 1e-4. Scores differ by 1e-5 over
    the spread of the rewards, eps times the gradient, 1e-1: by 1e-4, and weights by that times lr,
    at random over 50 steps: by 1e-6 at the worst. So the rms over all weights is below 1e-6.
    """
    model, tokens = model_and_tokens()

    loss = loss_of_copy(model, tokens)

    def reward(weights: Weights) -> float:
        return -float(loss(weights))

    theta = {k: p.detach().double() for k, p in model.named_parameters()}
    start = {k: w.clone() for k, w in theta.items()}
    wd = 0.5 if shaping == "zscore" else 0.0
    if shaping == "none":  # without its level, which would be noise if not antithetic
        level, whole = reward(theta), reward

        def reward(weights: Weights) -> float:
            return 0.1 * (whole(weights) - level)

    draw = low_rank if direction == "lowrank" else dense
    expected = textbook(reward, theta, 4, shaping, antithetic, wd, draw)

    rank = {"rank": 2} if direction == "lowrank" else {}
    opt = ES(
        model, LR, 4, shaping, antithetic, direction, eps=EPS, weight_decay=wd, seed=SEED, **rank
    )
    means = [float(opt.step(lambda: reward(dict(model.named_parameters())))) for _ in range(STEPS)]
    torch.testing.assert_close(torch.tensor(means), torch.tensor(expected), rtol=0, atol=1e-4)
    off = torch.cat([(p - theta[k]).detach().flatten() for k, p in model.named_parameters()])
    moved = torch.cat([(theta[k] - w).flatten() for k, w in start.items()])
    assert moved.square().mean().sqrt() > 1e-3
    assert off.square().mean().sqrt() < 1e-6


def test_antithetic_and_unshaped_it_is_mezo() -> None:
    """With the negative reward for a loss, and N / 2 queries: the same bits."""
    one, two = network(), network()
    es = ES(one, 1e-2, 6, "none", antithetic=True, seed=3)
    mezo = zo_fused.MeZO(two, lr=1e-2, queries=3, seed=3)
    for _ in range(5):
        es.step(lambda: -loss_of(one)())
        mezo.step(loss_of(two))
        torch.testing.assert_close(es.projected_grad, mezo.projected_grad, rtol=1e-6, atol=1e-6)
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


# ---- shaping ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.1, -3.3e7, 0.0])
@pytest.mark.parametrize("shaping", ["zscore", "centered_rank"])
def test_equal_rewards_move_nothing(shaping: str, value: float) -> None:
    """Also where the mean of equal numbers is not that number."""
    scores = SHAPINGS[shaping](torch.full((7,), value, dtype=torch.float64))
    assert not scores.any()
    model = network()
    before = snapshot(model)
    opt = ES(model, 1.0, 7, shaping, deferred=True)
    opt.step(lambda: value)
    assert not opt.projected_grad.any()
    assert opt.skipped_steps == 0
    for p, q in zip(snapshot(model), before, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=8 * 2.0**-24)  # eight sweeps


def test_equal_rewards_share_their_rank() -> None:
    ranks = SHAPINGS["centered_rank"](torch.tensor([5.0, -1.0, 5.0, 9.0, 2.0]).double())
    assert ranks.tolist() == [0.125, -0.5, 0.125, 0.5, -0.25]


@pytest.mark.parametrize("shaping", list(SHAPINGS))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_skips_the_step(
    shaping: str, value: float, caplog: pytest.LogCaptureFixture
) -> None:
    model = network()
    before = snapshot(model)
    opt = ES(model, 1.0, 3, shaping)
    rewards = iter([1.0, value, 2.0])
    opt.step(lambda: next(rewards))
    assert (opt.skipped_steps, opt.step_count) == (1, 1)
    assert "a reward was not finite" in caplog.text
    for p, q in zip(snapshot(model), before, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=4 * 2.0**-24)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"population": 3, "antithetic": True}, "population=3 is odd"),
        ({"population": 1}, "one reward has no zscore"),
        ({"population": 0}, r"population must be a whole number in \[1, "),
        ({"shaping": "softmax"}, "shaping must be one of"),
        ({"direction": "sparse"}, "direction must be one of"),
        ({"rank": 2}, 'rank is for direction="lowrank"'),
    ],
)
def test_what_does_not_work_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ES(network(), **options)


# ---- members ------------------------------------------------------------------------------------

KINDS = [{}, {"antithetic": True}, {"direction": "lowrank", "rank": 2}, {"deferred": True}]


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_members_make_the_step_of_a_closure(options: dict[str, Any], dtype: torch.dtype) -> None:
    one, two = network(dtype), network(dtype)
    kw = {"lr": 1e-2, "population": 4, "eps": 1e-2, "rounding": "stochastic", **options}
    inside, outside = ES(one, **kw), ES(two, **kw)
    for _ in range(3):
        mean = inside.step(loss_of(one))
        for member in outside.members():
            with member:
                value = loss_of(two)()
            member.reward = value  # after the block is as good
        assert torch.equal(outside.step(), mean)
        assert torch.equal(inside.projected_grad, outside.projected_grad)
    assert same(one, two)


def test_the_weights_of_a_member_and_theta_for_who_looks() -> None:
    model = network()
    theta = model[0].weight.detach().clone()
    opt = ES(model, 0.0, 4, antithetic=True, eps=0.25, seed=3)
    z = normal(theta.numel(), derive_key(3, Purpose.DENSE, 0, 1), parameter_id("0.weight"))
    for member in opt.members():
        with member:
            sign, query = member.position.sign, member.position.query
            if query == 1:
                there = theta + sign * 0.25 * z.view(theta.shape)
                torch.testing.assert_close(model[0].weight.detach(), there, rtol=0, atol=1e-6)
            member.reward = 1.0
        if member.number == 1:
            torch.testing.assert_close(model[0].weight.detach(), theta, rtol=0, atol=1e-6)
    opt.step()


def test_one_pass_from_member_to_member() -> None:
    model = network()
    opt = ES(model, 1e-3, 5)
    opt.step(loss_of(model))
    passes: list[tuple[str, int]] = []
    bucket = opt.weights.buckets[0]
    for name, directions in (("dense_", 1), ("dense_steps_", 0)):
        counted(bucket, name, directions, passes)
    for member in opt.members():
        with member:
            member.reward = float(member.number)
    opt.step()
    assert passes == [("dense_", 1), *4 * [("dense_steps_", 2)], ("dense_", 5)]  # with so many z


def counted(bucket: Any, name: str, keys: int, passes: list[tuple[str, int]]) -> None:
    prepared = bucket.prepared(name)

    def run(*rows: Any, **options: Any) -> None:
        passes.append((name, len(rows[0])))
        prepared(*rows, **options)

    bucket._made[(name, None)] = run


def test_rewards_may_come_in_any_order_and_later() -> None:
    one, two = network(), network()
    opt, other = ES(one, 1e-2, 3), ES(two, 1e-2, 3)
    members = list(opt.members())
    for member in reversed(members):
        with member:
            pass
    for number, member in enumerate(members):
        member.reward = torch.tensor([float(number)])
    opt.step()
    rewards = iter([0.0, 1.0, 2.0])
    other.step(lambda: next(rewards))
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)  # not in the order of the closure


def test_rewards_may_be_of_numpy() -> None:
    opt = ES(network(), 1e-2, 4, "none")
    rewards = iter([np.bool_(True), np.array(2.0), np.float32(3), np.int64(4)])
    for member in opt.members():
        with member:
            member.reward = next(rewards)
    assert float(opt.step()) == 2.5
    for wrong in (np.ones(1), np.str_("1")):
        with pytest.raises(TypeError, match="scalar"):
            opt.step(lambda: wrong)  # noqa: B023


def test_a_reward_may_be_a_tensor_that_changes() -> None:
    opt, counter = ES(network(), 1e-2, 3), torch.zeros(())
    for member in opt.members():
        with member:
            member.reward = counter.add_(1)
    assert float(opt.step()) == 2.0
    assert opt.projected_grad[0] > 0 > opt.projected_grad[2]


def test_a_member_without_a_reward_is_named_and_may_have_one_later() -> None:
    model = network()
    before, opt = snapshot(model), ES(model, 1e-2, 3)
    members = list(opt.members())
    for member in members[:2]:
        with member:
            member.reward = float(member.number)
    with pytest.raises(ValueError, match=r"no reward: member 2 \(theta \+ eps z\[2\]\)"):
        opt.step()
    close(model, before)
    with members[2]:
        members[2].reward = 7.0
    opt.step()
    assert opt.step_count == 1
    assert not same(snapshot(model), before)


def test_a_reward_without_with_is_of_other_weights() -> None:
    model = network()
    before, opt = snapshot(model), ES(model, 1e-2, 3)
    members = list(opt.members())
    for member in members:
        member.reward = float(member.number)
    with pytest.raises(ValueError, match=r"reward without `with member:`.*: member 0 \("):
        opt.step()
    close(model, before)
    for member in members[:2]:
        with member:
            member.reward = float(member.number)
    with pytest.raises(ValueError, match=r"than the member's: member 2 \(.*\); enter each, one"):
        opt.step()
    with members[2]:
        pass
    opt.step()
    assert opt.step_count == 1
    assert not same(snapshot(model), before)


def close(model: Any, before: list[Tensor]) -> None:
    for p, q in zip(snapshot(model), before, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=6 * 2.0**-24)


@pytest.mark.parametrize("error", [RuntimeError("simulator"), KeyboardInterrupt()])
def test_an_exception_in_a_block_leaves_theta(error: BaseException) -> None:
    model = network()
    before, opt = snapshot(model), ES(model, 1e-2, 3)
    raw = model[0].weight.data  # memory that no guard watches

    def loop() -> None:
        for member in opt.members():
            with member:
                member.reward = 1.0
                if member.number == 1:
                    raise error

    with pytest.raises(type(error)):
        loop()
    torch.testing.assert_close(raw, before[0], rtol=0, atol=6 * 2.0**-24)
    close(model, before)
    opt.step(loss_of(model))  # and the run goes on
    assert opt.step_count == 1


def test_a_member_whose_simulator_failed_may_be_given_a_reward() -> None:
    model = network()
    opt = ES(model, 1e-2, 3)
    for member in opt.members():
        try:
            with member:
                member.reward = 1.0
                if member.number == 1:
                    raise TimeoutError
        except TimeoutError:
            assert member.reward is None
            member.reward = -1.0
    opt.step()
    assert opt.projected_grad[1] > 0 > opt.projected_grad[0]


def test_a_loop_that_ends_early_leaves_theta() -> None:
    model = network()
    before, opt = snapshot(model), ES(model, 1e-2, 3)
    raw = model[0].weight.data
    for member in opt.members():
        with member:
            member.reward = 1.0
        if member.number == 1:
            break
    torch.testing.assert_close(raw, before[0], rtol=0, atol=6 * 2.0**-24)
    with pytest.raises(ValueError, match="no reward: member 2"):
        opt.step()


def test_misuse_of_members_is_refused() -> None:
    model = network()
    opt = ES(model, 1e-2, 3)
    first, second, _ = opt.members()
    with first, pytest.raises(RuntimeError, match=r"member 1 .* within the block of member 0"):
        second.__enter__()
    stale = first
    list(opt.members())
    with pytest.raises(RuntimeError, match=r"member 0 .* of a generation that is over"):
        stale.__enter__()
    first, *_ = opt.members()
    with pytest.raises(RuntimeError, match="moved within the block of member 0"), first:
        opt.state_dict()
    assert first.reward is None
    with pytest.raises(RuntimeError, match="moved within the block of member 0"), first:
        opt.step(loss_of(model))
    with pytest.raises(RuntimeError, match="of a generation that is over"):
        first.__enter__()
    first, *_ = opt.members()
    opt.param_groups[0]["eps"] = 0.5
    with pytest.raises(ValueError, match="eps changed in the middle of a generation"):
        first.__enter__()
    with pytest.raises(TypeError, match=r"for member in opt\.members"):
        ES(network(), population=2).step()
    with pytest.raises(TypeError, match="needs a closure"):
        ES(network(), population=2).step(loss_plus=1.0, loss_minus=1.0)


def test_a_parameter_that_is_frozen_in_the_middle_ends_the_generation() -> None:
    model = network()
    opt = ES(model, 1e-2, 3)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    first, second, third = opt.members()
    for member in (first, second):
        with member:
            member.reward = loss_of(model)()
    model[0].weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match="parameters changed in the middle of a generation"):
        third.__enter__()
    assert all(torch.allclose(p, before[name], atol=1e-6) for name, p in model.state_dict().items())
    for member in opt.members():  # of those that still move
        with member:
            member.reward = loss_of(model)()
    opt.step()
    assert opt.step_count == 1


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_writes_within_a_block_are_noticed(
    options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = network()
    model[0].weight = torch.nn.Parameter(model[0].weight.detach().T.contiguous().T)
    opt = ES(model, 1e-2, 4, **options)
    theta = {name: p.clone() for name, p in model.state_dict().items()}
    for step in range(3):
        for member in opt.members():
            with member:
                member.reward = loss_of(model)()
                if (step, member.number) == (2, 3):
                    model.load_state_dict(theta)
        said = [text[:37] for text in caplog.messages]
        assert said == ["the block of a member writes to param"][: step == 2]
        opt.step()


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_generations_are_replayed(options: dict[str, Any], tmp_path: Path) -> None:
    """Also those in which somebody looked, or which ended early."""
    model, base = network(torch.float16), network(torch.float16)
    opt = ES(model, 1e-2, 4, eps=1e-2, rounding="stochastic", **options)
    opt.start_log(tmp_path / "log")
    for step in range(4):
        for member in opt.members():
            with member:
                member.reward = loss_of(model)()
            if step == 1:
                model.state_dict()
            if step == 2 and member.number == 1:
                break
        if step != 2:
            opt.step()
    opt.flush()
    opt.close_log()
    zo_fused.replay(base, tmp_path / "log")
    assert same(model, base)


@pytest.mark.parametrize("direction", ["dense", "lowrank"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_members_drift_as_little_as_going_home_after_each(
    dtype: torch.dtype, direction: str
) -> None:
    """4096 weights, 8 members, lr = 0, against ``w += eps z; w -= eps z`` for each in that dtype.
    What is on top: the last member goes home with the update, a rounding without a rounding back:
    half a unit in the last place at most, of the magnitude of w."""
    start = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    w, v = torch.nn.Parameter(start.clone()), start.clone()
    opt = ES([w], 0.0, 8, direction=direction)
    rewards = iter(range(8))
    opt.step(lambda: float(next(rewards)))
    for query in range(8):
        z = torch.randn(64, 64, generator=torch.Generator().manual_seed(query)).to(dtype)
        v.add_(z, alpha=1e-3).sub_(z, alpha=1e-3)
    drift, naive = (float((x.detach() - start).double().norm()) for x in (w, v))
    assert drift < naive + float(start.double().norm()) * torch.finfo(dtype).eps / 2
    assert drift < 3 * naive


# ---- rewards of generations ---------------------------------------------------------------------


def test_scores_of_generations() -> None:
    assert [generation.exact_match([3, 4], right) for right in ([3, 4], [4, 3])] == [1.0, 0.0]
    assert generation.f1([3, 4, 4], [4, 3, 5]) == pytest.approx(2 / 3)  # two in common, of 3 and 3
    assert generation.f1([1], [2]) == 0.0
    made = generation.greedy([[1], [5, 6]], 2, lambda texts: [sum(text) for text in texts])
    assert made == [[1, 2], [11, 22]]


class Successor(torch.nn.Module):
    """After token t comes t + 1."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(10, 1)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embed

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return SimpleNamespace(logits=torch.nn.functional.one_hot((input_ids + 1) % 10, 10).float())


def test_answers_of_several_tokens_are_generated() -> None:
    scorer = Scorer(Successor(), [[3, 4], [4, 4, 6]], pad_id=0)
    examples = [Encoded([1, 2], 0), Encoded([3], 1), Encoded([8, 9, 3], 0)]
    batch = scorer.batch(examples, "exact-match")
    # generated: 3 4; 4 5 6; 4 5
    assert float(scorer.loss(batch, "exact-match")) == pytest.approx(-1 / 3)
    assert float(scorer.loss(batch, "f1")) == pytest.approx(-(1 + 2 / 3 + 1 / 2) / 3)
    parts = [scorer.batch(examples[:1], "f1"), scorer.batch(examples[1:], "f1")]
    assert float(scorer.mean_loss(parts, "f1")) == pytest.approx(-(1 + 2 / 3 + 1 / 2) / 3)
    with pytest.raises(ValueError, match='needs a batch made with loss="f1"'):
        scorer.loss(scorer.batch(examples), "f1")


def test_the_command_line_climbs_minus_the_loss(tmp_path: Path) -> None:
    """Also where that is what the model generates."""
    pytest.importorskip("transformers")
    shutil.copy(EMBEDDED_DATA / "task.json", tmp_path)
    for split in ("train", "dev", "test"):
        lines = (EMBEDDED_DATA / f"{split}.jsonl").read_text().splitlines()
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines[:16]))
    words = ["finetune", "--method", "es", "--loss", "exact-match", "--steps", "3"]
    words += ["--population", "4", "--eps", "1e-2", "--output", str(tmp_path / "out")]
    words += ["--train", str(tmp_path)]
    assert main(words) == 0
    lines = (tmp_path / "out" / "history.jsonl").read_text().splitlines()
    steps = [entry for entry in map(json.loads, lines) if "loss" in entry]
    assert [entry["forwards"] for entry in steps] == [4, 4, 4]
    assert all(-1 <= entry["loss"] <= 0 for entry in steps)
