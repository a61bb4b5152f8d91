"""Vision Transformer.

    image -> stem (patches) -> tokens (+ class token + position) -> block x depth -> norm -> pool (class token) -> head

Paper    Dosovitskiy et al., An Image is Worth 16x16 Words, arXiv 2010.11929, table 1; sizes tiny and small: DeiT,
         arXiv 2012.12877, table 1.
Code     timm/models/vision_transformer.py (Apache-2.0), whose variant names and AugReg checkpoints these are.
Differs  nothing: LayerNorm epsilon is 1e-6, GELU the exact erf form, as in timm.
"""

from dataclasses import dataclass

from keras import initializers, layers, ops

from keras_vits.layers import SameShape, TransformerBlock, drop_path_rates
from keras_vits.model import VisionModel
from keras_vits.registry import register
from keras_vits.weights import resample_positions

EPSILON = 1e-6  # of every LayerNorm


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    image_size: int | tuple[int, int] = 224  # pixels, or (height, width)
    in_channels: int = 3
    patch_size: int = 16  # pixels
    width: int  # D
    depth: int  # L
    heads: int
    mlp_hidden: int
    num_classes: int = 1000  # K; 0 stops at the pooled features (B,D)
    drop_path: float = 0.0  # probability at the last block, growing linearly from 0
    dropout: float = 0.0  # probability after the position embedding and in the blocks' dense layers


class ClassToken(layers.Layer):
    """(B,N,D) -> (B,N+1,D): puts a learned token before the others. ViT, equation 1."""

    def build(self, shape):
        self.token = self.add_weight(shape=(1, 1, shape[-1]), initializer="zeros", name="token")

    def call(self, x):
        return ops.concatenate([ops.broadcast_to(self.token, (ops.shape(x)[0], 1, x.shape[-1])), x], axis=1)


class TakeToken(layers.Layer):
    """(B,N,D) -> (B,D): the first token. ViT, equation 4."""

    def call(self, x):
        return x[:, 0]


class PositionEmbedding(SameShape):
    """(B,N,D) -> (B,N,D): adds a learned vector to every token. ViT, equation 1."""

    def build(self, shape):
        self.table = self.add_weight(
            shape=(1, *shape[1:]), initializer=initializers.RandomNormal(stddev=0.02), name="table"
        )

    def call(self, x):
        return x + self.table


def position_table(take, model):
    """Weight table: timm's position embedding, resampled if its grid is of another size."""
    grid = [side // model.cfg.patch_size for side in model.cfg.image_size]
    return resample_positions(take("pos_embed"), grid, prefix=1)


TINY = dict(width=192, depth=12, heads=3, mlp_hidden=768)
SMALL = dict(width=384, depth=12, heads=6, mlp_hidden=1536)
BASE = dict(width=768, depth=12, heads=12, mlp_hidden=3072)
LARGE = dict(width=1024, depth=24, heads=16, mlp_hidden=4096)
HUGE = dict(width=1280, depth=32, heads=16, mlp_hidden=5120)


@register
class ViT(VisionModel):
    Config = ViTConfig
    variants = {
        "vit_tiny_patch16_224": dict(**TINY),
        "vit_tiny_patch16_384": dict(**TINY, image_size=384),
        "vit_small_patch32_224": dict(**SMALL, patch_size=32),
        "vit_small_patch32_384": dict(**SMALL, patch_size=32, image_size=384),
        "vit_small_patch8_224": dict(**SMALL, patch_size=8),
        "vit_small_patch16_224": dict(**SMALL),
        "vit_small_patch16_384": dict(**SMALL, image_size=384),
        "vit_base_patch32_224": dict(**BASE, patch_size=32),
        "vit_base_patch32_384": dict(**BASE, patch_size=32, image_size=384),
        "vit_base_patch16_224": dict(**BASE),
        "vit_base_patch16_384": dict(**BASE, image_size=384),
        "vit_base_patch8_224": dict(**BASE, patch_size=8),
        "vit_large_patch32_224": dict(**LARGE, patch_size=32),
        "vit_large_patch32_384": dict(**LARGE, patch_size=32, image_size=384),
        "vit_large_patch16_224": dict(**LARGE),
        "vit_large_patch16_384": dict(**LARGE, image_size=384),
        "vit_large_patch14_224": dict(**LARGE, patch_size=14),
        "vit_huge_patch14_224": dict(**HUGE, patch_size=14),
    }
    names = {
        "timm": {
            "stem": "patch_embed.proj",
            "class_token/token": "cls_token",
            "position/table": position_table,
            "block_{i}": "blocks.{i}",
            "block_{i}/attention/qkv": "blocks.{i}.attn.qkv",
            "block_{i}/attention/out": "blocks.{i}.attn.proj",
            "norm": "norm",
            "head": "head",
        }
    }

    @staticmethod
    def size_multiple(cfg):
        return cfg.patch_size

    @staticmethod
    def graph(cfg, image):
        x = layers.Conv2D(cfg.width, cfg.patch_size, strides=cfg.patch_size, name="stem")(image)
        x = layers.Reshape((-1, cfg.width), name="tokens")(x)
        x = ClassToken(name="class_token")(x)
        x = PositionEmbedding(name="position")(x)
        x = layers.Dropout(cfg.dropout, name="drop")(x)
        for i, rate in enumerate(drop_path_rates(cfg.drop_path, cfg.depth)):
            x = TransformerBlock(
                cfg.heads, cfg.mlp_hidden, EPSILON, dropout=cfg.dropout, drop_path=rate, name=f"block_{i}"
            )(x)
        x = layers.LayerNormalization(epsilon=EPSILON, name="norm")(x)
        x = TakeToken(name="pool")(x)
        return layers.Dense(cfg.num_classes, dtype="float32", name="head")(x) if cfg.num_classes else x
