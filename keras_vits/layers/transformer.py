"""The pre-norm encoder block of the vision transformer."""

from typing import Any

from keras import layers

from keras_vits.layers.attention import MultiHeadAttention
from keras_vits.layers.base import SameShape, Shape
from keras_vits.layers.drop import DropPath
from keras_vits.layers.mlp import Mlp
from keras_vits.layers.norm import LayerScale


class TransformerBlock(SameShape):
    """(B,N,D) -> (B,N,D): x + attention(norm1(x)), then x + mlp(norm2(x)). ViT (arXiv 2010.11929), equations 2 and 3.

    With `layer_scale`, each branch ends in a learned gain of every channel.

    Args:
        heads: number of attention heads; must divide D.
        mlp_hidden: width of the perceptron's hidden layer.
        epsilon: of every LayerNorm.
        activation: of the perceptron, see `Mlp`.
        dropout: probability of dropping an element after each dense layer in training.
        drop_path: probability that a sample loses a residual branch in training.
        qkv_bias: whether the joint projection of queries, keys and values has a bias.
        qk_norm: whether each head's queries and keys go through a LayerNorm.
        layer_scale: what the gains begin with; 0 for none.
        gated: whether the perceptron is gated, see `Mlp`.
        attention: `"softmax"`, or a linear one of `keras_vits.layers.linear_attention.ATTENTIONS`; the options of
            softmax attention (`qkv_bias`, `qk_norm`, its `dropout`) do not concern those.
    """

    def __init__(
        self,
        heads: int,
        mlp_hidden: int,
        epsilon: float,
        activation: str | None = "gelu",
        dropout: float = 0.0,
        drop_path: float = 0.0,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        layer_scale: float = 0.0,
        gated: bool = False,
        attention: str = "softmax",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        dtype = self.dtype_policy
        self.norm1 = layers.LayerNormalization(epsilon=epsilon, name="norm1", dtype=dtype)
        if attention == "softmax":
            self.attention: SameShape = MultiHeadAttention(
                heads, qkv_bias, dropout, qk_norm, epsilon, name="attention", dtype=dtype
            )
        else:
            self.attention = _linear(attention)(heads=heads, name="attention", dtype=dtype)
        self.norm2 = layers.LayerNormalization(epsilon=epsilon, name="norm2", dtype=dtype)
        self.mlp = Mlp(mlp_hidden, activation, dropout, gated, name="mlp", dtype=dtype)
        self.drop_path = DropPath(drop_path, name="drop_path", dtype=dtype)
        self.scales = [LayerScale(layer_scale, name=f"scale{i}", dtype=dtype) for i in (1, 2) if layer_scale]

    def build(self, shape: Shape) -> None:
        for layer in (self.norm1, self.attention, self.norm2, self.mlp, self.drop_path, *self.scales):
            layer.build(shape)

    def call(self, x: Any) -> Any:
        scale1, scale2 = self.scales or (lambda x: x, lambda x: x)
        x = x + self.drop_path(scale1(self.attention(self.norm1(x))))
        return x + self.drop_path(scale2(self.mlp(self.norm2(x))))


def _linear(name: str) -> type[SameShape]:
    from keras_vits.layers.linear_attention import ATTENTIONS

    if name not in ATTENTIONS:
        raise ValueError(f"attention must be 'softmax' or one of {', '.join(ATTENTIONS)}; received {name!r}.")
    return ATTENTIONS[name]
