"""ResMLP.

    image -> stem (patches) -> tokens -> block x depth -> norm -> pool (mean) -> head

Paper    Touvron et al., ResMLP: Feedforward networks for image classification with data-efficient training,
         arXiv 2105.03404, section 2.
Code     timm/models/mlp_mixer.py (Apache-2.0), whose variant names and checkpoints these are.
Differs  drop_path grows linearly over the blocks; timm gives every block the same. There is no LayerNorm: `norm` is an
         affine map of each channel, which needs no statistics. GELU is the exact erf form, as in timm.
"""

from dataclasses import dataclass

from keras import layers, ops

from keras_vits.layers import DropPath, LayerScale, Mlp, SameShape
from keras_vits.models._base import VisionModel
from keras_vits.models._registry import register
from keras_vits.models._stages import mlp_blocks


@dataclass(frozen=True, kw_only=True)
class ResMLPConfig:
    image_size: int | tuple[int, int] = 224  # pixels, or (height, width)
    in_channels: int = 3
    patch_size: int = 16  # pixels
    width: int = 384  # D
    depth: int  # L
    mlp_hidden: int = 1536
    layer_scale: float  # initial factor of every residual branch
    num_classes: int = 1000  # K; 0 stops at the pooled features (B,D)
    drop_path: float = 0.0  # probability at the last block, growing linearly from 0


class Affine(SameShape):
    """(B,N,D) -> (B,N,D): alpha * x + beta. ResMLP, equation 1."""

    def build(self, shape):
        self.alpha = self.add_weight(shape=(1, 1, shape[-1]), initializer="ones", name="alpha")
        self.beta = self.add_weight(shape=(1, 1, shape[-1]), initializer="zeros", name="beta")

    def call(self, x):
        return self.alpha * x + self.beta


class ResMLPBlock(SameShape):
    """(B,N,D) -> (B,N,D): x + scale1 * mix(norm1(x)')', then x + scale2 * mlp(norm2(x)). ResMLP, equations 2 and 3."""

    def __init__(self, mlp_hidden, layer_scale, drop_path=0.0, **kwargs):
        super().__init__(**kwargs)
        self.norm1 = Affine(name="norm1", dtype=self.dtype_policy)
        self.norm2 = Affine(name="norm2", dtype=self.dtype_policy)
        self.mlp = Mlp(mlp_hidden, name="mlp", dtype=self.dtype_policy)
        self.scale1 = LayerScale(layer_scale, name="scale1", dtype=self.dtype_policy)
        self.scale2 = LayerScale(layer_scale, name="scale2", dtype=self.dtype_policy)
        self.drop_path = DropPath(drop_path, name="drop_path", dtype=self.dtype_policy)

    def build(self, shape):
        batch, tokens, width = shape
        self.mix = layers.Dense(tokens, name="mix", dtype=self.dtype_policy)
        self.mix.build((batch, width, tokens))
        for layer in (self.norm1, self.scale1, self.norm2, self.mlp, self.scale2, self.drop_path):
            layer.build(shape)

    def call(self, x):
        y = ops.transpose(self.mix(ops.transpose(self.norm1(x), (0, 2, 1))), (0, 2, 1))
        x = x + self.drop_path(self.scale1(y))
        return x + self.drop_path(self.scale2(self.mlp(self.norm2(x))))


@register
class ResMLP(VisionModel):
    Config = ResMLPConfig
    preprocessing_defaults = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), crop=0.875)
    variants = {
        "resmlp_12_224": dict(depth=12, layer_scale=1e-4),
        "resmlp_24_224": dict(depth=24, layer_scale=1e-5),
        "resmlp_36_224": dict(depth=36, layer_scale=1e-6),
        "resmlp_big_24_224": dict(patch_size=8, width=768, depth=24, mlp_hidden=3072, layer_scale=1e-6),
    }
    names = {
        "timm": {
            "stem": "stem.proj",
            "block_{i}": "blocks.{i}",
            "block_{i}/norm1/beta": "blocks.{i}.norm1.beta",  # not the bias of a norm, as a leaf `beta` is elsewhere
            "block_{i}/norm2/beta": "blocks.{i}.norm2.beta",
            "block_{i}/mix": "blocks.{i}.linear_tokens",
            "block_{i}/scale1/scale": "blocks.{i}.ls1",
            "block_{i}/scale2/scale": "blocks.{i}.ls2",
            "block_{i}/mlp": "blocks.{i}.mlp_channels",
            "norm": "norm",
            "norm/beta": "norm.beta",
            "head": "head",
        }
    }

    @staticmethod
    def size_multiple(cfg):
        return cfg.patch_size

    @staticmethod
    def backbone(cfg, image):
        block = lambda rate, name: ResMLPBlock(cfg.mlp_hidden, cfg.layer_scale, rate, name=name)
        return mlp_blocks(cfg, image, block, Affine)
