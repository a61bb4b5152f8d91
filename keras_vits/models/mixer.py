"""MLP-Mixer, and gMixer, its form with gated perceptrons.

    image -> stem (patches) -> tokens -> block x depth -> norm -> pool (mean) -> head

Paper    Tolstikhin et al., MLP-Mixer: An all-MLP Architecture for Vision, arXiv 2105.01601, table 1. gMixer has no
         paper: it is timm's experiment with the gated linear units of Shazeer, arXiv 2002.05202.
Code     timm/models/mlp_mixer.py (Apache-2.0), whose variant names and checkpoints these are.
Differs  drop_path grows linearly over the blocks, as in the paper; timm gives every block the same. LayerNorm
         epsilon is 1e-6, GELU the exact erf form, as in timm.
"""

import functools
from dataclasses import dataclass

from keras import layers, ops

from keras_vits.layers import DropPath, Mlp, SameShape
from keras_vits.models._base import VisionModel
from keras_vits.models._registry import register
from keras_vits.models._stages import mlp_blocks

EPSILON = 1e-6  # of every LayerNorm


@dataclass(frozen=True, kw_only=True)
class MixerConfig:
    image_size: int | tuple[int, int] = 224  # pixels, or (height, width)
    in_channels: int = 3
    patch_size: int = 16  # pixels
    width: int  # D
    depth: int  # L
    token_hidden: int
    channel_hidden: int
    gated: bool = False  # whether the perceptrons are gated linear units with SiLU instead of GELU
    num_classes: int = 1000  # K; 0 stops at the pooled features (B,D)
    drop_path: float = 0.0  # probability at the last block, growing linearly from 0


class GatedMlp(Mlp):
    """(..., D) -> (..., D): fc2(a * silu(b)), where a and b are the halves of fc1(x): the gate is the second half."""

    def __init__(self, hidden, **kwargs):
        super().__init__(hidden, "silu", gated=True, **kwargs)

    def call(self, x):
        x = self.fc1(x)
        return self.fc2(x[..., : self.hidden] * self.act(x[..., self.hidden :]))


class MixerBlock(SameShape):
    """(B,N,D) -> (B,N,D): x + token_mlp(token_norm(x)')', then x + channel_mlp(channel_norm(x)). Mixer, equation 1."""

    def __init__(self, token_hidden, channel_hidden, gated=False, drop_path=0.0, **kwargs):
        super().__init__(**kwargs)
        mlp = GatedMlp if gated else Mlp
        self.token_norm = layers.LayerNormalization(epsilon=EPSILON, name="token_norm", dtype=self.dtype_policy)
        self.token_mlp = mlp(token_hidden, name="token_mlp", dtype=self.dtype_policy)
        self.channel_norm = layers.LayerNormalization(epsilon=EPSILON, name="channel_norm", dtype=self.dtype_policy)
        self.channel_mlp = mlp(channel_hidden, name="channel_mlp", dtype=self.dtype_policy)
        self.drop_path = DropPath(drop_path, name="drop_path", dtype=self.dtype_policy)

    def build(self, shape):
        batch, tokens, width = shape
        for layer in (self.token_norm, self.channel_norm, self.channel_mlp, self.drop_path):
            layer.build(shape)
        self.token_mlp.build((batch, width, tokens))

    def call(self, x):
        y = self.token_mlp(ops.transpose(self.token_norm(x), (0, 2, 1)))
        x = x + self.drop_path(ops.transpose(y, (0, 2, 1)))
        return x + self.drop_path(self.channel_mlp(self.channel_norm(x)))


SMALL = dict(width=512, depth=8, token_hidden=256, channel_hidden=2048)
BASE = dict(width=768, depth=12, token_hidden=384, channel_hidden=3072)
LARGE = dict(width=1024, depth=24, token_hidden=512, channel_hidden=4096)


@register
class MLPMixer(VisionModel):
    Config = MixerConfig
    preprocessing_defaults = dict(crop=0.875)
    variants = {
        "mixer_s32_224": dict(**SMALL, patch_size=32),
        "mixer_s16_224": dict(**SMALL),
        "mixer_b32_224": dict(**BASE, patch_size=32),
        "mixer_b16_224": dict(**BASE),
        "mixer_l32_224": dict(**LARGE, patch_size=32),
        "mixer_l16_224": dict(**LARGE),
    }
    names = {
        "timm": {
            "stem": "stem.proj",
            "block_{i}/token_norm": "blocks.{i}.norm1",
            "block_{i}/token_mlp": "blocks.{i}.mlp_tokens",
            "block_{i}/channel_norm": "blocks.{i}.norm2",
            "block_{i}/channel_mlp": "blocks.{i}.mlp_channels",
            "norm": "norm",
            "head": "head",
        }
    }

    @staticmethod
    def size_multiple(cfg):
        return cfg.patch_size

    @staticmethod
    def backbone(cfg, image):
        block = lambda rate, name: MixerBlock(cfg.token_hidden, cfg.channel_hidden, cfg.gated, rate, name=name)
        return mlp_blocks(cfg, image, block, functools.partial(layers.LayerNormalization, epsilon=EPSILON))


@register
class GMixer(MLPMixer):
    preprocessing_defaults = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), crop=0.875)
    variants = {
        "gmixer_12_224": dict(width=384, depth=12, token_hidden=192, channel_hidden=768, gated=True),
        "gmixer_24_224": dict(width=384, depth=24, token_hidden=192, channel_hidden=768, gated=True),
    }
