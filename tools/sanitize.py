"""Builds the C++ extension with AddressSanitizer and UndefinedBehaviorSanitizer in
``build/sanitized``, and runs tests of its sweeps with every instruction set that this machine has:
``python tools/sanitize.py [arguments of pytest]``.

Needs GCC with its libraries of sanitizers. An object file is compiled anew if a source is younger.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
HERE = ROOT / "build/sanitized"
ISAS = ("portable", "avx2", "avx512")
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# Memory and times are other ones here, and children that compile know nothing of the sanitizers.
TESTS = ["tests/sweeps/test_native.py", "tests/hostile/test_functions.py", "-m", "not slow"]
TESTS += ["-k", "not (memory or headers or every_instruction or unknown)"]


def compiler_flags() -> list[str]:
    """Those of the package, but for optimization."""
    sys.path.insert(0, str(ROOT))
    from torch.utils.cpp_extension import include_paths

    import setup

    kept = [flag for flag in setup.COMPILE_ARGS if flag not in ("-O3", "-g0")]
    folders = [*include_paths(), sysconfig.get_path("include")]
    defined = ["-DTORCH_EXTENSION_NAME=_C", "-DPy_LIMITED_API=0x030B0000"]
    wanted = ["-O1", "-g1", "-fPIC", "-fno-omit-frame-pointer", *SANITIZERS, *defined]
    return [*kept, *wanted, *(f"-isystem{folder}" for folder in folders)]


def build() -> Path:
    """The extension, if it isn't there."""
    from torch.utils.cpp_extension import library_paths

    sources = sorted((ROOT / "csrc/cpu").glob("*.cpp"))
    newest = max(path.stat().st_mtime for path in (ROOT / "csrc").rglob("*.*"))
    flags = compiler_flags()

    def compiled(source: Path) -> str:
        target = HERE / f"{source.stem}.o"
        if not target.exists() or target.stat().st_mtime < newest:
            unfinished = target.with_suffix(".unfinished")
            subprocess.run(["g++", *flags, "-c", source, "-o", unfinished], check=True)
            unfinished.rename(target)
        return str(target)

    HERE.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    library = HERE / "_C.abi3.so"
    folders = [
        flag for folder in library_paths() for flag in (f"-L{folder}", f"-Wl,-rpath,{folder}")
    ]
    libraries = [*folders, "-ltorch_cpu", "-ltorch", "-lc10"]
    subprocess.run(["g++", "-shared", *SANITIZERS, *objects, *libraries, "-o", library], check=True)
    return library


def main(arguments: list[str]) -> int:
    library, tree = build(), HERE / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    for name in ("zo_fused", "kernels", "tests", "tools"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so"))
    for name in ("pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tree)
    shutil.copy(library, tree / "zo_fused")
    runtimes = [
        subprocess.check_output(["g++", f"-print-file-name=lib{name}.so"], text=True).strip()
        for name in ("asan", "ubsan", "stdc++")
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": ":".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",  # of Python and torch
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": f"{tree}:{tree / 'kernels'}",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        *(arguments or TESTS),
    ]
    asked = "from zo_fused.sweeps.backends import cpu; print(cpu.isa())"
    best = subprocess.check_output([sys.executable, "-c", asked], cwd=ROOT, text=True).strip()
    for name in ISAS[: ISAS.index(best) + 1]:
        print(f"{name}:", flush=True)
        chosen = {**environment, "ZO_FUSED_ISA": name}
        if code := subprocess.run(command, cwd=tree, env=chosen).returncode:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
