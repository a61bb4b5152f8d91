"""Hybrid Vision Transformer: a ResNet makes the feature map that a ViT cuts into patches.

    image -> stem -> stages (bottlenecks) -> embed (patches of the feature map) -> as in vit.py from the tokens on

Paper    Dosovitskiy et al., An Image is Worth 16x16 Words, arXiv 2010.11929, section 3.1; sizes R26 and Ti: Steiner et
         al., How to train your ViT?, arXiv 2106.10270, table 2. Their ResNet is BiT's (arXiv 1912.11370): weight
         standardisation and group normalisation. The other backbone, ResNet-D, is for vit_resnetd.py.
Code     timm/models/vision_transformer_hybrid.py and resnetv2.py (Apache-2.0), whose variant names and checkpoints
         these are.
Differs  Height and width must be multiples of the total stride: timm lets the feature map have a ragged edge. Every
         LayerNorm has epsilon 1e-6 and GELU is the exact erf form, group and batch normalisation have 1e-5, weight
         standardisation 1e-8, as in timm.
"""

from dataclasses import dataclass

from keras import activations, layers, ops

from keras_vits.layers import ConvNorm, GroupNorm
from keras_vits.layers import _names as layer_names
from keras_vits.models._config import one_of
from keras_vits.models._registry import register
from keras_vits.models.vit import BASE, LARGE, NAMES, SMALL, TINY, ViTConfig, ViTHead, encode

STEM_WIDTH = 64  # channels of the stem; the first stage has 256 and each further one twice as many


@dataclass(frozen=True, kw_only=True)
class HybridViTConfig(ViTConfig):
    patch_size: int = 1  # pixels of the feature map
    backbone: str = "bit"  # or "resnetd"
    stages: tuple[int, ...] = (3, 4, 9)  # bottlenecks in each stage


class StandardizedConv2D(layers.Conv2D):
    """A convolution whose kernel has zero mean and unit variance for each output. Arxiv 1903.10520, equation 7."""

    def convolution_op(self, inputs, kernel):
        exact = ops.cast(kernel, "float32")
        exact = exact - ops.mean(exact, axis=(0, 1, 2))
        exact = exact * ops.rsqrt(ops.mean(ops.square(exact), axis=(0, 1, 2)) + 1e-8)
        return super().convolution_op(inputs, ops.cast(exact, kernel.dtype))


class StandardizedConvNorm(layers.Layer):
    """(B,H,W,C) -> (B,H/s,W/s,width): activation(norm(conv(x))), the convolution standardised and padded as `"same"`.

    Args:
        width: output channels.
        kernel_size: side of the kernel in pixels.
        strides: s.
        activation: name of a Keras activation, or `None`.
    """

    def __init__(self, width, kernel_size=1, strides=1, activation="relu", **kwargs):
        super().__init__(**kwargs)
        self.activation = activation
        self.conv = StandardizedConv2D(
            width, kernel_size, strides, "same", use_bias=False, name="conv", dtype=self.dtype_policy
        )
        self.norm = GroupNorm(name="norm", dtype=self.dtype_policy)

    def build(self, shape):
        self.conv.build(shape)
        self.norm.build(self.compute_output_shape(shape))

    def compute_output_shape(self, shape):
        return self.conv.compute_output_shape(shape)

    def call(self, x):
        return activations.get(self.activation)(self.norm(self.conv(x)))


UNITS = {"bit": StandardizedConvNorm, "resnetd": ConvNorm}  # convolution, normalisation, activation


class Stem(layers.Layer):
    """(B,H,W,C) -> (B,H/4,W/4,64): one convolution 7 x 7 (BiT) or three 3 x 3 (ResNet-D), then the maximum of 3 x 3.

    Args:
        backbone: `"bit"` or `"resnetd"`.
    """

    def __init__(self, backbone, **kwargs):
        super().__init__(**kwargs)
        self.backbone = backbone
        sizes = {"bit": [(64, 7, 2)], "resnetd": [(32, 3, 2), (32, 3, 1), (64, 3, 1)]}[backbone]
        self.units = [
            UNITS[backbone](*size, activation="relu", name=f"unit{i}", dtype=self.dtype_policy)
            for i, size in enumerate(sizes, start=1)
        ]

    def build(self, shape):
        for unit in self.units:
            unit.build(shape)
            shape = unit.compute_output_shape(shape)

    def compute_output_shape(self, shape):
        return (shape[0], shape[1] // 4, shape[2] // 4, STEM_WIDTH)

    def call(self, x):
        for unit in self.units:
            x = unit(x)
        if self.backbone == "bit":
            return ops.max_pool(x, 3, 2, padding="same")
        x = ops.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))  # zeros, which no value is below after the ReLU
        return ops.max_pool(x, 3, 2, padding="valid")


