"""Grouped-query attention over packed tokens."""

from torch import Tensor, nn

from mor_ext.nn.kv import KVView
from mor_ext.nn.linear import Linear


class Attention(nn.Module):
    """Projections around ``mor::attention``; what is seen is up to the :class:`KVView`.

    Args:
        layer: this layer's number in the model, its key in a KV store.
    """

    def __init__(
        self, layer: int, hidden_size: int, heads: int, kv_heads: int, head_dim: int
    ) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = head_dim
        self.sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
        self.qkv_proj = Linear(hidden_size, sum(self.sizes))
        self.o_proj = Linear(heads * head_dim, hidden_size)

    def forward(self, x: Tensor, view: KVView) -> Tensor:  # [k, hidden_size]
        key = value = None
        if view.new_rows is None:
            query, key, value = self.qkv_proj(x).split(self.sizes, dim=-1)
            key, value = self._heads(key), self._heads(value)
        else:
            query = self.qkv_proj(x, part=(0, self.sizes[0]))
            if view.new_rows > 0:
                key, value = self.key_value(x[: view.new_rows])
        out = view.attend(self.layer, self._heads(query), key, value)
        return self.o_proj(out.flatten(1))

    def key_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """K and V ``[k, kv_heads, head_dim]`` of x ``[k, hidden_size]``, not rotated."""
        key, value = self.qkv_proj(x, part=(self.sizes[0], sum(self.sizes))).chunk(2, dim=-1)
        return self._heads(key), self._heads(value)

    def _heads(self, x: Tensor) -> Tensor:  # [k, heads * head_dim] to [k, heads, head_dim]
        return x.unflatten(-1, (-1, self.head_dim))
