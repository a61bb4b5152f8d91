"""Softmax attention."""

from keras import layers, ops

from keras_vits.layers.base import SameShape


class MultiHeadAttention(SameShape):
    """(B,N,D) -> (B,N,D): out(softmax(q k' / sqrt(D / heads)) v). ViT (arXiv 2010.11929), appendix A, equations 5 to 8.

    One dense layer computes queries, keys and values together, in this order.

    Args:
        heads: number of heads; must divide D.
        qkv_bias: whether the joint projection has a bias.
        dropout: probability of dropping an element of the output in training.
    """

    def __init__(self, heads, qkv_bias=True, dropout=0.0, **kwargs):
        super().__init__(**kwargs)
        self.heads, self.qkv_bias, self.dropout = heads, qkv_bias, dropout

    def build(self, shape):
        width = shape[-1]
        if width % self.heads:
            raise ValueError(f"heads must divide the width; received heads={self.heads}, width={width}.")
        self.qkv = layers.Dense(3 * width, use_bias=self.qkv_bias, name="qkv", dtype=self.dtype_policy)
        self.out = layers.Dense(width, name="out", dtype=self.dtype_policy)
        self.drop = layers.Dropout(self.dropout, name="drop", dtype=self.dtype_policy)
        self.qkv.build(shape)
        self.out.build(shape)

    def call(self, x):
        tokens, width = x.shape[1:]
        qkv = self.qkv(x)
        q, k, v = (
            ops.reshape(qkv[..., i * width : (i + 1) * width], (-1, tokens, self.heads, width // self.heads))
            for i in range(3)
        )
        x = ops.dot_product_attention(q, k, v)
        return self.drop(self.out(ops.reshape(x, (-1, tokens, width))))
