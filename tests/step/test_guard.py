"""Whoever looks at weights that a schedule keeps displaced finds theta; and an optimizer that isn't
alone says so."""

from __future__ import annotations

import copy
import gc
import io
import logging
import pickle
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.equality import in_memory
from support.models import INPUT as X
from support.models import network
from torch import Tensor, nn

import zo_fused
from zo_fused.sweeps.prepared import prepare


def loss_of(net: Callable[..., Tensor]) -> Callable[[], Tensor]:
    return lambda: (net(X) ** 2).mean()


RESTING = {
    "MeZO deferred": lambda net, params: zo_fused.MeZO(params, lr=1e-2, eps=1e-2, deferred=True),
    "LOZO deferred": lambda net, params: zo_fused.LOZO(params, lr=1e-2, eps=1e-2, deferred=True),
    "LOZO factored": lambda net, params: zo_fused.LOZO(
        params, lr=1e-1, eps=1e-2, mode="factored", module=net
    ),
}


@pytest.fixture(params=list(RESTING))
def resting(request: pytest.FixtureRequest) -> tuple[nn.Sequential, Any, Tensor]:
    """A network whose weights are displaced, its optimizer, and theta."""

    def run() -> tuple[nn.Sequential, Any]:
        net = network()
        opt = RESTING[request.param](net, net.named_parameters())  # it isn't given the module
        for _ in range(3):
            opt.step(loss_of(net))
        return net, opt

    net, opt = run()
    opt.flush()
    theta = in_memory(net)
    net, opt = run()
    assert (in_memory(net) - theta).abs().max() > 1e-3
    return net, opt, theta


def compiled(net: nn.Module) -> Any:
    return torch.compile(net, backend="eager")


