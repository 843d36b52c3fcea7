"""Packages from two roots, and native code where it can be built. Metadata is in pyproject.toml.

ZO_FUSED_NATIVE says what to build:

* ``auto`` (default): what the machine allows. Without torch or a C++ compiler, the pure Python
  package, which runs on the reference backend; likewise if compilation fails.
  The CUDA backend too, if there is nvcc and torch is a build for CUDA.
* ``cpu``: the C++ backend, or stop with the reason.
* ``cuda``: the C++ and the CUDA backend, with any build of torch, or stop with the reason.
* ``0``: the pure Python package.

Native code is built with the torch of the environment that pip installs into, also in an isolated
build. Other tools hide it from isolated builds: `--no-build-isolation`.
nvcc is that of CUDA_HOME, or the one on the PATH; TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX") says which
GPUs to compile for.
"""

import importlib.util
import os
import re
import shutil
import site
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
CHOICES = ("auto", "cpu", "cuda", "0")
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
CUDA = "zo_fused._CUDA"
NVCC_ARGS = [
    "-std=c++17",
    "-O3",
    "-fmad=false",  # as -ffp-contract=off above; the other three are nvcc's defaults
    "-ftz=false",
    "-prec-div=true",
    "-prec-sqrt=true",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off,-Wall,-Wextra",
    "--threads=0",  # architectures in parallel
]
ARCHITECTURES = ("8.0", "9.0", "10.0")  # A100, H100, B200; PTX of the last serves newer ones


def say(message):
    print(f"zo_fused: {message}", file=sys.stderr, flush=True)


def torch_is_there():
    """Whether torch can be imported, perhaps from the environment that pip installs into.

    pip hides that environment from an isolated build, which would have to fetch a torch of its own,
    gigabytes, to compile against headers that are at hand. pip's own packages stay first.
    """
    if importlib.util.find_spec("torch") is None:
        sys.path += [*site.getsitepackages(), site.getusersitepackages()]
        importlib.invalidate_caches()
    return importlib.util.find_spec("torch") is not None


def why_not_native():
    """None if extensions can be built here, else the reason."""
    if not torch_is_there():
        return "torch is not importable in this build; install it first"
    compilers = [os.environ["CXX"].split()[-1]] if os.environ.get("CXX") else ["c++", "g++"]
    if not any(map(shutil.which, compilers)):
        return f"no C++ compiler ({' or '.join(compilers)})"
    return None


def native_extension(name, folder, **options):
    from torch.utils.cpp_extension import CppExtension

    return CppExtension(
        name,
        sorted(str(path.relative_to(ROOT)) for path in (ROOT / folder).glob("*.cpp")),
        depends=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h")),
        extra_compile_args={"cxx": COMPILE_ARGS},
        py_limited_api=True,
        **options,
    )


def find_nvcc():
    """nvcc's path, or None."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which(f"{home}/bin/nvcc" if home else "nvcc")


def ask(*command):
    run = subprocess.run(command, capture_output=True, text=True)
    return run.stdout + run.stderr


def gencode(nvcc):
    """nvcc's options for the GPUs to compile for."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if not wanted:
        known = ask(nvcc, "--list-gpu-arch").split()
        wanted = [a for a in ARCHITECTURES if f"compute_{a.replace('.', '')}" in known]
        wanted[-1:] = [f"{a}+PTX" for a in wanted[-1:]]
    options = []
    for name in wanted:
        number, _, ptx = name.replace(".", "").partition("+")
        if not re.fullmatch(r"\d+[af]?", number) or ptx not in ("", "PTX"):
            raise RuntimeError(f"TORCH_CUDA_ARCH_LIST: {name!r} is no architecture")
        codes = (f"sm_{number}", f"compute_{number}") if ptx else (f"sm_{number}",)
        options += [f"-gencode=arch=compute_{number},code={code}" for code in codes]
    return options


def compile_cuda(folder, *options):
    """Compile the kernels into an object file in a folder.

    By calling nvcc, because torch's CUDAExtension refuses a torch that wasn't built for CUDA and
    needs headers that a lean toolkit lacks. The kernels need nothing of torch.
    """
    nvcc, built = find_nvcc(), Path(folder) / "launch.o"
    built.parent.mkdir(parents=True, exist_ok=True)
    command = [nvcc, *NVCC_ARGS, *gencode(nvcc), *options]
    command += ["-c", str(ROOT / "csrc/cuda/launch.cu"), "-o", str(built)]
    say(" ".join(command))
    subprocess.run(command, check=True)
    return str(built)


def why_not_cuda(wanted):
    """None if the CUDA extension was asked for and can be built, else the reason."""
    import torch

    if wanted == "cpu":
        return "ZO_FUSED_NATIVE=cpu"
    if find_nvcc() is None:
        return "no nvcc, neither in CUDA_HOME nor on the PATH"
    if wanted == "auto" and torch.version.cuda is None:
        return "this torch is not built for CUDA"
    return None


def cuda_extension():
    # nvcc may be a script that calls another one; that one says where its toolkit is.
    top = re.search(r"^#\$ TOP=(.*)$", ask(find_nvcc(), "--dryrun", "-c", "x.cu"), re.MULTILINE)
    folders = [Path(top[1]) / name for name in ("lib64", "lib")] if top else []
    return native_extension(
        CUDA,
        "csrc/cuda",
        library_dirs=[str(folder) for folder in folders if folder.exists()],
        extra_link_args=["-lcudart_static", "-ldl", "-lrt", "-lpthread"],
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
        kernels = None  # being compiled

        def build_extensions(self):
            with ThreadPoolExecutor(1) as beside:  # nvcc is busy half a minute on one core
                if any(extension.name == CUDA for extension in self.extensions):
                    self.kernels = beside.submit(compile_cuda, self.build_temp)
                super().build_extensions()

        def build_extension(self, extension):
            try:
                if extension.name == CUDA:
                    beside = self.kernels
                    built = beside.result() if beside else compile_cuda(self.build_temp)
                    extension.extra_objects = [built]
                super().build_extension(extension)
                say(f"built {extension.name}")
            except Exception as error:
                if wanted != "auto":
                    raise
                say(f"{error}\n\nLEFT OUT {extension.name}: it did not compile, see above.")
                say("the package works without it, on another backend.")

    extensions = [native_extension("zo_fused._C", "csrc/cpu")]
    reason = why_not_cuda(wanted)
    if reason is None:
        extensions.append(cuda_extension())
    elif wanted == "cuda":
        sys.exit(f"zo_fused: ZO_FUSED_NATIVE=cuda, but {reason}")
    else:
        say(f"without {CUDA}: {reason}")
    for extension in extensions:
        extension.optional = wanted == "auto"
    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


def description():
    """The README. Its links to files of this archive would lead nowhere on a package index."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.sub(r"\[([^]]+)\]\((?!https?:)[^)]+\)", r"\1", text)


if __name__ == "__main__":  # tests import this file
    setup(
        long_description=description(),
        long_description_content_type="text/markdown",
        packages=find_packages(include=["zo_fused*"]) + find_packages("kernels"),
        package_dir={"zo_fused_kernels": "kernels/zo_fused_kernels"},
        **native(),
    )
