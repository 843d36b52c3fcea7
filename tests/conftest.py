"""Set-up shared by all tests: Triton's interpreter, devices, hypothesis."""

from __future__ import annotations

import gc
import os
import signal
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

GPU = torch.cuda.is_available()
pytest.register_assert_rewrite("support")  # its assertions show values, too

if "PYTEST_XDIST_WORKER" in os.environ:  # the other workers have the other cores
    torch.set_num_threads(1)

# Triton decides when kernels are defined, so this must come before the first `import triton`.
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")

from support.backends import ON_THE_CPU  # noqa: E402
from support.methods import CASES, Case  # noqa: E402
from support.thinning import for_later, left_out  # noqa: E402

# A run started in the background inherits an ignored SIGINT, and the tests of Ctrl-C need it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples on every run: a failure is a failure for everyone. Interpreted kernels are
# slow, so there is no deadline.
hypothesis.settings.register_profile(
    "zo_fused", derandomize=True, deadline=None, max_examples=30, print_blob=True
)
hypothesis.settings.load_profile("zo_fused")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-gpu",
        action="store_true",
        help="fail tests marked `gpu`, instead of skipping them, where there is no GPU",
    )


@pytest.hookimpl(tryfirst=True)  # before `-m` is looked at
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Methods meet the values of other parameters in turn (`support.thinning`), unless tests are
    given by name. The long rows of the parity suite are hours of work for Triton's interpreter. It
    gets the first of each test, besides the covering pairs, every other one of them in `make test`;
    a GPU gets all."""
    seen: set[Any] = set()
    pairs: Counter[Any] = Counter()
    named = any("::" in argument for argument in config.args)
    later = [] if named else list(left_out(items))
    for item in [] if named else for_later(items):
        item.add_marker(pytest.mark.slow)
    for item in items if not GPU else []:
        called = getattr(item, "callspec", None)
        if called is not None and called.params.get("served") == "triton":
            function = item.function  # type: ignore[attr-defined]
            if item.get_closest_marker("slow") is None:
                pairs[function] += 1
                if pairs[function] % 2 == 0 and not named:
                    item.add_marker(pytest.mark.slow)
                continue
            if function in seen:
                later.append(item)
            seen.add(function)
    if later:
        config.hook.pytest_deselected(items=later)
        dropped = set(later)
        items[:] = [item for item in items if item not in dropped]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is None or GPU:
        return
    if item.config.getoption("--require-gpu"):
        pytest.fail("--require-gpu was given and PyTorch sees no GPU", pytrace=False)
    pytest.skip("needs a GPU that PyTorch can see")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if GPU else "cpu")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Networks as small as those of most tests only wait for threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def use_backend() -> Iterator[Callable[[str | None], None]]:
    """A function that forces a backend; afterwards the choice is what it was before."""
    import zo_fused

    previous = zo_fused.set_backend(None)
    zo_fused.set_backend(previous)
    yield zo_fused.set_backend
    zo_fused.set_backend(previous)


@pytest.fixture(params=ON_THE_CPU)
def backend(request: pytest.FixtureRequest, use_backend: Callable[[str | None], None]) -> str:
    """Every backend that serves CPU tensors here, in force."""
    from zo_fused.sweeps import dispatch

    reason = dispatch.why_not(request.param, "cpu")
    if reason is not None:
        pytest.skip(reason)
    use_backend(request.param)
    backend: str = request.param
    return backend


@pytest.fixture(params=CASES.values(), ids=str)
def make(request: pytest.FixtureRequest) -> Case:
    """Every method and every variant of it, one after the other."""
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def fresh_heap() -> Iterator[None]:
    """`gc.collect()` looks at what the test makes. Through all that is loaded it takes seconds."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def sweeps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the sweeps over weights that optimizers make, as they make them."""
    from zo_fused.step.buckets import Bucket

    made: list[str] = []
    original, make = Bucket.prepared, Bucket.__init__
    mine: weakref.WeakSet[Bucket] = weakref.WeakSet()  # an earlier test's may be flushed meanwhile

    def init(self: Bucket, *args: Any, **kw: Any) -> None:
        make(self, *args, **kw)
        mine.add(self)

    def sweep(self: Bucket, name: str, *lists: Any, **options: Any) -> Any:
        run = original(self, name, *lists, **options)
        if self not in mine or name == "factor_momentum_":  # over factors alone
            return run
        return lambda *args, **options: (made.append(name), run(*args, **options))[1]

    monkeypatch.setattr(Bucket, "__init__", init)
    monkeypatch.setattr(Bucket, "prepared", sweep)
    return made


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of models on the Hugging Face hub stand for the embedded model."""
    transformers = pytest.importorskip("transformers")
    import zo_fused

    model = Path(zo_fused.__file__).parent / "embedded/model"

    def embedded(auto: Any) -> Any:
        original = auto.from_pretrained

        def from_pretrained(name: str, *args: Any, **options: Any) -> Any:
            return original(name if Path(name).is_dir() else model, *args, **options)

        return from_pretrained

    for auto in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer):
        monkeypatch.setattr(auto, "from_pretrained", embedded(auto))
