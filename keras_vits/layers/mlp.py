"""The two-layer perceptron of transformer blocks."""

from keras import activations, layers

from keras_vits.layers.base import SameShape


class Mlp(SameShape):
    """(..., D) -> (..., D): fc2(act(fc1(x))). ViT (arXiv 2010.11929), section 3.1; Mixer (2105.01601), equation 1.

    Args:
        hidden: width between the two layers.
        activation: name of a Keras activation; `"gelu"` is the exact erf form.
        dropout: probability of dropping an element after each layer in training.
    """

    def __init__(self, hidden, activation="gelu", dropout=0.0, **kwargs):
        super().__init__(**kwargs)
        self.hidden, self.activation, self.dropout = hidden, activation, dropout

    def build(self, shape):
        self.fc1 = layers.Dense(self.hidden, name="fc1", dtype=self.dtype_policy)
        self.fc2 = layers.Dense(shape[-1], name="fc2", dtype=self.dtype_policy)
        self.drop = layers.Dropout(self.dropout, name="drop", dtype=self.dtype_policy)
        self.fc1.build(shape)
        self.fc2.build((*shape[:-1], self.hidden))

    def call(self, x):
        x = activations.get(self.activation)(self.fc1(x))
        return self.drop(self.fc2(self.drop(x)))
