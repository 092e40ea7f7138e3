"""Grouped-query attention over packed tokens."""

from torch import Tensor, nn

from mor_ext.nn.kv import KVView


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
        self.sizes = [heads * head_dim, 2 * kv_heads * head_dim]
        self.qkv_proj = nn.Linear(hidden_size, sum(self.sizes), bias=False)
        self.o_proj = nn.Linear(heads * head_dim, hidden_size, bias=False)

    def forward(self, x: Tensor, view: KVView) -> Tensor:  # [k, hidden_size]
        key = value = None
        if view.queries_only:
            query = nn.functional.linear(x, self.qkv_proj.weight[: self.sizes[0]])
        else:
            query, key_value = self.qkv_proj(x).split(self.sizes, dim=-1)
            key, value = key_value.unflatten(-1, (2, -1, self.head_dim)).unbind(1)
        query = query.unflatten(-1, (-1, self.head_dim))  # [k, heads, head_dim]
        return self.o_proj(view.attend(self.layer, query, key, value).flatten(1))
