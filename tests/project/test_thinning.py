"""Methods meet the values of a test's other parameters in turn (`support.thinning`)."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from support.methods import CASES
from support.thinning import for_later, left_out

ROOT = Path(__file__).parents[2]
PARITY = "tests/sweeps/test_parity.py"
AXES = {"dtype": 3, "cut": 2, "call": 2}


def items(*names: str, without: tuple[int, ...] | None = None) -> list[Any]:
    """The product of methods and axes, but for one combination."""

    def test() -> None: ...

    made = []
    for name in names:
        for indices in itertools.product(*map(range, AXES.values())):
            if indices != without:
                params = dict(zip(AXES, indices, strict=True)) | {"make": CASES[name]}
                called = dict(zip(AXES, indices, strict=True)) | {"make": names.index(name)}
                spec = SimpleNamespace(params=params, indices=called)
                made.append(Item(function=test, callspec=spec, originalname="test"))
    return made


class Item(SimpleNamespace):
    __hash__ = object.__hash__


def kept(made: list[Any]) -> list[dict[str, Any]]:
    dropped = left_out(made)
    return [item.callspec.params for item in made if item not in dropped]


def test_a_method_meets_every_value() -> None:
    for name in ("MeZO", "LOZO", "ES"):
        found = kept(items(name))
        assert len(found) == 3
        for axis, count in AXES.items():
            assert {one[axis] for one in found} == set(range(count))


def test_a_variant_meets_one_combination_and_values_meet_many_variants() -> None:
    variants = [name for name in CASES if "," in name]
    found = kept(items(*variants))
    assert len(found) == len(variants)
    for axis, count in AXES.items():
        of = [sum(one[axis] == value for one in found) for value in range(count)]
        assert min(of) > len(variants) / count / 2  # binomial, of about 100


def test_what_one_meets_does_not_depend_on_others() -> None:
    alone = kept(items("LOZO, deferred"))
    assert [one for one in kept(items("MeZO", "LOZO, deferred")) if one["make"].name != "MeZO"] == (
        alone
    )


def test_a_test_meets_a_third_of_the_variants_at_once_and_every_optimizer() -> None:
    later = for_later(made := items(*CASES))
    now = {item.callspec.params["make"].name for item in made if item not in later}
    assert {case.optimizer for case in CASES.values()} == {CASES[name].optimizer for name in now}
    assert 0.25 < len(now) / len(CASES) < 0.6  # a third of about 150, and the others


def test_where_a_combination_is_missing_another_is_taken() -> None:
    (usual,) = kept(items("LOZO, deferred"))
    (other,) = kept(items("LOZO, deferred", without=tuple(usual[axis] for axis in AXES)))
    assert sum(usual[axis] == other[axis] for axis in AXES) == 2


def test_tests_without_a_method_stay() -> None:
    plain = Item(function=test_tests_without_a_method_stay)
    spec = SimpleNamespace(params={"dtype": 1}, indices={"dtype": 1})
    other = Item(function=test_tests_without_a_method_stay, callspec=spec)
    assert left_out([plain, other]) == set()


def test_the_parts_of_the_slow_tests_are_all_of_them() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (names,) = re.findall(r"^PARTS := (.*)$", makefile, re.MULTILINE)
    lists = [re.findall(rf"^{name} := (.*)$", makefile, re.MULTILINE)[0] for name in names.split()]
    folders = {f"tests/{path.parent.name}" for path in (ROOT / "tests").glob("*/test_*.py")}
    named = [word for line in lists for word in line.split()]
    assert folders == {name for name in named if name.startswith("tests/")} - {PARITY}
    # that file is in a part of its own, and the rest of its folder in another
    assert named.count(PARITY) == 2
    assert names in (ROOT / ".ci" / "run").read_text()
