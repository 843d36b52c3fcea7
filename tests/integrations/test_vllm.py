"""`ZOWorker` on an engine that stands in for vLLM's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from support.models import INPUT, network, same, snapshot
from torch import nn

import zo_fused
from zo_fused.integrations.vllm import ZOWorker

GENERATIONS = 5
POPULATION = 6
OPTIONS: dict[str, Any] = {"lr": 0.05, "eps": 0.02, "population": POPULATION, "seed": 3}
KINDS = [
    pytest.param({}, torch.float32, id="dense"),
    pytest.param({"weight_decay": 0.1}, torch.bfloat16, id="bfloat16"),
    pytest.param({"antithetic": True, "shaping": "centered_rank"}, torch.float16, id="antithetic"),
    pytest.param({"direction": "lowrank", "rank": 2}, torch.bfloat16, id="lowrank"),
    pytest.param({"rounding": "stochastic"}, torch.bfloat16, id="stochastic"),
]


class EnginesOwn(nn.Parameter):
    """vLLM's parameters are of classes of its own."""


class Engine:
    """What of vLLM's LLM matters here: a worker class that gets the extension as a further base,
    parameters that require no gradient, and calls by name."""

    def __init__(self, dtype: torch.dtype = torch.float32, **parallel: Any) -> None:
        model = network(dtype)
        for layer in (model[0], model[2]):
            for name, p in list(layer.named_parameters()):
                own = torch.Tensor._make_subclass(EnginesOwn, p.detach().clone())
                setattr(layer, name, own.requires_grad_(False))

        class Base:
            pass

        class Worker(Base):
            def __init__(self) -> None:
                self.model_runner = SimpleNamespace(model=model)
                self.parallel_config = SimpleNamespace(**parallel)

        for name in dir(ZOWorker):  # vLLM's own check
            assert name.startswith("__") or not hasattr(Worker, name)
        Worker.__bases__ = (*Worker.__bases__, ZOWorker)
        self.model = model
        self.worker: Any = Worker()

    def collective_rpc(self, method: str, args: Any = (), kwargs: Any = None) -> list[Any]:
        return [getattr(self.worker, method)(*args, **(kwargs or {}))]

    @torch.inference_mode()
    def score(self) -> float:
        return reward_of(self.model)


def reward_of(model: nn.Module) -> float:
    x = INPUT.to(next(model.parameters()).dtype)
    return -float(model(x).float().square().mean())


def generation(engines: list[Engine], population: int = POPULATION) -> float:
    """A step over all engines, each of which evaluates a share of the members."""
    rewards = [0.0] * population
    for number, engine in enumerate(engines):
        for member in range(number, population, len(engines)):
            engine.collective_rpc("zo_perturb", (member,))
            rewards[member] = engine.score()
    means = {engine.collective_rpc("zo_update", (rewards,))[0] for engine in engines}
    assert len(means) == 1
    return means.pop()


def started(count: int, dtype: torch.dtype = torch.float32, **options: Any) -> list[Engine]:
    engines = [Engine(dtype) for _ in range(count)]
    for engine in engines:
        engine.collective_rpc("zo_start", kwargs=OPTIONS | options)
    return engines


def in_process(dtype: torch.dtype, **options: Any) -> tuple[nn.Module, zo_fused.ES]:
    model = network(dtype)
    return model, zo_fused.ES(model, **OPTIONS | options)


@pytest.mark.parametrize(("options", "dtype"), KINDS)
def test_engines_and_a_run_in_one_process_agree_to_the_bit(
    options: dict[str, Any], dtype: torch.dtype
) -> None:
    engines = started(3, dtype, **options)
    model, opt = in_process(dtype, **options)
    before = snapshot(model)
    for _ in range(GENERATIONS):
        mean = generation(engines)
        assert mean == float(opt.step(lambda: reward_of(model)))
        assert all(same(snapshot(engine.model), snapshot(model)) for engine in engines)
    assert not same(snapshot(model), before)
    hashes = {engine.collective_rpc("zo_fingerprint")[0] for engine in engines}
    assert len(hashes) == 1


def test_members_differ_and_are_those_of_es() -> None:
    [engine] = started(1)
    model, opt = in_process(torch.float32)
    seen = []
    for member in opt.members():
        engine.collective_rpc("zo_perturb", (member.number,))
        with member:
            assert same(snapshot(engine.model), [p.detach().clone() for p in model.parameters()])
        seen.append(engine.score())
    assert len(set(seen)) == POPULATION


