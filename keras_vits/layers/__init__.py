"""What two or more families share. Layers keep their input's shape unless their first line says otherwise."""

from keras_vits.layers.attention import MultiHeadAttention
from keras_vits.layers.base import SameShape
from keras_vits.layers.conv import ConvNorm, InvertedResidual
from keras_vits.layers.fold import fold, unfold
from keras_vits.layers.mlp import Mlp
from keras_vits.layers.regularize import DropPath, drop_path_rates
from keras_vits.layers.transformer import TransformerBlock

__all__ = [
    "ConvNorm",
    "DropPath",
    "InvertedResidual",
    "Mlp",
    "MultiHeadAttention",
    "SameShape",
    "TransformerBlock",
    "drop_path_rates",
    "fold",
    "unfold",
]
