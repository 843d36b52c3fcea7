"""One table of methods, filled by their files and read by everything else."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Unpack

import pytest
import torch
from support.methods import METHODS
from torch import nn

import zo_fused
from zo_fused.cli import defaults, finetune, plan
from zo_fused.cli.main import make_parser
from zo_fused.cli.method_options import by_method
from zo_fused.directions.dense import Dense
from zo_fused.methods import table
from zo_fused.rules.sgd import SGD, ScalarSign
from zo_fused.step.optimizer import ZerothOrderOptimizer
from zo_fused.step.schedule import STEP_DEFAULTS, StepOptions
from zo_fused.task.errors import UserError
from zo_fused.task.optimizers import make_optimizer

ROOT = Path(zo_fused.__file__).parent.parent


def test_the_package_has_the_methods_of_the_table() -> None:
    for name, made in table.methods().items():
        assert issubclass(made, ZerothOrderOptimizer)
        if made.__module__.startswith("zo_fused."):
            assert getattr(zo_fused, name) is made
            assert name in zo_fused.__all__
            assert name in dir(zo_fused)


def test_every_method_is_under_the_tests_that_hold_for_all() -> None:
    """Hybrid, which is two optimizers, has tests of its own."""
    ours = {made for name, made in table.methods().items() if name in zo_fused.__all__}
    assert ours == {row.optimizer for row in METHODS.values()}


def test_editors_see_what_the_table_has() -> None:
    source = Path(zo_fused.__file__).read_text()
    seen = set(re.findall(r"^    from zo_fused\S* import \w+ as (\w+)$", source, re.MULTILINE))
    assert seen == set(zo_fused.__all__) - {"__version__"}


def test_star_and_import_load_no_more_than_they_must() -> None:
    program = (
        "import sys, zo_fused\n"
        "assert not [m for m in sys.modules if m.startswith('zo_fused.methods')]\n"
        "from zo_fused import *\n"
        "assert MeZO.__name__ == 'MeZO' and Hybrid and update_ and noise\n"
        "assert not {'transformers', 'triton'} & set(sys.modules)\n"
        "try:\n"
        "    zo_fused.NoSuchMethod\n"
        "except AttributeError as error:\n"
        "    assert 'NoSuchMethod' in str(error)\n"
        "else:\n"
        "    raise SystemExit('no error')\n"
    )
    subprocess.run([sys.executable, "-P", "-c", program], check=True)


@pytest.mark.parametrize("name", [n for n in table.methods() if n in zo_fused.__all__])
def test_a_method_is_documented(name: str) -> None:
    """In the README, too; with its source where the README says that it stands."""
    paper = re.compile(r"\b[0-9]{4}\.[0-9]{5}\b|this project")
    row = re.compile(rf"^\|[^|]*`{name}\b.*", re.MULTILINE)
    rows = row.findall((ROOT / "docs" / "methods.md").read_text())
    assert rows, f"docs/methods.md has no row of {name}"
    assert paper.search(rows[0]), f"docs/methods.md has no source of {name}"
    readme = (ROOT / "README.md").read_text()
    assert row.search(readme), f"README.md has no row of {name}"
    *_, sources = readme.partition("Sources: ")
    assert "its row of [docs/methods.md](docs/methods.md) and in its docstring" in sources
    told = table.methods()[name].__doc__
    assert "Args:" in told
    assert name == "SeeZO" or paper.search(told), f"the docstring of {name} has no source"


@pytest.mark.parametrize("name", table.recipes())
def test_the_embedded_model_has_a_learning_rate_of_its_own(name: str) -> None:
    assert "lr" in defaults.EMBEDDED_BY_METHOD[name]


@pytest.mark.parametrize("name", [n for n in table.methods() if n in zo_fused.__all__])
def test_signatures_show_all_keywords_once(name: str) -> None:
    made = table.methods()[name]
    parameters = inspect.signature(made).parameters
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    # (Who takes such an option by its own name may have another default.)
    for option in parameters.keys() & StepOptions.__annotations__.keys():
        if parameters[option].kind is inspect.Parameter.KEYWORD_ONLY:
            assert parameters[option].default == STEP_DEFAULTS[option]
    described = inspect.getdoc(made)
    own = [p for p in parameters if p not in STEP_DEFAULTS]
    # "eps: ...", or "queries, distribution: ..." in the Args section
    said = set(re.findall(r"[a-z_]+", " ".join(re.findall(r"^    ([a-z_, ]+):", described, re.M))))
    assert set(own) <= said, set(own) - said


def test_unknown_keywords_are_refused_with_the_nearest_one() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"MeZO\(\) .* 'one_side'; did you mean 'one_sided'"):
        zo_fused.MeZO(model, one_side=True)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'nonsense'$"):
        zo_fused.LOZO(model, nonsense=1)  # type: ignore[call-arg]


@pytest.mark.usefixtures("scratch")
def test_a_name_is_given_once() -> None:
    class MeZO(zo_fused.MeZO):
        pass

    with pytest.raises(ValueError, match="there is a method MeZO in zo_fused"):
        table.method()(MeZO)


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(table, "RECIPES", dict(table.recipes()))
    monkeypatch.setattr(table, "METHODS", dict(table.methods()))


@pytest.mark.usefixtures("scratch")
def test_a_recipe_is_given_once_and_with_arguments_of_its_method() -> None:
    class Another(zo_fused.MeZO):
        pass

    with pytest.raises(ValueError, match="there is a method lozo in zo_fused"):
        table.method(table.Recipe("lozo", "LOZO"))(Another)
    with pytest.raises(TypeError, match="another: Another has no argument 'momentun'"):
        table.method(table.Recipe("another", "Another", {"momentun": 0.9}))(Another)
    assert "Another" not in table.methods()


@pytest.mark.usefixtures("scratch")
def test_a_recipe_may_have_options_that_the_command_line_lacks() -> None:
    @table.method(table.Recipe("scalar", "Scalar", {"sign": "scalar"}))
    class Scalar(zo_fused.ZOSignSGD):
        pass

    by_method.cache_clear()
    try:
        parsed = make_parser(["finetune"]).parse_args(["finetune", "--method", "scalar"])
        options = finetune.options(parsed)
        optimizer = make_optimizer(options.method, options.hyper, nn.Linear(2, 2))
    finally:
        by_method.cache_clear()
    assert type(optimizer) is Scalar
    assert isinstance(optimizer.rule, ScalarSign)


@pytest.mark.parametrize(
    ("name", "has"), [("kerzoo", "plain, deferred"), ("p-gap", "plain, factored"), ("qzo", "plain")]
)
def test_a_schedule_that_a_method_lacks_is_refused_with_those_that_it_has(
    name: str, has: str
) -> None:
    with pytest.raises(UserError, match=f"'paired' is not for the method {name}, which has {has}$"):
        make_optimizer(name, {"schedule": "paired"}, nn.Linear(2, 2))


def test_plan_has_every_method() -> None:
    """But those whose memory config.json doesn't tell."""
    methods = {name for name, (made, _) in table.recipes().items() if not made.quantized}
    assert {name for _, name, _ in plan.cases()} == methods


