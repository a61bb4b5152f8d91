"""The two-layer perceptron of transformer blocks."""

from collections.abc import Callable
from typing import Any

from keras import activations, layers, ops

from keras_vits.layers.base import SameShape, Shape

ACTIVATIONS: dict[str | None, Callable[[Any], Any]] = {  # beside those that Keras knows by name
    "gelu_tanh": lambda x: ops.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * ops.sigmoid(1.702 * x),  # of OpenAI's CLIP
}


def activation_function(name: str | None) -> Callable[..., Any]:
    """The function of a Keras activation, of `"gelu_tanh"` or of `"quick_gelu"`; `None` is the identity."""
    return ACTIVATIONS.get(name) or activations.get(name)


class Mlp(SameShape):
    """(..., D) -> (..., D): fc2(act(fc1(x))). ViT (arXiv 2010.11929), section 3.1; Mixer (2105.01601), equation 1.

    Gated, it is fc2(act(a) * b), where a and b are the halves of fc1(x), and with `"silu"` the SwiGLU of arXiv
    2002.05202, equation 6.

    Args:
        hidden: width between the two layers; fc1 has twice as many outputs if gated.
        activation: name of a Keras activation (`"gelu"` is the exact erf form), `"gelu_tanh"` or `"quick_gelu"`.
        dropout: probability of dropping an element after each layer in training.
        gated: whether half of fc1's outputs multiply the other half.
    """

    def __init__(
        self, hidden: int, activation: str | None = "gelu", dropout: float = 0.0, gated: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.hidden, self.activation, self.dropout, self.gated = hidden, activation, dropout, gated
        self.act = activation_function(activation)

    def build(self, shape: Shape) -> None:
        self.fc1 = layers.Dense(self.hidden * (2 if self.gated else 1), name="fc1", dtype=self.dtype_policy)
        self.fc2 = layers.Dense(shape[-1], name="fc2", dtype=self.dtype_policy)
        self.drop = layers.Dropout(self.dropout, name="drop", dtype=self.dtype_policy)
        self.fc1.build(shape)
        self.fc2.build((*shape[:-1], self.hidden))

    def call(self, x: Any) -> Any:
        x = self.fc1(x)
        if self.gated:
            x = self.act(x[..., : self.hidden]) * x[..., self.hidden :]
        else:
            x = self.act(x)
        return self.drop(self.fc2(self.drop(x)))
