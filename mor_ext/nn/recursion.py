"""The one loop: select -> gather -> block -> scatter."""

import torch
from torch import Tensor, nn

from mor_ext.nn.block import Block
from mor_ext.nn.kv import KVStore
from mor_ext.nn.router import Router
from mor_ext.nn.tokens import Tokens


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
    ) -> tuple[Tensor, Tensor, Tensor]:
        """hidden ``[total, hidden_size]`` to the next hidden state, depth and auxiliary loss.

        depth is int32 ``[total]``, how many times the block was applied to each token. ``stage``
        is this module's number in the model, its key in the store.
        """
        plan = self.router.begin(hidden, tokens, causal)
        active = tokens
        depths = torch.zeros_like(tokens.positions)
        loss = hidden.new_zeros(())
        for depth in range(self.num_recursions):
            active, router_loss = self.router.select(depth, hidden, active, plan)
            if active.total == 0:
                break  # nobody goes on
            output = self.block(hidden, store.view(stage, depth, active), active.index)
            hidden = self.router.merge(depth, hidden, output, active, plan)
            if active.index is None:
                depths = depths + 1
            else:  # active sets are nested
                depths = depths.index_fill(0, active.index.long(), depth + 1)
            if router_loss is not None:
                loss = loss + router_loss
        return hidden, depths, loss
