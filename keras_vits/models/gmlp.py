"""gMLP.

    image -> stem (patches) -> tokens -> block x depth -> norm -> pool (mean) -> head

Paper    Liu et al., Pay Attention to MLPs, arXiv 2105.08050, table 1.
Code     timm/models/mlp_mixer.py (Apache-2.0), whose variant names and checkpoints these are.
Differs  drop_path grows linearly over the blocks; timm gives every block the same. LayerNorm epsilon is 1e-6, in the
         gating unit 1e-5, GELU the exact erf form, as in timm.
"""

import functools
from dataclasses import dataclass

from keras import activations, initializers, layers, ops

from keras_vits.layers import DropPath, SameShape
from keras_vits.models._base import VisionModel
from keras_vits.models._registry import register
from keras_vits.models._stages import mlp_blocks

EPSILON = 1e-6  # of every LayerNorm but the gating unit's
GATE_EPSILON = 1e-5


@dataclass(frozen=True, kw_only=True)
class GMLPConfig:
    image_size: int | tuple[int, int] = 224  # pixels, or (height, width)
    in_channels: int = 3
    patch_size: int = 16  # pixels
    width: int  # D
    depth: int = 30  # L
    mlp_hidden: int  # even: one half is gated by the other
    num_classes: int = 1000  # K; 0 stops at the pooled features (B,D)
    drop_path: float = 0.0  # probability at the last block, growing linearly from 0


class SpatialGate(layers.Layer):
    """(B,N,2H) -> (B,N,H): u * mix(norm(v)')', where u and v are the halves of x. gMLP, equations 2 and 4.

    The layer that mixes the tokens begins as nearly the constant 1: the block begins as a perceptron of each token.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.norm = layers.LayerNormalization(epsilon=GATE_EPSILON, name="norm", dtype=self.dtype_policy)

    def build(self, shape):
        batch, tokens, _ = shape
        self.mix = layers.Dense(
            tokens,
            kernel_initializer=initializers.RandomNormal(stddev=1e-6),
            bias_initializer="ones",
            name="mix",
            dtype=self.dtype_policy,
        )
        half = self.compute_output_shape(shape)[-1]
        self.norm.build((batch, tokens, half))
        self.mix.build((batch, half, tokens))

    def compute_output_shape(self, shape):
        return (*shape[:-1], shape[-1] // 2)

    def call(self, x):
        half = x.shape[-1] // 2
        v = self.mix(ops.transpose(self.norm(x[..., half:]), (0, 2, 1)))
        return x[..., :half] * ops.transpose(v, (0, 2, 1))


class GMLPBlock(SameShape):
    """(B,N,D) -> (B,N,D): x + fc2(gate(gelu(fc1(norm(x))))). gMLP, equation 1 and figure 1."""

    def __init__(self, mlp_hidden, drop_path=0.0, **kwargs):
        super().__init__(**kwargs)
        self.mlp_hidden = mlp_hidden
        self.norm = layers.LayerNormalization(epsilon=EPSILON, name="norm", dtype=self.dtype_policy)
        self.fc1 = layers.Dense(mlp_hidden, name="fc1", dtype=self.dtype_policy)
        self.gate = SpatialGate(name="gate", dtype=self.dtype_policy)
        self.drop_path = DropPath(drop_path, name="drop_path", dtype=self.dtype_policy)

    def build(self, shape):
        batch, tokens, width = shape
        self.fc2 = layers.Dense(width, name="fc2", dtype=self.dtype_policy)
        for layer in (self.norm, self.fc1, self.drop_path):
            layer.build(shape)
        self.gate.build((batch, tokens, self.mlp_hidden))
        self.fc2.build((batch, tokens, self.mlp_hidden // 2))

    def call(self, x):
        y = self.gate(activations.gelu(self.fc1(self.norm(x))))
        return x + self.drop_path(self.fc2(y))


@register
class GMLP(VisionModel):
    Config = GMLPConfig
    preprocessing_defaults = dict(crop=0.875)
    variants = {
        "gmlp_ti16_224": dict(width=128, mlp_hidden=768),
        "gmlp_s16_224": dict(width=256, mlp_hidden=1536),
        "gmlp_b16_224": dict(width=512, mlp_hidden=3072),
    }
    names = {
        "timm": {
            "stem": "stem.proj",
            "block_{i}/norm": "blocks.{i}.norm",
            "block_{i}/fc1": "blocks.{i}.mlp_channels.fc1",
            "block_{i}/gate/norm": "blocks.{i}.mlp_channels.gate.norm",
            "block_{i}/gate/mix": "blocks.{i}.mlp_channels.gate.proj",
            "block_{i}/fc2": "blocks.{i}.mlp_channels.fc2",
            "norm": "norm",
            "head": "head",
        }
    }

    @staticmethod
    def check(cfg):
        if cfg.mlp_hidden % 2:
            raise ValueError(f"mlp_hidden must be even, as one half gates the other; received {cfg.mlp_hidden}.")

    @staticmethod
    def size_multiple(cfg):
        return cfg.patch_size

    @staticmethod
    def backbone(cfg, image):
        block = lambda rate, name: GMLPBlock(cfg.mlp_hidden, rate, name=name)
        return mlp_blocks(cfg, image, block, functools.partial(layers.LayerNormalization, epsilon=EPSILON))
