"""Convolution blocks of the mobile families."""

from typing import Any

from keras import layers, ops

from keras_vits.layers._backend import apply
from keras_vits.layers.base import Shape
from keras_vits.layers.drop import DropPath
from keras_vits.layers.mlp import activation_function


class ConvNorm(layers.Layer):
    """(B,H,W,C) -> (B,H/s,W/s,width): activation(bn(conv(x))). MobileNetV2 (arXiv 1801.04381), section 3.

    The image is padded by kernel_size // 2 on every side, as PyTorch does it; `"same"` equals that at stride 1 only.

    Args:
        width: output channels; `None` makes the convolution depthwise.
        kernel_size: side of the kernel in pixels, odd.
        strides: s.
        activation: name of a Keras activation, `"gelu_tanh"` or `"quick_gelu"`, or `None`.
        epsilon: of the batch normalisation; `None` leaves it out and gives the convolution a bias.
        norm: name of the batch normalisation, which is part of its weights' paths.
    """

    def __init__(
        self,
        width: int | None,
        kernel_size: int = 1,
        strides: int = 1,
        activation: str | None = "silu",
        epsilon: float | None = 1e-5,
        norm: str = "bn",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.activation, self.act = activation, activation_function(activation)
        self.epsilon, self.norm_name = epsilon, norm
        self.border = kernel_size // 2 if strides > 1 else 0
        options = dict(
            strides=strides,
            padding="valid" if self.border else "same",
            use_bias=epsilon is None,
            name="conv",
            dtype=self.dtype_policy,
        )
        if width is None:
            self.conv = layers.DepthwiseConv2D(kernel_size, **options)
        else:
            self.conv = layers.Conv2D(width, kernel_size, **options)
        if epsilon is not None:
            bn = layers.BatchNormalization(epsilon=epsilon, momentum=0.9, name=norm, dtype=self.dtype_policy)
            setattr(self, norm, bn)  # Keras files name a layer's weights after its attribute

    def build(self, shape: Shape) -> None:
        self.conv.build(self._padded(shape))
        if self.epsilon is not None:
            getattr(self, self.norm_name).build(self.compute_output_shape(shape))

    def compute_output_shape(self, shape: Shape) -> Shape:
        return self.conv.compute_output_shape(self._padded(shape))

    def _padded(self, shape: Shape) -> Shape:
        batch, height, width, channels = shape
        return batch, height + 2 * self.border, width + 2 * self.border, channels

    def call(self, x: Any) -> Any:
        if self.border:
            x = ops.pad(x, ((0, 0), (self.border, self.border), (self.border, self.border), (0, 0)))
        x = apply(self.conv, x)
        return self.act(x if self.epsilon is None else getattr(self, self.norm_name)(x))


class InvertedResidual(layers.Layer):
    """(B,H,W,C) -> (B,H/s,W/s,width): project(depthwise(expand(x))), + x if the shape stays. MobileNetV2, section 3.3.

    Args:
        width: output channels.
        strides: s.
        expansion: channels between the two 1 x 1 convolutions, as a multiple of C.
        drop_path: probability that a sample loses the branch beside x in training.
    """

    def __init__(self, width: int, strides: int = 1, expansion: int = 4, drop_path: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.width, self.strides, self.expansion = width, strides, expansion
        self.depthwise = ConvNorm(None, 3, strides, name="depthwise", dtype=self.dtype_policy)
        self.project = ConvNorm(width, activation=None, name="project", dtype=self.dtype_policy)
        self.drop_path = DropPath(drop_path, name="drop_path", dtype=self.dtype_policy)

    def build(self, shape: Shape) -> None:
        hidden = self.expansion * shape[-1]
        self.expand = ConvNorm(hidden, name="expand", dtype=self.dtype_policy)
        self.expand.build(shape)
        self.depthwise.build((*shape[:-1], hidden))
        self.project.build((*self.compute_output_shape(shape)[:-1], hidden))
        self.drop_path.build(shape)
        self.residual = self.strides == 1 and shape[-1] == self.width

    def compute_output_shape(self, shape: Shape) -> Shape:
        return (*self.depthwise.compute_output_shape(shape)[:-1], self.width)

    def call(self, x: Any) -> Any:
        y = self.project(self.depthwise(self.expand(x)))
        return x + self.drop_path(y) if self.residual else y