def test_engines_that_take_back_only_their_own_members_would_part() -> None:
    """Why a worker passes all members: `(w + a) - a` need not be w."""
    model = network(torch.bfloat16)
    params = [p.data for p in model.parameters()]
    before = [p.clone() for p in params]
    zo_fused.perturb_(params, 7, 0.02)
    zo_fused.perturb_(params, 7, -0.02)
    assert not same(params, before)


def test_another_process_gets_the_same_bits(tmp_path: Path) -> None:
    code = (
        "import sys, torch; sys.path[:0] = sys.argv[2:]\n"
        "from integrations.test_vllm import generation, started, GENERATIONS, snapshot\n"
        "[e] = started(1, torch.bfloat16)\n"
        "for _ in range(GENERATIONS): generation([e])\n"
        "torch.save(snapshot(e.model), sys.argv[1])\n"
    )
    tests = Path(__file__).parents[1]
    there = tmp_path / "weights.pt"
    subprocess.run([sys.executable, "-c", code, there, tests], check=True, cwd=tmp_path)
    engines = started(2, torch.bfloat16)
    for _ in range(GENERATIONS):
        generation(engines)
    assert all(same(snapshot(engine.model), torch.load(there)) for engine in engines)


def test_a_reset_leaves_engines_alike_wherever_they_were() -> None:
    engines = started(3, torch.bfloat16)
    for engine, member in zip(engines, (0, 2, 5), strict=True):
        engine.collective_rpc("zo_perturb", (member,))
    for engine in engines:
        engine.collective_rpc("zo_reset")
    first, *others = (snapshot(engine.model) for engine in engines)
    assert all(same(first, other) for other in others)
    for got, was in zip(first, snapshot(network(torch.bfloat16)), strict=True):
        torch.testing.assert_close(got, was, rtol=0, atol=0.02)  # a few roundings of 2**-8 |w|
    generation(engines)
    first, *others = (snapshot(engine.model) for engine in engines)
    assert all(same(first, other) for other in others)


def test_a_log_brings_another_engine_to_the_same_weights(tmp_path: Path) -> None:
    log = tmp_path / "replay.jsonl"
    [engine] = started(1, torch.bfloat16, log=log)
    for _ in range(GENERATIONS):
        generation([engine])
    fresh = Engine(torch.bfloat16)
    assert fresh.collective_rpc("zo_replay", (log,)) == [GENERATIONS]
    assert same(snapshot(fresh.model), snapshot(engine.model))


def test_a_new_start_ends_what_was_begun() -> None:
    [engine] = started(1)
    engine.collective_rpc("zo_perturb", (4,))
    engine.collective_rpc("zo_start", kwargs=OPTIONS)
    for got, was in zip(snapshot(engine.model), snapshot(network()), strict=True):
        torch.testing.assert_close(got, was, rtol=0, atol=1e-6)
    generation([engine])


def test_hyper_parameters_change_between_generations() -> None:
    [engine] = started(1)
    model, opt = in_process(torch.float32)
    engine.collective_rpc("zo_set", kwargs={"lr": 0.01})
    opt.param_groups[0]["lr"] = 0.01
    generation([engine])
    opt.step(lambda: reward_of(model))
    assert same(snapshot(engine.model), snapshot(model))
    with pytest.raises(ValueError, match="not 'seed'"):
        engine.collective_rpc("zo_set", kwargs={"seed": 1.0})


