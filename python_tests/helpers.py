"""What tests of several families share: backends, tolerances, dtypes, random packed batches."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mor_ext

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LENGTHS = [0, 1, 2, 31, 129, 1134]


# ---- backends ----


class Backend(Enum):
    CPU = "cpu"
    SIMT = "simt"
    CUDA = "cuda"


_current = Backend.CPU


def backend_dtypes() -> list[torch.dtype]:
    """DTYPES that the current backend has; a test parametrised with DTYPES needs no such care."""
    return DTYPES if _current == Backend.CPU else DTYPES[:-1]


def sized(full: Any, under_simt: Any) -> Any:
    """The first, or, where kernels run some thousand times slower, the second."""
    return under_simt if _current == Backend.SIMT else full


@contextmanager
def use_backend(backend: Backend, simt_library: Path) -> Iterator[None]:
    global _current
    _current = backend
    try:
        if backend == Backend.SIMT:
            with _simt(simt_library):
                yield
        elif backend == Backend.CUDA:
            with _cuda():
                yield
        else:
            yield
    finally:
        _current = Backend.CPU


@contextmanager
def _simt(library: Path) -> Iterator[None]:
    """CPU tensors go to the CUDA kernels, run on the host: registered over the CPU kernels."""
    assert library.exists(), f"no {library}: run `make simt`"
    torch.ops.load_library(str(library))
    torch.ops.mor_simt.set_debug(True)
    override = torch.library.Library("mor", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that kernels are overridden is the point
        for schema in torch._C._jit_get_all_schemas():
            namespace, _, name = schema.name.partition("::")
            if namespace == "mor_simt" and name != "set_debug":
                override.impl(name, getattr(torch.ops.mor_simt, name).default, "CPU")
    try:
        yield
    finally:
        override._destroy()


@contextmanager
def _cuda() -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if mor_ext.build_info()["cuda"] == "none":
        pytest.skip("built without CUDA kernels")
    mor_ext.set_debug(True)
    torch.set_default_device("cuda")
    try:
        yield
    finally:
        torch.set_default_device("cpu")
        mor_ext.set_debug(False)


@contextmanager
def unchecked() -> Iterator[None]:
    """CUDA kernels get the contents of index tensors unchecked; the CPU checks them always."""
    namespace = torch.ops.mor_simt if _current == Backend.SIMT else torch.ops.mor
    namespace.set_debug(False)
    try:
        yield
    finally:
        namespace.set_debug(_current != Backend.CPU)


def autocast(dtype: torch.dtype) -> torch.autocast:
    """On the current backend's device."""
    return torch.autocast(torch.get_default_device().type, dtype)


# ---- tolerances ----


def assert_accurate(
    actual: Tensor, eager: Tensor, exact: Tensor, atol: float = 1e-6, name: str = "result"
) -> None:
    """The rule for every kernel: err(kernel) <= 2 * err(PyTorch in the same dtype) + atol.

    actual: from the kernel. eager: plain PyTorch on the same inputs in the same dtype. exact:
    plain PyTorch on the same inputs in fp64. Errors are maxima over all elements; infinities and
    NaN must stand in the same places.
    """
    assert actual.shape == exact.shape, f"{name}: {actual.shape} != {exact.shape}"
    assert actual.dtype == eager.dtype, f"{name}: {actual.dtype} != {eager.dtype}"
    if exact.numel() == 0:
        return
    actual, eager = actual.double(), eager.double()
    special = ~exact.isfinite()
    assert torch.equal(actual[special].nan_to_num(nan=0.5), exact[special].nan_to_num(nan=0.5))
    actual, eager, exact = (t.masked_fill(special, 0) for t in (actual, eager, exact))
    error = (actual - exact).abs().max().item()
    bound = 2 * (eager - exact).abs().max().item() + atol
    assert error <= bound, f"{name}: error {error:.3e} > bound {bound:.3e}"


def scaled_atol(exact: Tensor, dtype: torch.dtype) -> float:
    """An atol that grows with the largest finite element, where it exceeds 1.

    For 16-bit dtypes half of what rounding the exact result costs: on a few elements PyTorch can
    be lucky. fp64 has its own, because there the reference is itself the exact result.
    """
    magnitude = exact.double().nan_to_num(posinf=0, neginf=0).abs()
    largest = magnitude.max().clamp(min=1).item() if magnitude.numel() else 1
    if dtype == torch.float64:
        return 1e-12 * largest
    return max(1e-6, torch.finfo(dtype).eps / 4 if dtype.itemsize == 2 else 0) * largest


def assert_bitwise(actual: Tensor, expected: Tensor, name: str = "result") -> None:
    """The same bits, so that equal NaN are equal and 0.0 differs from -0.0."""
    assert actual.shape == expected.shape, f"{name}: {actual.shape} != {expected.shape}"
    assert actual.dtype == expected.dtype, f"{name}: {actual.dtype} != {expected.dtype}"
    same = torch.equal(*(t.flatten().contiguous().view(torch.uint8) for t in (actual, expected)))
    assert same, f"{name}: {(actual != expected).sum()} of {actual.numel()} elements differ"


def cu_seqlens_of(lengths: list[int]) -> Tensor:
    """int32 ``[len(lengths) + 1]``."""
    return torch.tensor([0, *lengths]).cumsum(0).int()


def map_tensors(args: dict[str, Any], f: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    return {name: f(a) if isinstance(a, Tensor) else a for name, a in args.items()}


def in_fp64(args: dict[str, Any]) -> dict[str, Any]:
    return map_tensors(args, lambda t: t.double() if t.is_floating_point() else t)


# ---- attention ----

HEAD_DIMS = [8, 64, 80, 128, 256]
GROUPS = [1, 3, 8]  # query heads per KV head

# How many keys the queries of one sequence see: (len_q, len_k) -> int [len_q].
KEY_LIMITS: dict[str, Callable[[int, int], Tensor]] = {
    "bidirectional": lambda len_q, len_k: torch.full((len_q,), len_k),
    "blind": lambda len_q, len_k: torch.zeros(len_q),
    "random": lambda len_q, len_k: torch.randint(len_k + 1, (len_q,)).sort().values,
    "chunked_prefill": lambda len_q, len_k: (torch.arange(len_q) + 1 + len_k - len_q).clamp(min=0),
    # The queries are the active ones of len_k tokens, each of which sees the tokens up to itself.
    "kv_sharing": lambda len_q, len_k: (
        torch.randperm(max(len_q, len_k))[:len_q].sort().values + 1
    ).clamp(max=len_k),
}


def key_limit_of(kind: str, lengths: list[tuple[int, int]]) -> Tensor | None:
    """int32 ``[total_q]`` for sequences of (len_q, len_k); None for "causal"."""
    if kind == "causal":
        return None
    return torch.cat([torch.zeros(0), *(KEY_LIMITS[kind](*pair) for pair in lengths)]).int()
