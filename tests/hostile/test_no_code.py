"""Nothing that is loaded runs code. `tests/task/test_models.py` has models that bring some."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
FILES = sorted(path for name in ("zo_fused", "kernels") for path in (ROOT / name).rglob("*.py"))

RUNS_CODE = {
    *("eval", "exec", "compile", "__import__", "execfile", "breakpoint", "input"),
    *("os.system", "os.popen", "runpy.run_path", "runpy.run_module", "builtins.exec"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads"),
    *("shelve.open", "dill.load", "joblib.load", "yaml.unsafe_load", "yaml.full_load"),
    *("torch.hub.load", "numpy.load", "np.load", "torch.jit.load", "torch.package.PackageImporter"),
    *("torch.ops.load_library", "ctypes.CDLL", "subprocess.getoutput"),
}
# Names out of the package's own tables, or of optional packages that are written down.
IMPORTS = {
    *("zo_fused/__init__.py", "zo_fused/hf/__init__.py", "zo_fused/noise/__init__.py"),
    *("zo_fused/methods/table.py", "zo_fused/sweeps/dispatch.py"),
    *("zo_fused/sweeps/backends/triton.py", "zo_fused/sweeps/backends/extension.py"),
    "zo_fused/task/errors.py",
}


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Every call of a name or an attribute of one, with that name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def keywords(call: ast.Call) -> dict[str | None, str]:
    return {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}


def wrong(here: str, name: str, call: ast.Call) -> str:
    """What is wrong with a call; or nothing."""
    given = keywords(call)
    if name in RUNS_CODE:
        return "runs code"
    if given.get("shell", "False") != "False":
        return "a shell"
    if name == "torch.load" and given.get("weights_only") != "True":
        return "may hold more than tensors"
    loader = [ast.unparse(argument) for argument in call.args[1:]]
    if name in ("yaml.load", "yaml.load_all") and loader != ["yaml.BaseLoader"]:
        return "may make objects"
    if name.endswith("import_module") and here not in IMPORTS:
        return "a name from where?"
    if given.get("trust_remote_code") in ("True", "None"):
        return "not asked"
    return ""


def test_no_call_runs_what_was_loaded() -> None:
    found = []
    for path in FILES:
        here = path.relative_to(ROOT).as_posix()
        for name, call in calls(path):
            if why := wrong(here, name, call):
                found.append(f"{here}:{call.lineno}: {name}: {why}")
    assert not found


def test_that_test_sees_what_it_looks_for() -> None:
    bad = """
eval(x); pickle.loads(x); torch.load(x); torch.load(x, weights_only=flag); yaml.load(x, yaml.Loader)
subprocess.run(x, shell=True); importlib.import_module(x)
auto.from_pretrained(x, trust_remote_code=None)
"""
    made = [node for node in ast.walk(ast.parse(bad)) if isinstance(node, ast.Call)]
    assert len(made) == 8
    assert all(wrong("zo_fused/x.py", ast.unparse(call.func), call) for call in made)


def test_transformers_is_told_whether_to_trust() -> None:
    """With None it would ask at the terminal."""
    found = []
    for path in FILES:
        for name, call in calls(path):
            if name.endswith(".from_pretrained") and not name.startswith(
                ("peft.", "optional('peft")
            ):
                found.append(path.name)
                assert "trust_remote_code" in keywords(call), f"{path}:{call.lineno}: {name}"
    assert found


class Payload:
    ran = False

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return setattr, (Payload, "ran", True)


def test_the_state_in_a_checkpoint_runs_nothing(tmp_path: Path) -> None:
    from fuzzing.readers import read_state

    file = tmp_path / "optimizer.pt"
    torch.save({"param_groups": [{"step": Payload()}]}, file)
    with pytest.raises(ValueError, match=r"optimizer\.pt can't be loaded"):
        read_state(file)
    assert not Payload.ran
    torch.load(file, weights_only=False)
    assert Payload.ran