class Bottleneck(layers.Layer):
    """(B,H,W,C) -> (B,H/s,W/s,width): relu(shortcut(x) + unit3(unit2(unit1(x)))). ResNet (arXiv 1512.03385), figure 5.

    The shortcut is x, or where the shape changes a convolution 1 x 1, in ResNet-D after the mean of 2 x 2.

    Args:
        backbone: `"bit"` or `"resnetd"`.
        width: output channels.
        strides: s, of the middle convolution.
    """

    def __init__(self, backbone, width, strides=1, **kwargs):
        super().__init__(**kwargs)
        self.width, self.strides = width, strides
        self.mean = backbone == "resnetd" and strides > 1
        self.unit = UNITS[backbone]

    def build(self, shape):
        hidden, dtype = self.width // 4, self.dtype_policy
        self.unit1 = self.unit(hidden, activation="relu", name="unit1", dtype=dtype)
        self.unit2 = self.unit(hidden, 3, self.strides, activation="relu", name="unit2", dtype=dtype)
        self.unit3 = self.unit(self.width, activation=None, name="unit3", dtype=dtype)
        self.unit1.build(shape)
        self.unit2.build((*shape[:-1], hidden))
        self.unit3.build((*self.compute_output_shape(shape)[:-1], hidden))
        self.shortcut = None
        if self.strides > 1 or shape[-1] != self.width:
            strides = 1 if self.mean else self.strides
            self.shortcut = self.unit(self.width, 1, strides, activation=None, name="shortcut", dtype=dtype)
            self.shortcut.build((*self.compute_output_shape(shape)[:-1], shape[-1]) if self.mean else shape)

    def compute_output_shape(self, shape):
        return (shape[0], shape[1] // self.strides, shape[2] // self.strides, self.width)

    def call(self, x):
        y = self.unit3(self.unit2(self.unit1(x)))
        x = ops.average_pool(x, 2, 2) if self.mean else x
        return ops.relu(y + (self.shortcut(x) if self.shortcut else x))


@register
class HybridViT(ViTHead):
    Config = HybridViTConfig

    @staticmethod
    def check(cfg):
        ViTHead.check(cfg)
        one_of(cfg, "backbone", UNITS)

    @staticmethod
    def size_multiple(cfg):
        return 4 * 2 ** max(len(cfg.stages) - 1, 0) * cfg.patch_size  # every stage but the first halves the size

    @staticmethod
    def backbone(cfg, image):
        x = Stem(cfg.backbone, name=layer_names.STEM)(image)
        for s, depth in enumerate(cfg.stages):
            for i in range(depth):
                strides = 2 if s > 0 and i == 0 else 1
                x = Bottleneck(cfg.backbone, 4 * STEM_WIDTH * 2**s, strides, name=layer_names.stage_block(s, i))(x)
        x = layers.Conv2D(cfg.width, cfg.patch_size, strides=cfg.patch_size, use_bias=not cfg.norm_pre, name="embed")(x)
        return encode(cfg, x)

    names = {
        "timm": {
            "stem/unit1": "patch_embed.backbone.stem",
            "stage_{s}_block_{i}/unit{j}/conv": "patch_embed.backbone.stages.{s}.blocks.{i}.conv{j}",
            "stage_{s}_block_{i}/unit{j}/norm": "patch_embed.backbone.stages.{s}.blocks.{i}.norm{j}",
            "stage_{s}_block_{i}/shortcut": "patch_embed.backbone.stages.{s}.blocks.{i}.downsample",
            "embed": "patch_embed.proj",
            **NAMES,
        }
    }
    variants = {
        "vit_small_r26_s32_224": dict(**SMALL, stages=(2, 2, 2, 2)),
        "vit_small_r26_s32_384": dict(**SMALL, stages=(2, 2, 2, 2), image_size=384),
        "vit_base_r26_s32_224": dict(**BASE, stages=(2, 2, 2, 2)),
        "vit_base_r50_s16_224": dict(**BASE, stages=(3, 4, 9)),
        "vit_base_r50_s16_384": dict(**BASE, stages=(3, 4, 9), image_size=384),
        "vit_large_r50_s32_224": dict(**LARGE, stages=(3, 4, 6, 3)),
        "vit_large_r50_s32_384": dict(**LARGE, stages=(3, 4, 6, 3), image_size=384),
    }


@register
class StemViT(HybridViT):
    """The hybrid without stages: the stem's feature map is cut into patches. Its checkpoints name that otherwise."""

    names = {"timm": {"stem/unit1": "patch_embed.backbone", "embed": "patch_embed.proj", **NAMES}}
    variants = {
        "vit_tiny_r_s16_p8_224": dict(**TINY, stages=(), patch_size=8),
        "vit_tiny_r_s16_p8_384": dict(**TINY, stages=(), patch_size=8, image_size=384),
    }
