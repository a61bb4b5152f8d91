"""Softmax attention."""

from typing import Any

from keras import layers, ops

from keras_vits.layers.base import SameShape, Shape


class MultiHeadAttention(SameShape):
    """(B,N,D) -> (B,N,D): out(softmax(q k' / sqrt(D / heads)) v). ViT (arXiv 2010.11929), appendix A, equations 5 to 8.

    One dense layer computes queries, keys and values together, in this order.

    Args:
        heads: number of heads; must divide D.
        qkv_bias: whether the joint projection has a bias.
        dropout: probability of dropping an element of the output in training.
        qk_norm: whether each head's q and k go through a LayerNorm, as in ViT-22B (arXiv 2302.05442), section 2.
        epsilon: of these two LayerNorms.
    """

    def __init__(
        self,
        heads: int,
        qkv_bias: bool = True,
        dropout: float = 0.0,
        qk_norm: bool = False,
        epsilon: float = 1e-6,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.heads, self.qkv_bias, self.dropout = heads, qkv_bias, dropout
        self.qk_norm, self.epsilon = qk_norm, epsilon

    def build(self, shape: Shape) -> None:
        batch, tokens, width = shape
        if width % self.heads:
            raise ValueError(f"heads must divide the width; received heads={self.heads}, width={width}.")
        self.qkv = layers.Dense(3 * width, use_bias=self.qkv_bias, name="qkv", dtype=self.dtype_policy)
        self.out = layers.Dense(width, name="out", dtype=self.dtype_policy)
        self.drop = layers.Dropout(self.dropout, name="drop", dtype=self.dtype_policy)
        self.qkv.build(shape)
        self.out.build(shape)
        if self.qk_norm:
            self.q_norm, self.k_norm = (
                layers.LayerNormalization(epsilon=self.epsilon, name=name, dtype=self.dtype_policy)
                for name in ("q_norm", "k_norm")
            )
            self.q_norm.build((batch, tokens, self.heads, width // self.heads))
            self.k_norm.build((batch, tokens, self.heads, width // self.heads))

    def call(self, x: Any) -> Any:
        tokens, width = x.shape[1:]
        qkv = self.qkv(x)
        q, k, v = (
            ops.reshape(qkv[..., i * width : (i + 1) * width], (-1, tokens, self.heads, width // self.heads))
            for i in range(3)
        )
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return self.drop(self.out(ops.reshape(self.attend(q, k, v), (-1, tokens, width))))

    def attend(self, q: Any, k: Any, v: Any) -> Any:
        """softmax(q k' / sqrt(d)) v of queries, keys and values (B,N,heads,d)."""
        return ops.dot_product_attention(q, k, v)
