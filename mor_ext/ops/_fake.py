"""Fake kernels of ``torch.ops.mor``: the shapes and dtypes of what an op returns."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def register_fake(name: str) -> Callable[[Callable[..., Any]], None]:
    """As ``torch.library.register_fake``, and refuses tensors on different devices.

    The dispatcher takes a real tensor beside one on the meta device here too, where no C++ check
    sees them: the result would be a tensor whose values nobody wrote.
    """

    def decorate(fake: Callable[..., Any]) -> None:
        @wraps(fake)
        def checked(*args: Any) -> Any:
            tensors = [(i, a) for i, a in enumerate(args) if isinstance(a, Tensor)]
            expected = tensors[0][1].device
            for i, tensor in tensors:
                if tensor.device != expected:
                    argument = getattr(torch.ops.mor, name).default._schema.arguments[i].name
                    raise RuntimeError(
                        f"mor::{name}: {argument} must be on {expected} like the first argument, "
                        f"got {tensor.device}"
                    )
            return fake(*args)

        torch.library.register_fake(f"mor::{name}")(checked)

    return decorate
