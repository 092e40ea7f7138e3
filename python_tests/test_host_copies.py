"""How often a forward pass makes the host wait for what the device has computed.

Counted on the CPU, where nothing waits, by the calls that wait on another device.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mor_ext.models import MoRConfig, MoRForCausalLM

pytestmark = pytest.mark.usefixtures("one_thread")
# .item(), bool() and the like end in the first; the others have as many rows as their data say.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim"}


class WaitingOps(TorchDispatchMode):
    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put_", "index_put") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1]
        )
        counts_repeats = name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in WAITING or by_mask or counts_repeats:
            self.seen.append(name)
        return func(*args, **kwargs)


class WaitingCalls(TorchFunctionMode):
    """Copies to the host, which on the CPU do not reach the dispatcher."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.tolist, Tensor.cpu, Tensor.numpy):
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


@contextmanager
def host_copies() -> Iterator[list[str]]:
    """The calls, by name, that would wait."""
    seen: list[str] = []
    with WaitingCalls(seen), WaitingOps(seen):
        yield seen


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x.sum().item(),
        lambda x: float(x[0]),
        lambda x: bool(x.any()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x[x > 0],
        lambda x: (x > 0).nonzero(),
        lambda x: torch.where(x > 0),
        lambda x: x.unique(),
        lambda x: torch.repeat_interleave(x, torch.tensor([1, 2, 3])),
    ],
)
def test_what_waits_is_seen(call: Callable[[Tensor], Any]) -> None:
    with host_copies() as seen:
        call(torch.arange(3.0))
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("most", "fields"),
    [
        (0, {"routing": "none"}),
        (0, {"routing": "expert_choice"}),
        (0, {"routing": "expert_choice", "causal_rule": "aux_router", "router_kind": "mlp"}),
        *((0, {"routing": "expert_choice", "kv_strategy": kv}) for kv in ("shared", "hybrid")),
        (1, {"routing": "token_choice"}),
        (1, {"routing": "token_choice", "balancing": "bias"}),
        (1, {"routing": "token_choice", "kv_strategy": "shared"}),
    ],
)
def test_copies_of_a_training_pass(most: int, fields: dict[str, Any], seed: int) -> None:
    config = MoRConfig(
        vocab_size=17,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_recursions=3,
        **fields,
    )
    model = MoRForCausalLM(config).train()
    text = torch.randint(17, (2, 20))
    with host_copies() as seen:
        loss = model(text, labels=text).loss
    assert len(seen) <= most, seen
    loss.backward()
