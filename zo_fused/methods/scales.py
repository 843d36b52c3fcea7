"""The scales of a model's quantized layers: ``weight = scale * code``, with integer codes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from zo_fused.sweeps.numbers import WEIGHT_DTYPES

# Of GPTQ, AWQ and AQLM; of layers of one's own; of compressed-tensors. In order of preference.
NAMES = ("scales", "scale", "weight_scale")


class Scale(NamedTuple):
    """The scale of a layer."""

    name: str
    tensor: Tensor  # the memory that the layer multiplies by
    held: Callable[[], Any]  # what the layer has there now


def quantization_scales(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The scales of a model's quantized layers, by name, as tensors that share the layers' memory:
    for param groups of `zo_fused.QZO`, which finds them itself where it is given the model.

    =================================== ======================= ====================================
    quantized by                        name                    shape
    =================================== ======================= ====================================
    torchao, tensors with a ``scale``   ``layer.weight.scale``  (rows, groups), the tensor's
    bitsandbytes, 4 bits                ``layer.weight.absmax`` (blocks,)
    bitsandbytes, 8 bits                ``layer.SCB``           (rows,)
    any module with ``scales``,         ``layer.scales``, ...   the module's
    ``scale`` or ``weight_scale``
    beside larger integer codes
    =================================== ======================= ====================================

    The last row is that of GPTQ, AWQ and AQLM, and is for layers of your own. A weight that several
    layers share is named once.

    Raises:
        ValueError: a layer is quantized, but its scales can't be moved; the message names it.
    """
    return [(scale.name, scale.tensor) for scale in scales_of(model)]


def scales_of(model: nn.Module) -> list[Scale]:
    """As `quantization_scales`, with the places where the model holds them."""
    found: dict[int, Scale] = {}
    for prefix, module in model.named_modules():
        for path in _paths(module, prefix):
            held = partial(_follow, model, (*filter(None, prefix.split(".")), *path))
            scale, name = held(), ".".join([prefix, *_spelled(path)] if prefix else _spelled(path))
            if scale is None:
                raise ValueError(f"{name}: the layer is quantized and holds no scale")
            if scale.dtype not in WEIGHT_DTYPES:
                dtype = str(scale.dtype).removeprefix("torch.")
                raise ValueError(
                    f"{name} has dtype {dtype}, in which it can't be moved; scales must be float16,"
                    " bfloat16 or float32"
                )
            found.setdefault(id(scale), Scale(name, scale.detach(), held))
    return list(found.values())


def moved_away(scale: Scale) -> bool:
    """Whether the layer multiplies by other memory now."""
    held = scale.held()
    return not isinstance(held, Tensor) or (
        held.data_ptr() != scale.tensor.data_ptr() or held.shape != scale.tensor.shape
    )


Path = tuple[str, ...]


def _follow(module: nn.Module, path: Path) -> Any:
    """The attribute at the end of a path. bitsandbytes takes the scale of 8 bits from the weight
    into the layer's state in the first forward pass."""
    value: Any = module
    for name in path:
        if isinstance(value, nn.Module):
            module = value
        if name == "SCB" and getattr(module, "state", None) is not None:
            moved = getattr(module.state, "SCB", None)
            if moved is not None:
                return moved
        value = getattr(value, name, None)
    return value


def _spelled(path: Path) -> list[str]:
    """As state dicts have it."""
    if path[-1] == "SCB":
        return ["SCB"]
    return [name for name in path if name not in ("quant_state", "tensor_impl")]


def _paths(module: nn.Module, prefix: str) -> Iterator[Path]:
    """Where a module, without its children, has scales."""
    own: dict[str, Any] = {**module._parameters, **module._buffers}
    tensors = {name: tensor for name, tensor in own.items() if tensor is not None}
    where = prefix or type(module).__name__
    if type(module).__module__.startswith("torch.ao.nn.") and hasattr(module, "zero_point"):
        raise ValueError(
            f"{where} is a {type(module).__name__} of torch.ao, which packs its scales with the "
            "weights: quantize with torchao.quantization.quantize_ instead"
        )
    special = False
    for name, tensor in tensors.items():
        label = f"{prefix}.{name}" if prefix else name
        if is_traceable_wrapper_subclass(tensor):
            yield from ((name, *path) for path in _inside(tensor, label))
        elif getattr(tensor, "quant_state", None) is not None:
            _check_4bit(module, tensor.quant_state, where)
            yield name, "quant_state", "absmax"
        elif hasattr(tensor, "SCB") and not tensor.dtype.is_floating_point:
            yield name, "SCB"
        else:
            continue
        special = True
    codes = max((t.numel() for t in tensors.values() if _is_code(t)), default=0)
    if special or not codes:
        return
    for name in NAMES:
        scale = tensors.get(name)
        if scale is not None and scale.is_floating_point() and scale.numel() < codes:
            yield (name,)
            return


def _is_code(tensor: Tensor) -> bool:
    """Integers, or floating point of eight bits."""
    real = tensor.is_floating_point() or tensor.is_complex()
    return tensor.dtype != torch.bool and (tensor.dtype.itemsize == 1 or not real)


def _inside(tensor: Any, label: str) -> Iterator[Path]:
    """Where a tensor that is made of others has its scale.

    Raises:
        ValueError: it has none.
    """
    if type(tensor).__name__ == "DTensor":
        raise ValueError(f"{label} is a DTensor: the scales of sharded layers can't be moved")
    names = tensor.__tensor_flatten__()[0]
    if "scale" in names:
        yield ("scale",)
        return
    for name in names:
        inner = getattr(tensor, name)
        if is_traceable_wrapper_subclass(inner):
            yield from ((name, *path) for path in _inside(inner, label))
            return
    raise ValueError(
        f"{label} is a {type(tensor).__name__}, which has no tensor `scale` to move, but "
        f"{', '.join(names)}: quantize this layer otherwise (torchao's Int8WeightOnlyConfig has)"
    )


def _check_4bit(module: nn.Module, state: Any, where: str) -> None:
    """Raises:
    ValueError: bitsandbytes has no absmax in floating point, or will replace it.
    """
    if state.nested:
        raise ValueError(
            f"{where}: its absmax is quantized, too: quantize without double quantization "
            "(bnb_4bit_use_double_quant=False, compress_statistics=False)"
        )
    packs = getattr(module, "support_avx512bf16_for_cpu", False)
    packed = getattr(state, "packing_format_for_cpu", False)
    if packed or (packs and state.absmax.device.type == "cpu"):
        raise ValueError(
            f"{where}: on this CPU, bitsandbytes packs absmax anew in bfloat16 in the first forward"
            " pass without gradients: set support_avx512bf16_for_cpu = False on every Linear4bit "
            "of a newly loaded model"
        )
