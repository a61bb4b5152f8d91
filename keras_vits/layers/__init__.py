"""What two or more families share. Layers keep their input's shape unless their first line says otherwise."""

from keras_vits.layers.attention import MultiHeadAttention
from keras_vits.layers.base import SameShape
from keras_vits.layers.conv import ConvNorm, InvertedResidual
from keras_vits.layers.drop import DropPath, drop_path_rates
from keras_vits.layers.linear_attention import (
    ATTENTIONS,
    CrossCovarianceAttention,
    EfficientAttention,
    FavorAttention,
    KernelAttention,
    LinformerAttention,
    ReLULinearAttention,
    SeparableSelfAttention,
)
from keras_vits.layers.mlp import Mlp
from keras_vits.layers.norm import GroupNorm, LayerScale
from keras_vits.layers.position import PositionEmbedding
from keras_vits.layers.transformer import TransformerBlock
from keras_vits.layers.window import fold, unfold

__all__ = [
    "ATTENTIONS",
    "ConvNorm",
    "CrossCovarianceAttention",
    "DropPath",
    "EfficientAttention",
    "FavorAttention",
    "GroupNorm",
    "InvertedResidual",
    "KernelAttention",
    "LayerScale",
    "LinformerAttention",
    "Mlp",
    "MultiHeadAttention",
    "PositionEmbedding",
    "ReLULinearAttention",
    "SameShape",
    "SeparableSelfAttention",
    "TransformerBlock",
    "drop_path_rates",
    "fold",
    "unfold",
]
