"""The pre-norm encoder block of the vision transformer."""

from keras import layers

from keras_vits.layers.attention import MultiHeadAttention
from keras_vits.layers.base import SameShape
from keras_vits.layers.mlp import Mlp
from keras_vits.layers.regularize import DropPath


class TransformerBlock(SameShape):
    """(B,N,D) -> (B,N,D): x + attention(norm1(x)), then x + mlp(norm2(x)). ViT (arXiv 2010.11929), equations 2 and 3.

    Args:
        heads: number of attention heads; must divide D.
        mlp_hidden: width of the perceptron's hidden layer.
        epsilon: of both LayerNorms.
        activation: of the perceptron, name of a Keras activation.
        dropout: probability of dropping an element after each dense layer in training.
        drop_path: probability that a sample loses a residual branch in training.
    """

    def __init__(self, heads, mlp_hidden, epsilon, activation="gelu", dropout=0.0, drop_path=0.0, **kwargs):
        super().__init__(**kwargs)
        self.norm1 = layers.LayerNormalization(epsilon=epsilon, name="norm1", dtype=self.dtype_policy)
        self.attention = MultiHeadAttention(heads, dropout=dropout, name="attention", dtype=self.dtype_policy)
        self.norm2 = layers.LayerNormalization(epsilon=epsilon, name="norm2", dtype=self.dtype_policy)
        self.mlp = Mlp(mlp_hidden, activation, dropout, name="mlp", dtype=self.dtype_policy)
        self.drop_path = DropPath(drop_path, name="drop_path", dtype=self.dtype_policy)

    def build(self, shape):
        for layer in (self.norm1, self.attention, self.norm2, self.mlp, self.drop_path):
            layer.build(shape)

    def call(self, x):
        x = x + self.drop_path(self.attention(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))
