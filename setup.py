"""Packages from two roots, and native code where it can be built. Metadata is in pyproject.toml.

ZO_FUSED_NATIVE says what to build:

* ``auto`` (default): what the machine allows. Without torch (an isolated build) or a C++ compiler,
  the pure Python package, which runs on the reference backend; likewise if compilation fails.
* ``cpu``: the C++ backend, or stop with the reason.
* ``0``: the pure Python package.

Native code needs the installed torch: ``pip install --no-build-isolation .``
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
CHOICES = ("auto", "cpu", "0")
COMPILE_ARGS = [
    "-std=c++20",
    "-O3",
    "-g0",  # Python's own flags ask for debug symbols: 3 MB of them
    "-ffp-contract=off",  # the noise contract allows no contraction that is not written down
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",  # stable ABI of torch 2.11 and later
]


def say(message):
    print(f"zo_fused: {message}", file=sys.stderr, flush=True)


def why_not_native():
    """None if extensions can be built here, else the reason."""
    try:
        import torch  # noqa: F401
    except ImportError:
        return "torch is not importable in this build; use `pip install --no-build-isolation`"
    compilers = [os.environ["CXX"].split()[-1]] if os.environ.get("CXX") else ["c++", "g++"]
    if not any(map(shutil.which, compilers)):
        return f"no C++ compiler ({' or '.join(compilers)})"
    return None


def cpu_extension():
    from torch.utils.cpp_extension import CppExtension

    return CppExtension(
        "zo_fused._C",
        sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cpu").glob("*.cpp")),
        depends=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h")),
        extra_compile_args={"cxx": COMPILE_ARGS},
        py_limited_api=True,
    )


def native():
    """Arguments of `setup` for the extensions that were asked for and can be built."""
    wanted = os.environ.get("ZO_FUSED_NATIVE", "").strip().lower() or "auto"
    if wanted not in CHOICES:
        sys.exit(f"ZO_FUSED_NATIVE={wanted!r}: choose one of {', '.join(CHOICES)}")
    if wanted == "0":
        return {}
    reason = why_not_native()
    if reason is not None:
        if wanted != "auto":
            sys.exit(f"zo_fused: ZO_FUSED_NATIVE={wanted}, but {reason}")
        say(f"pure Python package: {reason}")
        return {}

    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def build_extension(self, extension):
            try:
                super().build_extension(extension)
            except Exception as error:
                if wanted != "auto":
                    raise
                say(f"{error}\n\nLEFT OUT {extension.name}: it did not compile, see above.")
                say("the package works without it, on the slow reference backend.")

    # The CUDA extension will be a second entry: if it fails, this one must still be built.
    extensions = [cpu_extension()]
    for extension in extensions:
        extension.optional = wanted == "auto"
    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


setup(
    packages=find_packages(include=["zo_fused*"]) + find_packages("kernels"),
    package_dir={"zo_fused_kernels": "kernels/zo_fused_kernels"},
    **native(),
)
