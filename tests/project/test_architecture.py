"""The layout: folders that import downwards only, and no circles inside one."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Lowest first. A module imports from its own folder and from lower ones.
FOLDERS = (
    "zo_fused_kernels",
    "zo_fused",  # what lies beside the folders
    "zo_fused.noise",
    "zo_fused.sweeps",
    "zo_fused.parallel",
    "zo_fused.step",
    "zo_fused.directions",
    "zo_fused.rules",
    "zo_fused.methods",
    "zo_fused.replaying",
    "zo_fused.hf",
    "zo_fused.integrations",
    "zo_fused.ray",
    "zo_fused.task",
    "zo_fused.cli",
)


def module_name(path: Path) -> str:
    relative = path.relative_to(ROOT / "kernels" if "kernels" in path.parts else ROOT)
    parts = relative.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {
    module_name(path): path
    for path in [*(ROOT / "zo_fused").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
}
PACKAGES = {name for name, path in SOURCES.items() if path.name == "__init__.py"}


def for_readers_of_types(node: ast.AST) -> bool:
    """``if TYPE_CHECKING:``, which Python never enters."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def statements(tree: ast.AST) -> list[ast.AST]:
    """Everything that may run, function bodies included."""
    found = []
    for node in ast.iter_child_nodes(tree):
        if not for_readers_of_types(node):
            found += [node, *statements(node)]
    return found


def imports(name: str) -> set[str]:
    """The project's modules that a module imports."""
    found: set[str] = set()
    for node in statements(ast.parse(SOURCES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # from the module's own package
                parts = name.split(".")[: -node.level]
                base = ".".join([*parts, *filter(None, [base])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in SOURCES else base)
    return {module for module in found if module in SOURCES and module != name}


def folder(name: str) -> int:
    """The number of the folder that a module lies in."""
    inside = [i for i, f in enumerate(FOLDERS) if name == f or name.startswith(f"{f}.")]
    return max(inside, key=lambda i: len(FOLDERS[i]))


@pytest.mark.parametrize("name", sorted(SOURCES.keys() - PACKAGES))
def test_module_imports_only_from_its_folder_and_lower_ones(name: str) -> None:
    for imported in imports(name) - PACKAGES:
        assert folder(imported) <= folder(name), (
            f"{name} imports {imported}, and {FOLDERS[folder(imported)]} is above "
            f"{FOLDERS[folder(name)]}"
        )


def test_no_module_imports_itself_through_others() -> None:
    graph = {name: imports(name) - PACKAGES for name in SOURCES.keys() - PACKAGES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("name", sorted(PACKAGES))
def test_package_files_import_nothing_eagerly(name: str) -> None:
    """Python runs a package's __init__ before its modules: an eager one is a hidden upward edge."""
    eager = [
        node
        for node in ast.parse(SOURCES[name].read_text()).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        and getattr(node, "module", None) not in ("__future__", "typing")
        and [alias.name for alias in node.names] != ["importlib"]
    ]
    assert not eager


def test_folders_are_those_that_exist() -> None:
    subpackages = {name for name in PACKAGES if name.count(".") == 1}
    assert set(FOLDERS) == subpackages | {"zo_fused", "zo_fused_kernels"}


def test_a_handful_of_modules_lies_beside_the_folders() -> None:
    beside = {name for name in SOURCES.keys() - PACKAGES if name.count(".") == 1}
    assert len({name for name in beside if name.startswith("zo_fused.")}) <= 5


def lines_of(node: ast.ClassDef) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


@pytest.mark.parametrize(
    "name", sorted(n for n in SOURCES if folder(n) < FOLDERS.index("zo_fused.task"))
)
def test_files_and_classes_are_short(name: str) -> None:
    """What a reader holds in mind at once. The command line and its tasks are told otherwise."""
    source = SOURCES[name].read_text()
    assert source.count("\n") <= 400
    classes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)]
    assert {node.name: lines_of(node) for node in classes if lines_of(node) > 250} == {}


def private_names(name: str) -> tuple[set[str], set[str]]:
    """The private names that a file defines, and those that it uses of objects or imports."""
    defined: set[str] = set()
    used: set[str] = set()
    for node in ast.walk(ast.parse(SOURCES[name].read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            defined.add(node.target.id)
        elif isinstance(node, ast.Attribute):
            (used if isinstance(node.ctx, ast.Load) else defined).add(node.attr)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("zo_fused."):
            used |= {alias.name for alias in node.names}
    return tuple(
        {n for n in names if n.startswith("_") and "__" not in n} for names in (defined, used)
    )  # type: ignore[return-value]


OF_TORCH = {"_C", "_parameters"}
IN_STEP = [name for name in SOURCES if FOLDERS[folder(name)] == "zo_fused.step"]
STEPS_OWN = set().union(*(private_names(name)[0] for name in IN_STEP))


@pytest.mark.parametrize("name", sorted(SOURCES.keys() - IN_STEP - PACKAGES))
def test_nothing_outside_uses_private_names_of_the_step(name: str) -> None:
    """A method's words are public: see "Adding a method" in CONTRIBUTING.md."""
    assert {"_access", "_groups", "_evaluation"} <= STEPS_OWN
    defined, used = private_names(name)
    assert not (used & STEPS_OWN) - defined - OF_TORCH
