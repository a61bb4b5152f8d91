"""MobileViT.

    image -> stem -> stages 0, 1 (inverted residuals) -> stages 2, 3, 4 (inverted residual, MobileViT block)
          -> final_conv -> pool (mean) -> head

Paper    Mehta and Rastegari, MobileViT: Light-weight, General-purpose, and Mobile-friendly Vision Transformer,
         arXiv 2110.02178, table 4.
Code     timm/models/mobilevit.py and byobnet.py (Apache-2.0), whose variant names and checkpoints these are.
Differs  Height and width must be multiples of 64 (total stride x patch size): timm resizes the feature maps of other
         sizes instead. drop_path applies to residual branches only: timm also drops the outputs of the stride-2 blocks,
         which have no shortcut to fall back on. LayerNorm epsilon is 1e-5, as in timm.
"""

from dataclasses import dataclass

from keras import layers, ops

from keras_vits.layers import ConvNorm, SameShape, TransformerBlock, fold, unfold
from keras_vits.layers import _names as layer_names
from keras_vits.layers._backend import apply
from keras_vits.models._base import VisionModel
from keras_vits.models._config import divides
from keras_vits.models._registry import register
from keras_vits.models._stages import check_mobile, mobile_stages, total_stride

EPSILON = 1e-5  # of every LayerNorm


@dataclass(frozen=True, kw_only=True)
class MobileViTConfig:
    image_size: int | tuple[int, int] = 256  # pixels, or (height, width)
    in_channels: int = 3
    patch_size: int = 2  # side of a patch in pixels of the feature map
    stem_width: int = 16
    widths: tuple[int, ...]  # output channels of each stage
    depths: tuple[int, ...] = (1, 3, 1, 1, 1)  # inverted residuals in each stage
    token_widths: tuple[int, ...]  # D of the MobileViT blocks, which end the last stages
    token_depths: tuple[int, ...] = (2, 4, 3)  # L, transformer layers in each of them
    final_width: int  # channels that are pooled
    heads: int = 4
    expansion: int = 4  # hidden channels of an inverted residual, as a multiple of its input's
    mlp_expansion: int = 2  # hidden width of a transformer layer's perceptron, as a multiple of D
    num_classes: int = 1000  # K; 0 stops at the pooled features (B,final_width)
    drop_path: float = 0.0  # probability at the last block, growing linearly from 0