class Plain(ZerothOrderOptimizer):
    """In no table."""

    def __init__(self, params: Any, lr: float = 1e-2, **common: Unpack[StepOptions]) -> None:
        group = {"lr": lr, "eps": 1e-3, "weight_decay": 0.0}
        super().__init__(params, Dense(), SGD(), group, {}, **common)


def test_signatures_of_subclasses_are_their_own() -> None:
    class Passing(zo_fused.MeZO):
        def __init__(self, *args: Any, **keywords: Any) -> None:
            super().__init__(*args, **keywords)

    class Heavy(zo_fused.MeZO):
        def __init__(self, params: Any, lr: float = 1.0, **common: Unpack[StepOptions]) -> None:
            super().__init__(params, lr, momentum=0.9, **common)

    common = list(STEP_DEFAULTS)
    assert list(inspect.signature(Plain).parameters) == ["params", "lr", *common]
    assert list(inspect.signature(Heavy).parameters) == ["params", "lr", *common]
    assert inspect.signature(Heavy).parameters["lr"].default == 1.0
    assert table.arguments(Passing) == table.arguments(zo_fused.MeZO)
    assert inspect.signature(Plain).parameters["seed"].annotation is int


@pytest.mark.usefixtures("scratch")
def test_a_subclass_with_an_argument_that_logs_would_lack_is_refused() -> None:
    class Scaled(zo_fused.MeZO):
        def __init__(self, params: Any, factor: float = 2.0, **others: Any) -> None:
            super().__init__(params, **others)

    with pytest.raises(TypeError, match="Scaled has the argument 'factor', which MeZO would not"):
        table.method()(Scaled)


@pytest.mark.usefixtures("scratch")
def test_a_log_says_which_module_registers_its_method(tmp_path: Path) -> None:
    model, copy = nn.Linear(4, 4), nn.Linear(4, 4)
    copy.load_state_dict(model.state_dict())
    log = tmp_path / "log.jsonl"
    opt = Plain(model, queries=2)  # in no table, but its log is whole
    opt.start_log(log)
    opt.step(lambda: model(torch.ones(3, 4)).square().mean())
    opt.close_log()
    with pytest.raises(ValueError, match=f"of method 'Plain'.*imported first: import {__name__}$"):
        zo_fused.replay(copy, log)
    table.method()(Plain)
    assert zo_fused.replay(copy, log) == 1
    assert torch.equal(model.weight, copy.weight)


@pytest.mark.usefixtures("scratch")
def test_a_users_method_is_replayed_and_resumed(tmp_path: Path) -> None:
    """One that is registered by the file that makes it; nothing else knows it."""

    @table.method()
    class Halved(ZerothOrderOptimizer):
        def __init__(self, params: Any, lr: float = 1e-2, half: float = 0.5, **common: Any) -> None:
            group = {"lr": lr, "eps": 1e-3, "weight_decay": 0.0}
            super().__init__(params, Dense(), SGD(), group, {"half": half}, **common)
            self.half = half

        def transform(self, grads: Any, plus: Any, minus: Any) -> Any:
            return grads * self.half

    torch.manual_seed(0)
    model, copy = nn.Linear(4, 4), nn.Linear(4, 4)
    copy.load_state_dict(model.state_dict())
    opt = Halved(model, half=0.25, deferred=True, seed=4)
    opt.start_log(tmp_path / "log.jsonl")
    for step in range(5):
        if step == 3:
            saved = opt.state_dict()
            opt = Halved(model, half=0.25, deferred=True, seed=4)
            opt.load_state_dict(saved)
            opt.start_log(tmp_path / "log.jsonl", resume=True)
        opt.step(lambda: model(torch.ones(3, 4)).square().mean())
    opt.flush()
    assert zo_fused.replay(copy, tmp_path / "log.jsonl") == 5
    assert torch.equal(model.weight, copy.weight)
