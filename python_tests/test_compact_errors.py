"""Bad and empty input of the compact family: one test per message, and nothing changed by it."""

import re
from typing import Any

import pytest
import torch
from helpers import Backend, map_tensors
from torch import Tensor

from mor_ext import ops

pytestmark = pytest.mark.usefixtures("backend")
mor = torch.ops.mor


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


FLOATING = "float32, bfloat16 or float16 (float64 too on CPU)"
COMPACT = {"depth": int32(1, 0, 2), "cu_seqlens": int32(0, 2, 3), "num_recursions": 2}
GATHER = {"x": torch.ones(6, 4), "index": int32(5, -1, 0)}
GATHER_BWD = {"grad": torch.ones(3, 4), "index": int32(5, -1, 0), "num_rows": 6}
SCATTER = {**GATHER, "update": torch.ones(3, 4), "gate": torch.ones(3)}
SCATTER_BWD = {"grad": torch.ones(6, 4), **{k: SCATTER[k] for k in ("index", "update", "gate")}}
NORM = {**GATHER, "weight": torch.ones(4), "eps": 1e-5}
NORM_BWD = {
    "grad_rows": torch.ones(3, 4),
    "grad_normed": torch.ones(3, 4),
    "rows": torch.ones(3, 4),
    "rstd": torch.ones(3),
    "index": int32(5, -1, 0),
    "weight": torch.ones(4),
    "num_rows": 6,
}
OPS: dict[str, dict[str, Any]] = {
    "compact_depth": COMPACT,
    "gather_tokens": GATHER,
    "gather_tokens_bwd": GATHER_BWD,
    "scatter_tokens": SCATTER,
    "scatter_tokens_": SCATTER,
    "scatter_tokens_bwd": SCATTER_BWD,
    "gather_rms_norm": NORM,
    "gather_rms_norm_bwd": NORM_BWD,
}
# (ops, argument, value, "<rule>, got <value>")
INDEXED = [op for op in OPS if op != "compact_depth"]
SCATTERS = ["scatter_tokens", "scatter_tokens_"]
ALL_SCATTERS = [*SCATTERS, "scatter_tokens_bwd"]
IN_RANGE = "in [0, 3) in every element"
UNSHARED = "of elements that share no memory"
NORMS = ["gather_rms_norm", "gather_rms_norm_bwd"]
GATHER_BWDS = ["gather_tokens_bwd", "gather_rms_norm_bwd"]
INTEGER = f"{FLOATING}, got int32"
EXPANDED = torch.ones(1, 4)  # to six rows, in the test
HALF = torch.ones(3, 4).half()
ERRORS: list[tuple[list[str], str, Any, str]] = [
    (["compact_depth"], "depth", torch.ones(3), "int32, got float32"),
    (["compact_depth"], "depth", torch.ones(3, 1).int(), "of shape [N], got shape [3, 1]"),
    (["compact_depth"], "depth", int32(1, 3, 0), f"{IN_RANGE}, got 3 at element 1"),
    (["compact_depth"], "depth", int32(1, 0, -1), f"{IN_RANGE}, got -1 at element 2"),
    (["compact_depth"], "cu_seqlens", torch.tensor([0, 3]), "int32, got int64"),
    (["compact_depth"], "cu_seqlens", int32(), "of shape [batch + 1], got shape [0]"),
    (["compact_depth"], "cu_seqlens", int32(0, 4, 3), "non-decreasing, got 4 then 3 at element 2"),
    (["compact_depth"], "cu_seqlens", int32(0, 2), "3 in its last element, got 2"),
    (["compact_depth"], "num_recursions", 0, "in [1, 1024], got 0"),
    (["compact_depth"], "num_recursions", 2**40, "in [1, 1024], got 1099511627776"),
    (INDEXED, "index", torch.tensor([5, -1, 0]), "int32, got int64"),
    (INDEXED, "index", int32(5, -1, 0).view(1, 3), "of shape [K], got shape [1, 3]"),
    (INDEXED, "index", int32(5, 6, 0), "in [-1, 6) in every element, got 6 at element 1"),
    (INDEXED, "index", int32(5, 0, -2), "in [-1, 6) in every element, got -2 at element 2"),
    (["gather_tokens", *SCATTERS, "gather_rms_norm"], "x", int32(1, 2, 3, 4, 5, 6), INTEGER),
    (["gather_tokens", *SCATTERS], "x", torch.ones(()), "of shape [N, ...], got shape []"),
    (["gather_rms_norm"], "x", torch.ones(6), "of shape [N, hidden], got shape [6]"),
    (["gather_tokens_bwd", "scatter_tokens_bwd"], "grad", torch.ones(3, 4).int(), INTEGER),
    (["gather_tokens_bwd"], "grad", torch.ones(2, 4), "of shape [K, ...], got shape [2, 4]"),
    (GATHER_BWDS, "num_rows", -1, "in [0, 2^31), got -1"),
    (GATHER_BWDS, "num_rows", 2**31, f"in [0, 2^31), got {2**31}"),
    (SCATTERS, "index", int32(4, 2, 4), "unique (-1 aside), got 4 at elements 0 and 2"),
    (ALL_SCATTERS, "update", HALF, "float32, got float16"),
    (ALL_SCATTERS, "update", torch.ones(3, 5), "of shape [3, 4], got shape [3, 5]"),
    (SCATTERS, "update", torch.ones(2, 4), "of shape [3, 4], got shape [2, 4]"),
    (ALL_SCATTERS, "gate", torch.ones(3).half(), "float32, got float16"),
    (ALL_SCATTERS, "gate", torch.ones(3, 1), "of shape [K], got shape [3, 1]"),
    (["scatter_tokens_bwd"], "gate", None, "given where update is, got None"),
    (["scatter_tokens_"], "x", EXPANDED, f"{UNSHARED}, got an expanded tensor"),
    (NORMS, "weight", torch.ones(4).half(), "float32, got float16"),
    (NORMS, "weight", torch.ones(5), "of shape [hidden], got shape [5]"),
    (["gather_rms_norm"], "eps", -1.0, "at least 0, got -1"),
    (["gather_rms_norm"], "eps", float("nan"), "at least 0, got nan"),
    (["gather_rms_norm_bwd"], "rows", torch.ones(12), "of shape [K, hidden], got shape [12]"),
    (["gather_rms_norm_bwd"], "index", int32(5, 0), "of shape [K], got shape [2]"),
    (["gather_rms_norm_bwd"], "rstd", torch.ones(3).double(), "float32, got float64"),
    (["gather_rms_norm_bwd"], "rstd", torch.ones(2), "of shape [K], got shape [2]"),
    (["gather_rms_norm_bwd"], "grad_rows", torch.ones(2, 4), "of shape [3, 4], got shape [2, 4]"),
    (["gather_rms_norm_bwd"], "grad_normed", HALF, "float32, got float16"),
]  # fmt: skip
CASES = [(op, *case) for names, *case in ERRORS for op in names]