class MobileViTBlock(SameShape):
    """(B,h,w,C) -> (B,h,w,C): fuse([x, out(fold(norm(transformer(unfold(embed(local(x)))))))]). MobileViT, figure 1b.

    Every pixel of a patch attends to the pixels at the same place in the other patches.
    """

    def __init__(self, token_width, token_depth, heads, mlp_hidden, patch_size=2, drop_path=0.0, **kwargs):
        super().__init__(**kwargs)
        dtype = self.dtype_policy
        self.token_width, self.patch_size = token_width, patch_size
        self.embed = layers.Conv2D(token_width, 1, use_bias=False, name="embed", dtype=dtype)
        self.transformer = [
            TransformerBlock(heads, mlp_hidden, EPSILON, "silu", drop_path=drop_path, name=f"layer_{i}", dtype=dtype)
            for i in range(token_depth)
        ]
        self.norm = layers.LayerNormalization(epsilon=EPSILON, name="norm", dtype=dtype)

    def build(self, shape):
        batch, height, width, channels = shape
        self.local = ConvNorm(channels, 3, name="local", dtype=self.dtype_policy)
        self.out = ConvNorm(channels, name="out", dtype=self.dtype_policy)
        self.fuse = ConvNorm(channels, 3, name="fuse", dtype=self.dtype_policy)
        self.local.build(shape)
        self.build_tokens(shape)
        self.out.build((batch, height, width, self.token_width))
        self.fuse.build((batch, height, width, 2 * channels))

    def build_tokens(self, shape):
        self.embed.build(shape)
        for layer in (*self.transformer, self.norm):
            layer.build((None, shape[1] * shape[2] // self.patch_size**2, self.token_width))

    def tokens(self, x):
        """(B,h,w,D) -> (B,h,w,D): fold(norm(transformer(unfold(x)))), what v1 and v3 have in common."""
        height, width = x.shape[1:3]
        x = unfold(x, self.patch_size)
        pixels, patches, channels = x.shape[1:]
        x = ops.reshape(x, (-1, patches, channels))  # one sequence for each pixel of a patch
        for layer in self.transformer:
            x = layer(x)
        x = ops.reshape(self.norm(x), (-1, pixels, patches, channels))
        return fold(x, height, width, self.patch_size)

    def call(self, x):
        y = self.out(self.tokens(apply(self.embed, self.local(x))))
        return self.fuse(ops.concatenate([x, y], axis=-1))


def conv_norms(names):
    """Rows of transformers' weight table for `ConvNorm`s, from ours -> the source's."""
    parts = dict(conv="convolution", bn="normalization")
    return {f"{ours}/{o}": f"{theirs}.{t}" for ours, theirs in names.items() for o, t in parts.items()}


TRANSFORMERS = {  # the rows that v1 and v2 share
    **conv_norms(
        {
            "stem": "conv_stem",
            "stage_{s}_block_{i}/expand": "encoder.layer.{s}.layer.{i}.expand_1x1",
            "stage_{s}_block_{i}/depthwise": "encoder.layer.{s}.layer.{i}.conv_3x3",
            "stage_{s}_block_{i}/project": "encoder.layer.{s}.layer.{i}.reduce_1x1",
            **{f"stage_{s}_block_0/expand": f"encoder.layer.{s}.downsampling_layer.expand_1x1" for s in (2, 3, 4)},
            **{f"stage_{s}_block_0/depthwise": f"encoder.layer.{s}.downsampling_layer.conv_3x3" for s in (2, 3, 4)},
            **{f"stage_{s}_block_0/project": f"encoder.layer.{s}.downsampling_layer.reduce_1x1" for s in (2, 3, 4)},
            "stage_{s}_block_{i}/local": "encoder.layer.{s}.conv_kxk",
            "stage_{s}_block_{i}/out": "encoder.layer.{s}.conv_projection",
        }
    ),
    "stage_{s}_block_{i}/embed": "encoder.layer.{s}.conv_1x1.convolution",
    "stage_{s}_block_{i}/layer_{j}/norm1": "encoder.layer.{s}.transformer.layer.{j}.layernorm_before",
    "stage_{s}_block_{i}/layer_{j}/norm2": "encoder.layer.{s}.transformer.layer.{j}.layernorm_after",
    "stage_{s}_block_{i}/norm": "encoder.layer.{s}.layernorm",
    "head": "classifier",
    "": ("mobilevit", "mobilevitv2"),
}


@register
class MobileViT(VisionModel):
    Config = MobileViTConfig
    Block = MobileViTBlock
    preprocessing_defaults = dict(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    variants = {
        "mobilevit_xxs": dict(widths=(16, 24, 48, 64, 80), token_widths=(64, 80, 96), final_width=320, expansion=2),
        "mobilevit_xs": dict(widths=(32, 48, 64, 80, 96), token_widths=(96, 120, 144), final_width=384),
        "mobilevit_s": dict(widths=(32, 64, 96, 128, 160), token_widths=(144, 192, 240), final_width=640),
    }
    names = {
        "timm": {
            "stem": "stem",
            "stage_{s}_block_{i}/expand": "stages.{s}.{i}.conv1_1x1",
            "stage_{s}_block_{i}/depthwise": "stages.{s}.{i}.conv2_kxk",
            "stage_{s}_block_{i}/project": "stages.{s}.{i}.conv3_1x1",
            "stage_{s}_block_{i}/local": "stages.{s}.{i}.conv_kxk",
            "stage_{s}_block_{i}/embed": "stages.{s}.{i}.conv_1x1",
            "stage_{s}_block_{i}/layer_{j}": "stages.{s}.{i}.transformer.{j}",
            "stage_{s}_block_{i}/layer_{j}/attention/qkv": "stages.{s}.{i}.transformer.{j}.attn.qkv",
            "stage_{s}_block_{i}/layer_{j}/attention/out": "stages.{s}.{i}.transformer.{j}.attn.proj",
            "stage_{s}_block_{i}/norm": "stages.{s}.{i}.norm",
            "stage_{s}_block_{i}/out": "stages.{s}.{i}.conv_proj",
            "stage_{s}_block_{i}/fuse": "stages.{s}.{i}.conv_fusion",
            "final_conv": "final_conv",
            "head": "head.fc",
        },
        "transformers": {
            **TRANSFORMERS,
            **conv_norms({"stage_{s}_block_{i}/fuse": "encoder.layer.{s}.fusion", "final_conv": "conv_1x1_exp"}),
            "stage_{s}_block_{i}/layer_{j}/attention/qkv": tuple(
                f"encoder.layer.{{s}}.transformer.layer.{{j}}.attention.attention.{p}"
                for p in ("query", "key", "value")
            ),
            "stage_{s}_block_{i}/layer_{j}/attention/out": (
                "encoder.layer.{s}.transformer.layer.{j}.attention.output.dense"
            ),
            "stage_{s}_block_{i}/layer_{j}/mlp/fc1": "encoder.layer.{s}.transformer.layer.{j}.intermediate.dense",
            "stage_{s}_block_{i}/layer_{j}/mlp/fc2": "encoder.layer.{s}.transformer.layer.{j}.output.dense",
        },
    }

    @staticmethod
    def check(cfg):
        check_mobile(cfg)
        divides(cfg, "heads", "token_widths")

    @staticmethod
    def size_multiple(cfg):
        return total_stride(cfg.widths, cfg.patch_size)

    @classmethod
    def backbone(cls, cfg, image):
        x = mobile_stages(cfg, image, cls.Block, cfg.heads)
        x = ConvNorm(cfg.final_width, name="final_conv")(x)
        return layers.GlobalAveragePooling2D(name=layer_names.POOL)(x)