def saved(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


# What each makes of the network; whatever it is, the weights in it must be theta.
LOOKS: dict[str, Callable[[nn.Sequential], Any]] = {
    "state_dict": lambda net: net.state_dict(),
    "state of a part": lambda net: [net[0].state_dict(), net[2].state_dict()],
    "state of the compiled": lambda net: compiled(net).state_dict(),
    "state of a wrapper": lambda net: nn.ModuleDict({"inner": net}).state_dict(),
    "keep_vars": lambda net: saved(net.state_dict(keep_vars=True)),
    "deepcopy": copy.deepcopy,
    "deepcopy of a parameter": lambda net: [copy.deepcopy(p) for p in net.parameters()],
    "save": saved,
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "data": lambda net: [p.data for p in net.parameters()],
    "average": lambda net: [torch.zeros(p.shape).add_(p) for p in net.parameters()],
    "foreach": lambda net: torch._foreach_mul(list(net.parameters()), 1.0),
    "vector": lambda net: nn.utils.parameters_to_vector(net.parameters()),
    "numpy": lambda net: [torch.from_numpy(p.detach().numpy()) for p in net.parameters()],
    "another dtype": lambda net: net.double(),
}


def flattened(made: Any) -> Tensor:
    if isinstance(made, nn.Module):
        made = list(made.parameters())
    if isinstance(made, dict):
        made = list(made.values())
    if isinstance(made, list | tuple):
        return torch.cat([flattened(part) for part in made])
    return made.detach().flatten().float()


@pytest.mark.parametrize("look", list(LOOKS))
def test_whoever_looks_finds_theta(look: str, resting: tuple[nn.Sequential, Any, Tensor]) -> None:
    net, opt, theta = resting
    made = LOOKS[look](net)
    assert torch.equal(flattened(made), theta)
    assert torch.equal(flattened(net), theta)
    assert {type(p) for p in net.parameters()} == {nn.Parameter}
    found = made if isinstance(made, nn.Module) else net
    assert {type(p) for p in found.parameters()} == {nn.Parameter}
    opt.step(loss_of(net.float()))  # and the run goes on


FORWARDS: dict[str, Callable[[nn.Sequential], Tensor]] = {
    "eager": lambda net: net(X),
    "compiled": lambda net: compiled(net)(X),
    "functional": lambda net: torch.func.functional_call(net, dict(net.named_parameters()), (X,)),
    "inference": lambda net: torch.inference_mode()(net)(X),
}


@pytest.mark.parametrize("forward", list(FORWARDS))
def test_a_forward_pass_between_steps_is_at_theta(
    forward: str, resting: tuple[nn.Sequential, Any, Tensor]
) -> None:
    net, _, theta = resting
    plain = network()
    nn.utils.vector_to_parameters(theta, plain.parameters())
    found = FORWARDS[forward](net)
    assert torch.equal(found, plain(X))
    assert torch.equal(in_memory(net), theta)


def test_questions_that_no_weight_answers_move_nothing(
    resting: tuple[nn.Sequential, Any, Tensor],
) -> None:
    net, _, theta = resting
    before = in_memory(net)
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == theta.numel()
    assert {(len(p.shape), p.device.type) for p in net.parameters()} == {(1, "cpu"), (2, "cpu")}
    net.zero_grad()
    net.eval()
    assert torch.equal(in_memory(net), before)


def test_a_compiled_model_is_not_compiled_again_by_steps() -> None:
    net = network()
    counter = torch._dynamo.testing.CompileCounter()
    fast = torch.compile(net, backend=counter)
    opt = zo_fused.MeZO(net, deferred=True)
    for _ in range(4):
        opt.step(loss_of(fast))
    assert counter.frame_count == 1
    fast(X)  # at theta
    for _ in range(2):
        opt.step(loss_of(fast))
    assert counter.frame_count <= 2


@pytest.mark.usefixtures("fresh_heap")
def test_an_optimizer_that_is_gone_has_left_theta(
    resting: tuple[nn.Sequential, Any, Tensor],
) -> None:
    net, opt, theta = resting
    del opt
    gc.collect()
    assert torch.equal(nn.utils.parameters_to_vector(net.parameters()), theta)


@pytest.mark.usefixtures("fresh_heap")
def test_an_optimizer_that_is_gone_after_perturb() -> None:
    net = network()
    theta = in_memory(net)
    opt = zo_fused.MeZO(net)
    opt.perturb(+1)
    assert not torch.allclose(in_memory(net), theta, rtol=0, atol=1e-5)
    del opt
    gc.collect()
    torch.testing.assert_close(in_memory(net), theta, rtol=0, atol=1e-6)


def test_an_optimizer_that_goes_away_with_the_interpreter_does_nothing() -> None:
    """torch ends the process of a finalizer that makes views of tensors then."""
    code = """
import torch, zo_fused
w = torch.nn.Parameter(torch.zeros(8, 8))
def train():
    opt = zo_fused.SubZero([w], rank=2)
    opt.perturb(1.0)
    raise SystemExit("an error of the user's")
train()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (1, "an error of the user's")


@pytest.mark.usefixtures("fresh_heap")
def test_the_guard_does_not_keep_an_optimizer_at_theta_alive() -> None:
    import weakref

    net = network()
    opt = zo_fused.MeZO(net, deferred=True)
    opt.step(loss_of(net))
    opt.flush()
    gone = weakref.ref(opt)
    del opt
    gc.collect()
    assert gone() is None


def test_merging_an_adapter() -> None:
    peft = pytest.importorskip("peft")

    def tuned(flush: bool) -> Tensor:
        torch.manual_seed(0)
        config = peft.LoraConfig(target_modules=["0", "2"], init_lora_weights=False)
        model = peft.get_peft_model(network(), config)
        opt = zo_fused.MeZO(model, lr=1e-2, eps=1e-2, deferred=True)
        for _ in range(3):
            opt.step(loss_of(model))
        if flush:
            opt.flush()
        return in_memory(model.merge_and_unload())

    assert torch.equal(tuned(False), tuned(True))


# ---- not alone ----------------------------------------------------------------------------------


def trajectory(first: Any, second: Any, net: nn.Module) -> Tensor:
    """Two optimizers of torch's interface on one model, in turn."""
    for _ in range(4):
        for opt in (first, second):
            if isinstance(opt, torch.optim.SGD):
                opt.zero_grad()
                loss_of(net)().backward()
                opt.step()
            else:
                opt.step(loss_of(net))
    return flattened(net)


@pytest.mark.parametrize("other", ["SGD", "MeZO", "LOZO factored"])
@pytest.mark.parametrize("name", list(RESTING))
def test_two_optimizers_on_one_model(name: str, other: str) -> None:
    """As if each were flushed before the other steps."""

    def pair(flushed: bool) -> Tensor:
        net = network()
        first = RESTING[name](net, net)
        if other == "SGD":
            second: Any = torch.optim.SGD(net.parameters(), 1e-2)
        elif other == "MeZO":
            second = zo_fused.MeZO(net, lr=1e-2, deferred=True, seed=7)
        else:
            second = zo_fused.LOZO(net, lr=1e-2, mode="factored", seed=7)
        if flushed:
            for opt in (first, second):
                if opt is not second or other != "SGD":
                    opt.register_step_post_hook(lambda opt, *_: opt.flush())
        return trajectory(first, second, net)

    assert torch.equal(pair(False), pair(True))


def test_another_optimizer_in_the_middle_of_a_step_is_refused() -> None:
    net = network()
    theta = in_memory(net)
    opt, other = zo_fused.MeZO(net), zo_fused.LOZO(net)
    with pytest.raises(RuntimeError, match="a MeZO has perturbed parameters of this LOZO"):
        opt.step(lambda: other.step(loss_of(net)))
    torch.testing.assert_close(in_memory(net), theta, rtol=0, atol=1e-6)
    opt.perturb(+1)
    with pytest.raises(RuntimeError, match="has perturbed"):
        other.step(loss_of(net))
    opt.flush()
    other.step(loss_of(net))
    apart = network()
    inner = zo_fused.MeZO(apart)
    opt.step(lambda: (inner.step(loss_of(apart)), loss_of(net)())[1])  # other weights: why not


IN_CLOSURE: dict[str, Callable[[Any], Any]] = {
    "step": lambda opt: opt.step(lambda: 1.0),
    "flush": lambda opt: opt.flush(),
    "perturb": lambda opt: opt.perturb(-1),
    "unperturbed": lambda opt: opt.unperturbed().__enter__(),
    "state_dict": lambda opt: opt.state_dict(),
    "eval": lambda opt: opt.eval(),
}


@pytest.mark.parametrize("call", list(IN_CLOSURE))
@pytest.mark.parametrize("deferred", [False, True])
def test_the_closure_must_not_use_the_optimizer(call: str, deferred: bool) -> None:
    net, twin = network(), network()
    opt = zo_fused.MeZO(net, lr=1e-2, deferred=deferred)
    alike = zo_fused.MeZO(twin, lr=1e-2, deferred=deferred)
    with pytest.raises(RuntimeError, match="in the middle of a step"):
        opt.step(lambda: (IN_CLOSURE[call](opt), loss_of(net)())[1])
    with pytest.raises(ZeroDivisionError):
        alike.step(lambda: 1 / 0)
    for model, optimizer in ((net, opt), (twin, alike)):
        optimizer.step(loss_of(model))
        optimizer.flush()
    assert torch.equal(in_memory(net), in_memory(twin))


def test_a_second_thread_is_refused() -> None:
    net = network()
    opt = zo_fused.MeZO(net)
    inside, go_on = threading.Event(), threading.Event()

    def slow() -> Tensor:
        inside.set()
        assert go_on.wait(30)
        return loss_of(net)()

    thread = threading.Thread(target=lambda: opt.step(slow))
    thread.start()
    assert inside.wait(30)
    try:
        with pytest.raises(RuntimeError, match="another thread"):
            opt.step(loss_of(net))
    finally:
        go_on.set()
        thread.join()
    assert opt.step_count == 1
    opt.step(loss_of(net))


def test_autograd_notices_that_weights_have_changed() -> None:
    net = network()
    calls: list[Callable[[Any], Any]] = [
        lambda opt: opt.step(loss_of(net)),
        lambda opt: opt.perturb(+1),
        lambda opt: opt.flush(),
    ]
    opt = zo_fused.MeZO(net)
    for call in calls:
        loss = sum((p * p).sum() for p in net.parameters())
        assert isinstance(loss, Tensor)
        call(opt)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_autograd_notices_functions_too() -> None:
    p = nn.Parameter(torch.ones(5))
    sweep = prepare("normal_", [[p]], torch.zeros(1, dtype=torch.int64), torch.zeros(1).long())
    for call in (
        lambda: zo_fused.perturb_([p], 3, 0.5),
        lambda: zo_fused.lowrank_perturb_([p], 3, 4, 0.5, rank=2),
        lambda: sweep(torch.ones(1, dtype=torch.int64)),
    ):
        loss = (p * p).sum()
        call()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    with torch.inference_mode():
        unversioned = torch.ones(5)
        zo_fused.perturb_([unversioned], 3, 0.5)
    assert not torch.equal(unversioned, torch.ones(5))


# ---- in the middle ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*RESTING, "MeZO", "halves"])
def test_ctrl_c_at_any_instant_leaves_theta_and_an_optimizer_that_works(name: str) -> None:
    """SIGINT at every entry of a function of the package, in turn, while a step is made."""
    net = network()
    opt = RESTING[name](net, net) if name in RESTING else zo_fused.MeZO(net, lr=0.0, eps=1e-2)
    opt.param_groups[0]["lr"] = 0.0
    if name in RESTING:
        opt.step(loss_of(net))
    opt.flush()
    theta = in_memory(net)

    def step() -> None:
        if name == "halves":
            opt.estimate(loss_of(net))
            opt.step()
        else:
            opt.step(loss_of(net))

    hit, instant = True, 0
    while hit:
        hit, seen = False, 0

        def interrupt(frame: Any, event: str, argument: Any, at: int = instant) -> None:
            nonlocal hit, seen
            if event == "call" and "zo_fused" in frame.f_code.co_filename:
                seen += 1
                if seen == at + 1:
                    hit = True
                    signal.raise_signal(signal.SIGINT)

        try:
            sys.setprofile(interrupt)
            step()
        except KeyboardInterrupt:
            pass
        finally:
            sys.setprofile(None)
        found = torch.cat([p.detach().flatten().clone() for p in net.parameters()])
        # each step may round every weight (below 2) thrice, by 2**-24 at most
        torch.testing.assert_close(found, theta, rtol=0, atol=(instant + 2) * 3 * 2**-23)
        instant += 7  # about sixty instants a step
    assert instant > 100
    step()


def test_autocast_around_a_step_casts_the_weights_anew() -> None:
    """Its cache would give both evaluations the weights of the first."""
    ends = []
    for around in (False, True):
        net = network()
        opt = zo_fused.MeZO(net, lr=1e-2, eps=1e-2)

        def loss(net: nn.Module = net) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return (net(X).float() ** 2).mean()

        with torch.autocast("cpu", torch.bfloat16, enabled=around):
            for _ in range(3):
                opt.step(loss)
                assert opt.projected_grad != 0
            ends.append(loss())
    assert torch.equal(*ends)


def test_one_operation_over_parameters_of_two_optimizers() -> None:
    nets = network(), network()
    opts = [zo_fused.MeZO(net, lr=1e-2, eps=1e-2, deferred=True) for net in nets]
    for net, opt in zip(nets, opts, strict=True):
        opt.step(loss_of(net))
    both = [p for net in nets for p in net.parameters()]
    made = torch._foreach_mul(both, 1.0)
    for opt in opts:
        opt.flush()
    for p, copied in zip(both, made, strict=True):
        assert torch.equal(p, copied)


class Doubled(nn.Parameter):
    """A parameter with something to say itself."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})
        return 2 * result if func is nn.functional.linear else result


def test_a_class_of_its_own_keeps_its_say() -> None:
    net = network()
    net[0].weight = Doubled(net[0].weight.data)
    opt = zo_fused.MeZO(net, lr=1e-2, eps=1e-2, deferred=True)
    opt.step(loss_of(net))
    first = net(X)
    assert torch.equal(first, net(X))


def test_a_tensor_that_was_given_the_class_of_a_guarded_one() -> None:
    net = network()
    opt = zo_fused.MeZO(net, lr=1e-2, eps=1e-2, deferred=True)
    opt.step(loss_of(net))
    stray = type(net[0].weight)(torch.ones(3))
    assert torch.equal(copy.deepcopy(stray), torch.ones(3))
    assert type(stray) is nn.Parameter


def test_threads_that_evaluate_between_steps() -> None:
    net = nn.Sequential(nn.Linear(300, 2000), nn.Tanh(), nn.Linear(2000, 50))
    x = torch.randn(4, 300)
    opt = zo_fused.MeZO(net, lr=1e-4, eps=1e-2, deferred=True)
    for _ in range(3):
        opt.step(lambda: (net(x) ** 2).mean())
        together, found = threading.Barrier(3), []

        def evaluate(together: Any = together, found: list[Tensor] = found) -> None:
            together.wait()
            found.append(net[0](x).detach())

        threads = [threading.Thread(target=evaluate) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 3
        for y in found:  # 300 products each, summed in any order; a perturbation moves it by 0.1
            torch.testing.assert_close(y, net[0](x).detach(), rtol=0, atol=300 * 2.0**-24 * 4)


def test_weights_that_share_memory_are_guarded_together() -> None:
    a, b = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
    b.weight = nn.Parameter(a.weight.data)
    net = nn.Sequential(a, b)
    opt = zo_fused.MeZO(net, lr=1e-2, eps=1e-2, deferred=True)
    opt.step(loss_of(net))
    saved_weight = b.state_dict()["weight"].clone()
    opt.flush()
    assert torch.equal(saved_weight, b.weight)


def test_what_an_estimate_was_made_for_must_not_change() -> None:
    net = network()
    net[0].requires_grad_(False)
    opt = zo_fused.MeZO(net, lr=1e-2, eps=1e-2)
    theta = in_memory(net)

    def refused(error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            opt.step()
        torch.testing.assert_close(in_memory(net), theta, rtol=0, atol=1e-6)
        assert opt.step_count == 0

    opt.estimate(loss_of(net))
    net.requires_grad_(True)
    refused(RuntimeError, "parameters changed between estimate")
    opt.estimate(loss_of(net))
    opt.param_groups[0]["eps"] = 1e-3
    refused(ValueError, "eps changed in the middle of a step")
    for change in (
        lambda: opt.load_state_dict(opt.state_dict()),
        lambda: opt.add_param_group({"params": [("new", nn.Parameter(torch.ones(2)))]}),
    ):
        opt.estimate(loss_of(net))
        change()
        refused(TypeError, "needs a closure")
    opt.perturb(+1)
    opt.param_groups[0]["eps"] = 1e-2
    with pytest.raises(ValueError, match="eps changed"):
        opt.step(loss_plus=1.0, loss_minus=2.0)
    with pytest.raises(ValueError, match="eps changed"):
        opt.step(lambda: (opt.param_groups[0].update(eps=2e-2), loss_of(net)())[1])
    torch.testing.assert_close(in_memory(net), theta, rtol=0, atol=1e-6)
    opt.step(loss_of(net))


def test_a_module_with_another_parameter_is_refused() -> None:
    """The optimizer would go on with the old one, which the model no longer uses."""
    for change in (
        lambda net: setattr(net[0], "weight", nn.Parameter(net[0].weight.data.clone())),
        lambda net: net.load_state_dict(network().state_dict(), assign=True),
    ):
        net = network()
        opt = zo_fused.MeZO(net)
        opt.step(loss_of(net))
        change(net)
        with pytest.raises(RuntimeError, match="make the optimizer anew"):
            opt.step(loss_of(net))


def test_a_module_with_another_layer_is_refused() -> None:
    """But not where nothing of the old one moved, nor one that wraps it."""
    net = network()
    net[0].requires_grad_(False)
    opt = zo_fused.MeZO(net)
    net[2] = nn.Sequential(net[2], nn.Identity())
    opt.step(loss_of(net))
    net[0] = nn.Linear(6, 8).requires_grad_(False)
    opt.step(loss_of(net))
    before = net[2][0].weight.detach().clone()
    opt.step(loss_of(net))
    assert not torch.equal(net[2][0].weight, before)
    net[2][0] = nn.Linear(8, 3)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"no parameter '2.weight' any more: its layer was"):
            opt.step(loss_of(net))


@pytest.mark.parametrize("sign", [float("nan"), float("inf"), "x"])
def test_a_sign_must_be_a_number(sign: Any) -> None:
    net = network()
    theta = in_memory(net)
    with pytest.raises((TypeError, ValueError), match="sign must be"):
        zo_fused.MeZO(net).perturb(sign)
    assert torch.equal(in_memory(net), theta)


@pytest.mark.parametrize("kw", [{}, {"deferred": True}, {"mode": "factored"}])
def test_a_matrix_that_gets_another_shape(kw: dict[str, Any]) -> None:
    table = nn.Embedding(64, 16)
    net = nn.Sequential(table)

    def loss() -> Tensor:
        return (net(torch.arange(10)) ** 2).mean()

    opt = zo_fused.LOZO(net, lr=1e-2, eps=1e-2, **kw)
    opt.step(loss)
    table.weight.data = torch.randn(70, 16)
    opt.step(loss)
    assert opt.step_count == 2
    opt.flush()


def test_a_state_of_another_shape_leaves_theta() -> None:
    small, large = nn.Linear(6, 1), nn.Linear(6, 8)
    for kind in (zo_fused.ZOAdam, lambda net: zo_fused.LOZO(net, momentum=0.9)):
        opt = kind(small)
        opt.step(loss_of(small))
        other = kind(large)
        other.load_state_dict(copy.deepcopy(opt.state_dict()))
        theta = in_memory(large)
        with pytest.raises(ValueError, match=r"the state has .* of shape"):
            other.step(loss_of(large))
        torch.testing.assert_close(in_memory(large), theta, rtol=0, atol=1e-6)


@pytest.mark.parametrize("step", ["1", True, 1.5, -1])
def test_a_state_s_counters_are_whole_numbers(step: Any) -> None:
    opt = zo_fused.MeZO(network())
    state = opt.state_dict()
    state["param_groups"][0]["step"] = step
    with pytest.raises(ValueError, match="step of the state must be a whole number"):
        opt.load_state_dict(state)


def test_a_flush_is_not_recorded() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    net = network()
    opt = zo_fused.MeZO(net, lr=1e-2, eps=1e-2, deferred=True)
    opt.step(loss_of(net))
    graph = make_fx(lambda x: net(x))(X)
    theta = in_memory(net)
    assert torch.equal(graph(X), net(X))
    assert torch.equal(in_memory(net), theta)
    opt.step(loss_of(net))
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        net(fake.from_tensor(X))
    theta = in_memory(net)
    opt.flush()
    assert torch.equal(in_memory(net), theta)
    opt.step(loss_of(net))
    with pytest.raises(RuntimeError, match=r"flush\(\) before a capture or trace"):
        torch.jit.trace(net, X)


# ---- states -------------------------------------------------------------------------------------

STATES: dict[str, Callable[[Any], Any]] = {
    "MeZO": zo_fused.MeZO,
    "MeZO rademacher": lambda params: zo_fused.MeZO(params, distribution="rademacher"),
    "MeZO-M": lambda params: zo_fused.MeZO(params, momentum=0.9),
    "LOZO": zo_fused.LOZO,
    "LOZO-M": lambda params: zo_fused.LOZO(params, momentum=0.9),
    "ZOAdam": zo_fused.ZOAdam,
    "ZOAdam history": lambda params: zo_fused.ZOAdam(params, history=3),
    "ZOSignSGD": zo_fused.ZOSignSGD,
    "ZOConservative": zo_fused.ZOConservative,
    "ForwardGrad": zo_fused.ForwardGrad,
}


def test_a_state_of_another_method_is_refused() -> None:
    net = network()
    states = {}
    for name, make in STATES.items():
        opt = make(net)
        opt.step(loss_of(net))
        states[name] = opt.state_dict()
    for name, make in STATES.items():
        for other, state in states.items():
            opt = make(net)
            before = opt.state_dict()
            if name == other:
                opt.load_state_dict(state)
                continue
            with pytest.raises(ValueError, match="the state is of"):
                opt.load_state_dict(state)
            assert opt.state_dict() == before


class Swapped(nn.Module):
    """Two layers of one shape, declared in either order."""

    def __init__(self, order: str) -> None:
        super().__init__()
        for name in order:
            setattr(self, name, nn.Linear(6, 6))
        with torch.no_grad():
            for name in "kq":
                for p in getattr(self, name).parameters():
                    p.copy_(
                        torch.randn(p.shape, generator=torch.Generator().manual_seed(ord(name)))
                    )

    def forward(self, x: Tensor) -> Tensor:
        return self.k(x).tanh() @ self.q(x).tanh().t()


def test_a_state_is_loaded_by_name() -> None:
    one, two = Swapped("kq"), Swapped("qk")
    ends = []
    for net in (one, two):
        first = zo_fused.ZOAdam(one, lr=1e-2)
        start = copy.deepcopy(one.state_dict())
        for _ in range(3):
            first.step(loss_of(one))
        net.load_state_dict(one.state_dict())
        opt = zo_fused.ZOAdam(net, lr=1e-2)
        opt.load_state_dict(copy.deepcopy(first.state_dict()))
        for _ in range(3):
            opt.step(loss_of(net))
        ends.append(copy.deepcopy(net.state_dict()))
        one.load_state_dict(start)
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=0, atol=0)
    renamed = zo_fused.ZOAdam([(f"x.{name}", p) for name, p in one.named_parameters()])
    with pytest.raises(ValueError, match=r"of other parameters: 'k\.bias'"):
        renamed.load_state_dict(zo_fused.ZOAdam(one).state_dict())


@pytest.mark.parametrize("name", list(STATES))
def test_distributed_checkpoints_take_a_state_and_change_nothing(name: str) -> None:
    """torch makes the state of a fresh optimizer by a step with zero gradients and lr 0; so the
    state is there, as the first step would have made it."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    net, twin = network(), network()
    opt, other = STATES[name](net), STATES[name](twin)
    before, hyper = in_memory(net), copy.deepcopy(opt.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        get_optimizer_state_dict(net, opt)
    assert torch.equal(in_memory(net), before)
    assert all(p.grad is None for p in net.parameters())
    assert opt.state_dict()["param_groups"] == hyper["param_groups"]
    for _ in range(2):
        opt.step(loss_of(net))
        other.step(loss_of(twin))
    assert torch.equal(in_memory(net), in_memory(twin))


# ---- the two halves of a step -------------------------------------------------------------------


@pytest.mark.parametrize("name", [*STATES, *RESTING])
def test_two_halves_are_a_step(name: str, tmp_path: Path) -> None:
    """Bit for bit; and up to rounding where somebody looks in between, which a replay knows."""

    def run(halves: bool, look: bool = False) -> Tensor:
        net, base = network(), network()
        opt = RESTING[name](net, net) if name in RESTING else STATES[name](net)
        opt.param_groups[0]["lr"] = 1e-2
        opt.start_log(tmp_path / "log.jsonl")
        for _ in range(4):
            if halves:
                loss = opt.estimate(loss_of(net))
                if look:
                    net.state_dict()
                assert opt.step() is loss
            else:
                opt.step(loss_of(net))
        opt.flush()
        zo_fused.replay(base, tmp_path / "log.jsonl")
        assert torch.equal(in_memory(base), in_memory(net))
        return in_memory(net)

    whole = run(False)
    assert torch.equal(run(True), whole)
    # Each look may round every weight (below 4, so by less than 2**-22) once or twice more; the
    # losses of later steps, and so lr * g, change by a little more than that.
    torch.testing.assert_close(run(True, look=True), whole, rtol=0, atol=2e-5)


def test_an_estimate_that_is_not_applied_leaves_theta() -> None:
    net, twin = network(), network()
    opt, alike = zo_fused.MeZO(net), zo_fused.MeZO(twin)
    theta = in_memory(net)
    opt.estimate(loss_of(net))
    torch.testing.assert_close(flattened(net), theta, rtol=0, atol=1e-6)
    opt.estimate(loss_of(net))
    opt.step()
    with pytest.raises(TypeError, match="needs a closure"):
        opt.step()
    alike.step(loss_of(twin))
    torch.testing.assert_close(in_memory(net), in_memory(twin), rtol=0, atol=1e-6)
    assert opt.step_count == 1


def test_a_loop_of_accelerate() -> None:
    """Its wrapper drops what step() returns, and saves and loads the state of what it prepares."""
    accelerate = pytest.importorskip("accelerate")
    net, twin = network(), network()
    accelerator = accelerate.Accelerator(cpu=True)
    opt = accelerator.prepare(zo_fused.MeZO(net, lr=1e-2))
    alike = zo_fused.MeZO(twin, lr=1e-2)
    for _ in range(3):
        loss = opt.optimizer.estimate(loss_of(net))
        opt.step()
        assert torch.equal(loss, alike.step(loss_of(twin)))
    assert torch.equal(in_memory(net), in_memory(twin))


# ---- first mistakes -----------------------------------------------------------------------------

MISTAKES: dict[str, tuple[Callable[[Any, Any], Any], type[Exception], str]] = {
    "a loss": (
        lambda opt, net: opt.step(loss_of(net)()),
        TypeError,
        "a function that computes the loss is needed, got Tensor",
    ),
    "nothing": (lambda opt, net: opt.step(), TypeError, "step\\(\\) needs a closure"),
    "backward before": (
        lambda opt, net: (loss_of(net)().backward(), opt.step()),
        TypeError,
        "There is no backward pass.*estimate.*ZOTrainer",
    ),
    "one loss": (lambda opt, net: opt.step(loss_plus=1.0), TypeError, "loss_minus"),
    "a method": (
        lambda opt, net: zo_fused.MeZO(net.parameters),
        TypeError,
        "params must be a module",
    ),
    "a dict": (
        lambda opt, net: zo_fused.MeZO(net.state_dict()),
        TypeError,
        "params must be a module",
    ),
    "no loss": (lambda opt, net: opt.step(lambda: None), TypeError, "must return a scalar loss"),
}


@pytest.mark.parametrize("mistake", list(MISTAKES))
def test_first_mistakes_are_answered(mistake: str) -> None:
    net = network()
    opt = zo_fused.MeZO(net)
    theta = in_memory(net)
    make, kind, message = MISTAKES[mistake]
    with pytest.raises(kind, match=message):
        make(opt, net)
    torch.testing.assert_close(in_memory(net), theta, rtol=0, atol=1e-6)


def test_backward_in_the_closure_is_answered() -> None:
    net = network()
    with pytest.raises(RuntimeError, match="does not require grad") as caught:
        zo_fused.MeZO(net).step(lambda: loss_of(net)().backward())
    assert "calls no backward()" in caught.value.__notes__[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_loss_in_16_bits_is_reported_once(
    dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    net = network()
    opt = zo_fused.MeZO(net)
    with caplog.at_level(logging.WARNING, "zo_fused"):
        for _ in range(3):
            opt.step(lambda: loss_of(net)().to(dtype))
    told = [r.getMessage() for r in caplog.records if "coarser" in r.getMessage()]
    assert len(told) == 1
    assert str(dtype).removeprefix("torch.") in told[0]


def test_losses_that_never_differ_are_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    net, other = network(), network()
    opt = zo_fused.MeZO(net)
    with caplog.at_level(logging.WARNING, "zo_fused"):
        for step in range(60):
            opt.step(loss_of(net if step == 19 else other))
        assert [r.getMessage() for r in caplog.records if "equal 20 times" in r.getMessage()]
    assert len(caplog.records) == 1


def test_repr_shows_hyperparameters() -> None:
    text = repr(zo_fused.MeZO(network(), lr=1e-4, seed=3))
    assert "lr: 0.0001" in text
    assert "seed: 3" in text
    for inner in ("restores", "contract", "in_place", "method", "param_names"):
        assert inner not in text
