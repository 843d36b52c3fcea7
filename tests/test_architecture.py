"""The floor plan: a module imports only from lower floors, also inside functions."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Lowest first. A module may import any module of a lower floor, none of its own.
FLOORS: list[set[str]] = [
    {"zo_fused.generators"},
    {"zo_fused.checks"},
    {
        "zo_fused.streams",
        "zo_fused._env",
        "zo_fused.interrupts",
        "zo_fused.replay_log",
        "zo_fused.schedule",
        "zo_fused.script",
        "zo_fused.vectors",
    },
    {"zo_fused.reference", "zo_fused.table", "zo_fused.arguments", "zo_fused.layers"},
    {"zo_fused.multi_tensor", "zo_fused.backends.extension"},
    {f"zo_fused.backends.{name}" for name in ("reference", "cpu", "cuda", "triton")},
    {"zo_fused.dispatch"},
    {"zo_fused._ops"},
    {"zo_fused.ops", "zo_fused.prepared", "zo_fused.pairs", "zo_fused.stand_ins"},
    {"zo_fused.noise", "zo_fused.keys", "zo_fused.parameters", "zo_fused.side_weight"},
    {"zo_fused.factors", "zo_fused.guard", "zo_fused.record", "zo_fused.side_paths"},
    {"zo_fused.directions"},
    {"zo_fused.rules", "zo_fused.factored", "zo_fused.recorder"},
    {"zo_fused.optim.base", "zo_fused.moment_rules"},
    {
        f"zo_fused.optim.{name}"
        for name in ("adam", "conservative", "forward_grad", "lozo", "mezo", "sign")
    },
    {"zo_fused.rebuild", "zo_fused.optim.hybrid"},
    {"zo_fused.task.errors", "zo_fused.task.files", "zo_fused.task.order"},
    {f"zo_fused.task.{name}" for name in ("history", "models", "prompt", "records")},
    {
        f"zo_fused.task.{name}"
        for name in ("adapters", "checkpoint", "comparison", "data", "report")
    },
    {"zo_fused.task.encoding"},
    {"zo_fused.task.scoring"},
    {"zo_fused.task.loop", "zo_fused.task.masked"},
    {"zo_fused.task.run", "zo_fused.task.memory"},
    {"zo_fused.cli.defaults", "zo_fused.cli.parser", "zo_fused.cli.runs"},
    {"zo_fused.cli.finetune", "zo_fused.cli.replay", "zo_fused.cli.doctor"},
    {"zo_fused.cli.compare", "zo_fused.cli.plan"},
    {"zo_fused.cli.main"},
]

KERNEL_FLOORS: list[set[str]] = [
    {"zo_fused_kernels.launch"},
    {"zo_fused_kernels.fma", "zo_fused_kernels.philox", "zo_fused_kernels.table"},
    {"zo_fused_kernels.normal", "zo_fused_kernels.rounding", "zo_fused_kernels.blocks"},
    {f"zo_fused_kernels.{name}" for name in ("dense", "fill", "lowrank", "moments", "steps")},
    {"zo_fused_kernels.sweeps"},
]

LAZY = {
    "zo_fused",
    "zo_fused.backends",
    "zo_fused.optim",
    "zo_fused.task",
    "zo_fused.cli",
    "zo_fused_kernels",
}


def module_name(path: Path) -> str:
    relative = path.relative_to(ROOT / "kernels" if "kernels" in path.parts else ROOT)
    parts = relative.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources() -> dict[str, Path]:
    paths = [*(ROOT / "zo_fused").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    return {module_name(path): path for path in paths}


def imports(name: str, path: Path) -> set[str]:
    """The project's modules that a module imports, function-level imports included."""
    known = set(sources())
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [base])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in known else base)
    return {module for module in found if module in known and module != name}


def floors() -> dict[str, int]:
    table = {name: number for number, names in enumerate(FLOORS) for name in names}
    return table | {
        name: number - 100 for number, names in enumerate(KERNEL_FLOORS) for name in names
    }


@pytest.mark.parametrize("name", sorted(set(sources()) - LAZY))
def test_module_imports_only_from_lower_floors(name: str) -> None:
    table = floors()
    assert name in table, f"{name} has no floor: add it to tests/test_architecture.py"
    for imported in imports(name, sources()[name]) - LAZY:
        assert table[imported] < table[name], (
            f"{name} (floor {table[name]}) imports {imported} (floor {table[imported]})"
        )


@pytest.mark.parametrize("name", sorted(LAZY))
def test_package_files_import_nothing_eagerly(name: str) -> None:
    """Python runs a package's __init__ before its modules: an eager one is a hidden upward edge."""
    body = ast.parse(sources()[name].read_text()).body
    eager = [
        node
        for node in body
        if isinstance(node, ast.Import | ast.ImportFrom)
        and getattr(node, "module", None) not in ("__future__", "typing")
        and [alias.name for alias in node.names] != ["importlib"]
    ]
    assert not eager


def test_floors_name_existing_modules() -> None:
    assert set(floors()) | LAZY == set(sources())
