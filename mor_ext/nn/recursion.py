"""The one loop: select -> gather -> block -> scatter."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mor_ext.nn.block import Block
from mor_ext.nn.kv import KVStore
from mor_ext.nn.routers import Router
from mor_ext.nn.tokens import Tokens


class Passed(NamedTuple):
    """What a recursion gives."""

    hidden: Tensor  # [total, hidden_size]
    depth: Tensor  # int32 [total], how many times the block was applied to each token
    loss: Tensor  # [], the router's


class Recursion(nn.Module):
    """Applies one block up to ``num_recursions`` times, each time to the tokens its router picks.

    A vanilla transformer is one recursion of a router that picks everyone, a recursive transformer
    several, Mixture-of-Recursions several of a router that chooses.
    """

    def __init__(self, num_recursions: int, block: Block, router: Router) -> None:
        super().__init__()
        self.num_recursions = num_recursions
        self.block = block
        self.router = router

    def forward(
        self, hidden: Tensor, tokens: Tokens, store: KVStore, stage: int, causal: bool
    ) -> Passed:
        """hidden ``[total, hidden_size]``; ``stage`` is this module's number in the model."""
        plan = self.router.begin(hidden, tokens, causal)
        active = tokens
        depths = torch.zeros_like(tokens.positions)
        loss = hidden.new_zeros(())
        for depth in range(self.num_recursions):
            active, router_loss = self.router.select(depth, hidden, active, plan)
            if router_loss is not None:
                loss = loss + router_loss
            # In training the ranks of a distributed run go through the same layers, whoever is
            # active, so that all wait for the same gradients.
            if active.total == 0 and not self.training and not store.every_depth:
                break
            view = store.view(stage, depth, active)
            output = self.block(hidden, view, active.index)
            hidden = self.router.merge(depth, hidden, output, active, plan)
            if active.index is None:
                depths = depths + 1
            else:  # active sets are nested
                depths = depths.index_fill(0, active.index.long(), depth + 1)
        return Passed(hidden, depths, loss)
