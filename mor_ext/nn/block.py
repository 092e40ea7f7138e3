"""Transformer layers, and the block of layers that a recursion applies."""

from collections.abc import Iterable

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mor_ext.nn.attention import Attention
from mor_ext.nn.kv import KeepingView, KVView
from mor_ext.nn.mlp import SwiGLU
from mor_ext.nn.norm import RMSNorm


class Layer(nn.Module):
    """A pre-norm transformer layer as in Llama."""

    def __init__(self, attention: Attention, mlp: SwiGLU, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(hidden_size, eps)
        self.attention = attention
        self.mlp_norm = RMSNorm(hidden_size, eps)
        self.mlp = mlp

    def forward(self, hidden: Tensor, view: KVView, index: Tensor | None = None) -> Tensor:
        """The layer on rows ``index`` of hidden ``[N, hidden_size]``; None is every row."""
        if index is None:
            rows, normed = self.attention_norm.beside(hidden)
        else:
            rows, normed = self.attention_norm.gather(hidden, index)
        rows, normed = self.mlp_norm.beside(rows + self.attention(normed, view))
        return rows + self.mlp(normed)  # [k, hidden_size]

    def leave(self, hidden: Tensor, index: Tensor, view: KeepingView) -> None:
        """Hands the view K/V of the tokens that have exited, rows ``index`` of hidden."""
        _, normed = self.attention_norm.gather(hidden, index)
        view.keep(self.attention.layer, *self.attention.key_value(normed))


class Block(nn.Module):
    """``f`` of the papers: layers one after the other, the residual stream included."""

    gradient_checkpointing = False  # Hugging Face's name: layers are run again in the backward

    def __init__(self, layers: Iterable[Layer]) -> None:
        super().__init__()
        layers = list(layers)
        self.layers = nn.ModuleList(layers)
        self.numbers = [layer.attention.layer for layer in layers]  # of its layers in the model

    def forward(self, hidden: Tensor, view: KVView, index: Tensor | None) -> Tensor:
        """f of rows ``index`` of hidden: the first norm gathers them.

        Tokens that the view calls exited leave every layer their K/V, from their rows of hidden.
        """
        if isinstance(view, KeepingView) and view.exited is not None:
            self.leave(hidden, view)
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                hidden = checkpoint(layer, hidden, view, index, use_reentrant=False)
            else:
                hidden = layer(hidden, view, index)
            index = None
        return hidden  # [k, hidden_size]

    def leave(self, hidden: Tensor, view: KeepingView) -> None:
        assert view.exited is not None and view.exited.index is not None
        for layer in self.layers:
            assert isinstance(layer, Layer)
            layer.leave(hidden, view.exited.index, view)
