"""Autocast for ops of ``torch.ops.mor``: named arguments take the autocast dtype."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("mor", "IMPL")


def register_autocast(name: str, arguments: Iterable[str]) -> None:
    """Under autocast, ``torch.ops.mor.<name>`` takes these arguments in the autocast dtype.

    As with PyTorch's own ops, only floating-point tensors on the autocast device are cast, and
    fp64 stays fp64. All other arguments keep their dtype.
    """
    op = getattr(torch.ops.mor, name).default
    names = set(arguments)
    positions = [i for i, a in enumerate(op._schema.arguments) if a.name in names]
    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        _library.impl(name, _cast_then_call(op, positions, device, key), key)


def _cast_then_call(op: Any, positions: list[int], device: str, key: str) -> Any:
    autocast = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def call(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        cast = list(args)
        for i in positions:
            cast[i] = _cast(cast[i], device, dtype)
        with torch._C._ExcludeDispatchKeyGuard(autocast):
            return op(*cast)

    return call


def _cast(argument: Any, device: str, dtype: torch.dtype) -> Any:
    eligible = (
        isinstance(argument, Tensor)
        and argument.device.type == device
        and argument.is_floating_point()
        and argument.dtype != torch.float64
    )
    return argument.to(dtype) if eligible else argument