def here(args: dict[str, Any]) -> dict[str, Any]:
    """The tensors above, on the device of the current backend."""
    return map_tensors(args, lambda t: t.to(torch.get_default_device()))


@pytest.mark.parametrize(("op", "argument", "value", "message"), CASES)
def test_errors_say_what_and_change_nothing(
    op: str, argument: str, value: Any, message: str
) -> None:
    args = here({**OPS[op], argument: value})
    if value is EXPANDED:
        args[argument] = args[argument].expand(6, 4)
    tensors = [t for t in args.values() if isinstance(t, Tensor)]
    before = [t.clone() for t in tensors]
    full = re.escape(f"mor::{op}: {argument} must be {message}")
    with pytest.raises(RuntimeError, match=f"^{full}$"):
        getattr(mor, op)(**args)
    for t, b in zip(tensors, before, strict=True):
        assert torch.equal(t, b)


@pytest.mark.parametrize("argument", ["x", "update", "gate"])
def test_inplace_scatter_refuses_gradients(argument: str) -> None:
    args = here(SCATTER)
    args[argument] = args[argument].clone().requires_grad_()
    message = f"mor::scatter_tokens_: {argument} must be without gradient"
    with pytest.raises(RuntimeError, match=message):
        ops.scatter_tokens_(**args)
    with torch.no_grad():
        ops.scatter_tokens_(**{**args, "x": args["x"].clone()})


@pytest.mark.backends(Backend.CUDA)
@pytest.mark.parametrize("op", INDEXED)
def test_devices_must_agree(op: str) -> None:
    args = here(OPS[op])
    args["index"] = args["index"].cpu()
    message = f"mor::{op}: index must be on cuda:0 like the first argument, got cpu"
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        getattr(mor, op)(**args)


@pytest.mark.parametrize("op", INDEXED)
def test_empty_inputs(op: str) -> None:
    """No entries, and then no rows either."""
    for rows in (6, 0):
        args = {
            name: value[:0] if isinstance(value, Tensor) and name != "weight" else value
            for name, value in here(OPS[op]).items()
        }
        args.update(
            {
                n: torch.ones(rows, 4)
                for n in ("x", "grad")
                if n in args and op != "gather_tokens_bwd"
            }
        )
        args.update({"num_rows": rows} if "num_rows" in args else {})
        outputs = getattr(mor, op)(**args)
        outputs = [outputs] if isinstance(outputs, Tensor) else outputs or []
        assert all(len(out) in (0, rows, 4) for out in outputs)