def test_rewards_that_are_not_finite_skip_the_step_on_all_engines(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engines = started(2)
    rewards = [1.0, 2.0, float("nan"), 4.0, 5.0, 6.0]
    for engine in engines:
        engine.collective_rpc("zo_update", (rewards,))
    assert caplog.text.count("step 0 skipped") == 2
    one, two = (snapshot(engine.model) for engine in engines)
    assert same(one, two)
    for got, was in zip(one, snapshot(network()), strict=True):
        torch.testing.assert_close(got, was, rtol=0, atol=1e-6)


def test_parameters_made_in_inference_mode() -> None:
    with torch.inference_mode():
        engine = Engine()
    engine.collective_rpc("zo_start", kwargs=OPTIONS)
    [plain] = started(1)
    for _ in range(2):
        generation([engine])
        generation([plain])
    with torch.inference_mode():
        assert same(snapshot(engine.model), snapshot(plain.model))


@pytest.mark.parametrize(
    ("method", "args", "message"),
    [
        ("zo_perturb", (POPULATION,), "members 0 to 5, not 6"),
        ("zo_perturb", (-1,), "not -1"),
        ("zo_perturb", (1,), "rising order"),
        ("zo_update", ([1.0],), "6 members, but 1 rewards"),
    ],
)
def test_mistakes_are_named_and_move_nothing(method: str, args: Any, message: str) -> None:
    [engine] = started(1)
    engine.collective_rpc("zo_perturb", (2,))
    before = [p.detach().clone() for p in engine.model.parameters()]
    with pytest.raises(ValueError, match=message):
        engine.collective_rpc(method, args)
    assert same([p.detach() for p in engine.model.parameters()], before)


@pytest.mark.parametrize(
    "parallel", [{"tensor_parallel_size": 2}, {"enable_expert_parallel": True}], ids=str
)
def test_shards_are_refused(parallel: dict[str, Any], tmp_path: Path) -> None:
    engine = Engine(**parallel)
    with pytest.raises(ValueError, match="shards of a weight"):
        engine.collective_rpc("zo_start", kwargs=OPTIONS)
    with pytest.raises(ValueError, match="shards of a weight"):
        engine.collective_rpc("zo_replay", (tmp_path / "log",))


def test_quantized_weights_and_deferred_are_refused() -> None:
    engine = Engine()
    engine.model[0].weight = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"0.weight is torch.int8: quantized"):
        engine.collective_rpc("zo_start", kwargs=OPTIONS)
    with pytest.raises(ValueError, match="deferred"):
        Engine().collective_rpc("zo_start", kwargs=OPTIONS | {"deferred": True})


# ---- the recipe ---------------------------------------------------------------------------------


class Actor:
    """An actor of Ray's that lives here."""

    def __init__(self, made: Any) -> None:
        self.made = made

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self.made, name))


class StandInLLM(Engine):
    """Writes an answer that depends on its weights."""

    made: ClassVar[list[Any]] = []

    def __init__(self, worker_extension_cls: str, enable_prefix_caching: bool, **_: Any) -> None:
        assert worker_extension_cls == f"{ZOWorker.__module__}.{ZOWorker.__name__}"
        assert not enable_prefix_caching
        super().__init__(torch.bfloat16)
        self.made.append(self)

    def generate(self, prompts: list[str], _: Any) -> list[Any]:
        return [said(text) for text in texts_of(self.model, len(prompts))]


def said(text: str) -> SimpleNamespace:
    return SimpleNamespace(outputs=[SimpleNamespace(text=text)])


@torch.no_grad()
def texts_of(model: nn.Module, count: int) -> list[str]:
    first, second, _ = model(INPUT[:count].bfloat16()).float().unbind(1)
    return [" great" if great else " terrible" for great in first > second]


def test_recipe_with_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def remote(**_: Any) -> Any:
        return lambda kind: SimpleNamespace(remote=lambda **given: Actor(kind(**given)))

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(remote=remote, get=lambda x: x))  # type: ignore[arg-type]
    stand_in = SimpleNamespace(LLM=StandInLLM, SamplingParams=dict)
    monkeypatch.setitem(sys.modules, "vllm", stand_in)  # type: ignore[arg-type]
    monkeypatch.setattr(StandInLLM, "made", [])
    monkeypatch.chdir(tmp_path)
    recipe = Path(__file__).parents[2] / "examples/engines/vllm_ray.py"
    text = recipe.read_text()
    short = text.replace("GENERATIONS = 4, 30, 100", "GENERATIONS = 4, 6, 5").replace("1e-3", "0.3")
    assert short.count("0.3") == 1
    there: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(short.replace('"lr": 5e-4', '"lr": 0.2'), str(recipe), "exec"), there)

    model = network(torch.bfloat16)
    before = snapshot(model)
    opt = zo_fused.ES(model, population=6, eps=0.3, lr=0.2, seed=0)
    for _ in range(5):
        opt.step(lambda: there["reward"]([said(text) for text in texts_of(model, 8)]))
    assert not same(snapshot(model), before)
    assert len(StandInLLM.made) == 4
    assert all(same(snapshot(engine.model), snapshot(model)) for engine in StandInLLM.made)
    fresh = Engine(torch.bfloat16)
    assert fresh.collective_rpc("zo_replay", ("es.jsonl",)) == [5]
    assert same(snapshot(fresh.model), snapshot(model))
