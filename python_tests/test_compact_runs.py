"""How ops of the compact family run: determinism, threads, instruction sets, compilation."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from helpers import (
    DTYPES,
    Backend,
    assert_bitwise,
    cu_seqlens_of,
    sized,
)
from test_compact import (
    EPS,
    generator_of,
    int32,
    scatter_inputs,
)
from torch import Tensor

from mor_ext import ops

pytestmark = pytest.mark.usefixtures("backend")
mor = torch.ops.mor


# ---- determinism, threads, compilation ----


def every_result(dtype: torch.dtype) -> list[Tensor]:
    """Every op on one set of inputs, big enough for several threads."""
    generator = generator_of(3)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    tokens, active = sized((3000, 2000), (700, 500))
    x, gate, weight, update = randn(tokens, 96), randn(active), randn(96), randn(active, 96)
    index = torch.randperm(tokens, generator=generator)[:active].int()
    repeats = torch.randint(-1, tokens, (active,), generator=generator).int()
    depth = torch.randint(0, 4, (tokens,), generator=generator).int()
    inplace = x.clone()
    ops.scatter_tokens_(inplace, update, index, gate)
    normed = ops.gather_rms_norm(x, repeats, weight, EPS)
    return [
        *ops.compact_depth(depth, cu_seqlens_of([100, 0, tokens - 100]), 3),
        ops.gather_tokens(x, repeats),
        mor.gather_tokens_bwd(update, repeats, tokens),
        ops.scatter_tokens(x, update, index, gate),
        inplace,
        *mor.scatter_tokens_bwd(x, index, update, gate),
        *normed,
        *mor.gather_rms_norm_bwd(update, update, normed[0], normed[2], repeats, weight, tokens),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    """Nor on the order of blocks, which csrc/simt shuffles."""
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            results.append(every_result(dtype))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_bitwise(a, b)


@pytest.mark.backends(Backend.CPU)
def test_concurrent_calls() -> None:
    expected = every_result(torch.bfloat16)
    with ThreadPoolExecutor(4) as pool:
        for results in pool.map(lambda _: every_result(torch.bfloat16), range(12)):
            for a, b in zip(results, expected, strict=True):
                assert_bitwise(a, b)


RESULTS_TO_FILE = """
import sys, torch
from test_compact_runs import DTYPES, every_result
torch.save([r for dtype in DTYPES for r in every_result(dtype)], sys.argv[1])
"""


@pytest.mark.backends(Backend.CPU)
@pytest.mark.parametrize("capability", ["baseline", "avx2"])
def test_lower_instruction_sets_agree(tmp_path: Path, capability: str) -> None:
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "MOR_CPU_CAPABILITY": capability, "PYTHONPATH": paths}
    file = tmp_path / "results.pt"
    subprocess.run([sys.executable, "-c", RESULTS_TO_FILE, str(file)], env=environment, check=True)
    expected = [r for dtype in DTYPES for r in every_result(dtype)]
    for actual, e in zip(torch.load(file), expected, strict=True):
        if e.is_floating_point():  # orders of summation and fused products differ
            close = 8 * torch.finfo(e.dtype).eps * e.abs().max().item()
            torch.testing.assert_close(actual, e, rtol=0, atol=close)
        else:
            assert_bitwise(actual, e)


def opcheck_cases() -> dict[str, tuple[Any, ...]]:
    x, update, index, gate = scatter_inputs(12, (4,), torch.float32, "same")
    weight = torch.rand(4)
    rows, _, rstd = ops.gather_rms_norm(x, index, weight, EPS)
    leaves = [t.clone().requires_grad_() for t in (x, update, gate, weight)]
    return {
        "compact_depth": (int32(0, 2, 1), int32(0, 3), 2),
        "gather_tokens": (leaves[0], index),
        "gather_tokens_bwd": (update, index, 12),
        "scatter_tokens": (leaves[0], leaves[1], index, leaves[2]),
        "scatter_tokens_": (x.clone(), update, index, gate),
        "scatter_tokens_bwd": (x, index, update, gate),
        "gather_rms_norm": (leaves[0], index, leaves[3], EPS),
        "gather_rms_norm_bwd": (rows, None, rows, rstd, index, weight, 12),
    }


@pytest.mark.parametrize("op", opcheck_cases())
def test_opcheck(seed: int, op: str) -> None:
    args = opcheck_cases()[op]
    torch.library.opcheck(getattr(mor, op).default, args)
    if op.startswith("scatter_tokens"):  # without gate
        args = (*args[:2], None, None) if op.endswith("bwd") else (*args[:3], None)
        torch.library.opcheck(getattr(mor, op).default, args)


def test_one_graph_serves_all_lengths(seed: int) -> None:
    def block(x: Tensor, gate: Tensor, weight: Tensor, depth: Tensor, cu_seqlens: Tensor) -> Tensor:
        index, _ = ops.compact_depth(depth, cu_seqlens, 3)
        rows, normed, _ = ops.gather_rms_norm(x, index[1], weight, 1e-5)
        y = ops.scatter_tokens(x, rows + normed, index[1], gate)
        last = y.detach().clone()
        ops.scatter_tokens_(last, ops.gather_tokens(last, index[2]), index[2])
        return ops.gather_tokens(y, index[2]).sum() + (last * y).sum()

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, backend=counter, fullgraph=True, dynamic=True)
    for tokens in (6, 31, 129, 50):
        depth = torch.randint(0, 4, (tokens,)).int()
        leaves = [torch.randn(*s, requires_grad=True) for s in ((tokens, 8), (tokens,), (8,))]
        results = []
        for f in (block, compiled):
            loss = f(*leaves, depth, cu_seqlens_of([tokens]))
            results.append((loss, *torch.autograd.grad(loss, leaves)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1
