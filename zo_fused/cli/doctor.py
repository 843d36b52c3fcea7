"""``zo-fused doctor``: what this machine has, what serves it, and what to do about the rest."""

from __future__ import annotations

import argparse
import json
import platform
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

HELP = "show versions, devices and backends, and what to do where something is missing"
PACKAGES = ("torch", "triton", "transformers", "datasets", "tqdm", "matplotlib", "peft", "lm_eval")
_FOR_FINETUNE = ("transformers", "datasets", "tqdm", "matplotlib")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("--json", action="store_true", help="print JSON for programs")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> dict[str, str]:
    """Device -> description."""
    import torch

    devices = {"cpu": f"{platform.machine()}, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        devices[f"cuda:{index}"] = f"{properties.name}, {memory:.0f} GiB"
    return devices


def _asked(question: Callable[..., str | None], *about: str) -> str | None:
    """The answer of a question of `zo_fused.sweeps.dispatch`, or the error that it met."""
    try:
        return question(*about)
    except Exception as error:  # a broken backend is a finding, not a crash
        return f"{type(error).__name__}: {error}"


def _chosen(device: str) -> str | None:
    import zo_fused

    try:
        with warnings.catch_warnings(action="ignore"):  # their text is among the findings
            return zo_fused.backend_of(device)
    except (RuntimeError, ValueError, ImportError):
        return None


def examine() -> dict[str, Any]:
    """Everything the command reports, as JSON types."""
    import zo_fused
    from zo_fused import _env
    from zo_fused.sweeps import dispatch
    from zo_fused.sweeps.backends import cpu, cuda, extension, triton

    versions: dict[str, str | None] = {
        "python": platform.python_version(),
        "zo_fused": zo_fused.__version__,
    }
    versions |= {package: _version(package) for package in PACKAGES}
    devices = _devices()
    types = list(dict.fromkeys(name.partition(":")[0] for name in devices))
    why_not = {
        backend: {
            device_type: _asked(dispatch.why_not, backend, device_type) for device_type in types
        }
        for backend in dispatch.BACKENDS
    }
    found: dict[str, Any] = {
        "versions": versions,
        "devices": {
            name: {"description": text, "backend": _chosen(name)} for name, text in devices.items()
        },
        "backends": why_not,
        "slow": {device_type: _asked(dispatch.why_slow, device_type) for device_type in types},
        "forced_backend": _env.forced_backend(),
        "cpp_extension": cpu.isa() if why_not["cpu"]["cpu"] is None else None,
        "cuda_extension": [f"{major}.{minor}" for major, minor in cuda.architectures()] or None,
        "broken_extensions": [
            backend.EXTENSION
            for backend in (cpu, cuda)
            if extension.is_broken(backend.EXTENSION, backend.import_error)
        ],
        "triton_interprets": _env.triton_interprets(),
        "triton_for_this_torch": triton.fitting(),
        "triton_doubt": _asked(dispatch.doubt, "triton")
        if None in why_not["triton"].values()
        else None,
    }
    return found | {"advice": _advice(found)}


def _advice(found: dict[str, Any]) -> list[str]:
    versions, names = found["versions"], {"cpu": "CPUs", "cuda": "GPUs"}
    advice = [
        f"on {names[device_type]} the slow reference serves: {reason}"
        for device_type, reason in found["slow"].items()
        if reason is not None
    ]
    if found["triton_doubt"] is not None:
        advice.append(found["triton_doubt"])
    if "cuda" in found["slow"]:
        if found["triton_interprets"]:
            advice.append("Triton kernels run in Python: unset TRITON_INTERPRET")
    else:
        advice.append("no GPU is visible to PyTorch; if there is one, install PyTorch for it")
    missing = [package for package in _FOR_FINETUNE if versions[package] is None]
    if missing:
        advice.append(
            f"`zo-fused finetune` lacks {', '.join(missing)}: `pip install 'zo-fused[hf]'`"
        )
    if found["forced_backend"] is not None:
        advice.append("ZO_FUSED_BACKEND is set; unset it to get the best backend")
    return advice


def _text(found: dict[str, Any]) -> str:
    lines = ["versions"]
    for name, value in found["versions"].items():
        lines.append(f"  {name:<13} {value or 'not installed'}")
    lines.append("devices")
    for name, device in found["devices"].items():
        served = f"backend {device['backend']}" if device["backend"] else "no backend"
        lines.append(f"  {name:<13} {served} ({device['description']})")
    if found["forced_backend"] is not None:
        lines.append(f"  every call is sent to ZO_FUSED_BACKEND={found['forced_backend']}")
    types = list(next(iter(found["backends"].values())))
    lines.append(f"{'backends':<15} " + "".join(f"{name:<6}" for name in types).rstrip())
    reasons = []
    for name, row in found["backends"].items():
        cells = "".join(f"{'no' if row[t] else 'yes':<6}" for t in types)
        lines.append(f"  {name:<13} {cells.rstrip()}")
        reasons += [f"  {name} on {t}: {row[t]}" for t in types if row[t]]
    if reasons:
        lines += ["why not", *reasons]
    isa, architectures = found["cpp_extension"], found["cuda_extension"]
    for title, name, what in (
        ("C++", "zo_fused._C", None if isa is None else f"built, uses {isa}"),
        (
            "CUDA",
            "zo_fused._CUDA",
            None if architectures is None else f"built for {', '.join(architectures)}",
        ),
    ):
        absent = "does not load" if name in found["broken_extensions"] else "not built"
        lines.append(f"{f'{title} extension':<16}{what or absent}")
    how = "in its interpreter (TRITON_INTERPRET)" if found["triton_interprets"] else "compiled"
    how = how if found["versions"]["triton"] else "not installed"
    fitting = found["triton_for_this_torch"]
    pair = f"; PyTorch {found['versions']['torch']} goes with Triton {fitting}" if fitting else ""
    lines.append(f"Triton kernels  {how}{pair}")
    if found["advice"]:
        lines += ["what to do", *(f"  - {item}" for item in found["advice"])]
    return "\n".join(lines)


def run(args: argparse.Namespace, argv: list[str]) -> int:
    """Prints the findings; 0 if at least one backend works here."""
    found = examine()
    print(json.dumps(found, indent=2) if args.json else _text(found))
    works = any(why is None for row in found["backends"].values() for why in row.values())
    return 0 if works else 1
