"""MobileViT v2.

    image -> stem -> stages 0, 1 (inverted residuals) -> stages 2, 3, 4 (inverted residual, MobileViT v2 block)
          -> pool (mean) -> head

Paper    Mehta and Rastegari, Separable Self-attention for Mobile Vision Transformers, arXiv 2206.02680.
Code     timm/models/mobilevit.py and byobnet.py (Apache-2.0), whose variant names and checkpoints these are.
Differs  Height and width must be multiples of 64 (total stride x patch size): timm resizes the feature maps of other
         sizes instead. drop_path applies to residual branches only: timm also drops the outputs of the stride-2 blocks,
         which have no shortcut to fall back on. The norm over a whole feature map has epsilon 1e-5, as in timm.
"""

from dataclasses import dataclass

from keras import layers

from keras_vits.layers import ConvNorm, DropPath, GroupNorm, Mlp, SameShape, SeparableSelfAttention, fold, unfold
from keras_vits.layers import _names as layer_names
from keras_vits.layers._backend import apply
from keras_vits.models._base import VisionModel
from keras_vits.models._registry import register
from keras_vits.models._stages import check_mobile, mobile_stages, total_stride
from keras_vits.models.mobilevit import TRANSFORMERS


@dataclass(frozen=True, kw_only=True)
class MobileViTV2Config:
    image_size: int | tuple[int, int] = 256  # pixels, or (height, width)
    in_channels: int = 3
    patch_size: int = 2  # side of a patch in pixels of the feature map
    stem_width: int
    widths: tuple[int, ...]  # output channels of each stage
    depths: tuple[int, ...] = (1, 2, 1, 1, 1)  # inverted residuals in each stage
    token_widths: tuple[int, ...]  # D of the MobileViT v2 blocks, which end the last stages
    token_depths: tuple[int, ...] = (2, 4, 3)  # L, transformer layers in each of them
    expansion: int = 2  # hidden channels of an inverted residual, as a multiple of its input's
    mlp_expansion: int = 2  # hidden width of a transformer layer's perceptron, as a multiple of D
    num_classes: int = 1000  # K; 0 stops at the pooled features (B,C)
    drop_path: float = 0.0  # probability at the last block, growing linearly from 0


class SeparableBlock(SameShape):
    """(B,P,N,D) -> (B,P,N,D): x + attention(norm1(x)), then x + mlp(norm2(x)). MobileViT v2, section 3."""

    def __init__(self, mlp_hidden, drop_path=0.0, **kwargs):
        super().__init__(**kwargs)
        self.norm1 = GroupNorm(1, name="norm1", dtype=self.dtype_policy)
        self.attention = SeparableSelfAttention(1, name="attention", dtype=self.dtype_policy)
        self.norm2 = GroupNorm(1, name="norm2", dtype=self.dtype_policy)
        self.mlp = Mlp(mlp_hidden, "silu", name="mlp", dtype=self.dtype_policy)
        self.drop_path = DropPath(drop_path, name="drop_path", dtype=self.dtype_policy)

    def build(self, shape):
        for layer in (self.norm1, self.attention, self.norm2, self.mlp, self.drop_path):
            layer.build(shape)

    def call(self, x):
        x = x + self.drop_path(self.attention(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class MobileViTV2Block(SameShape):
    """(B,h,w,C) -> (B,h,w,C): out(fold(norm(transformer(unfold(embed(local(x))))))). MobileViT v2, section 3."""

    def __init__(self, token_width, token_depth, mlp_hidden, patch_size=2, drop_path=0.0, **kwargs):
        super().__init__(**kwargs)
        dtype = self.dtype_policy
        self.token_width, self.patch_size = token_width, patch_size
        self.local = ConvNorm(None, 3, name="local", dtype=dtype)
        self.embed = layers.Conv2D(token_width, 1, use_bias=False, name="embed", dtype=dtype)
        self.transformer = [
            SeparableBlock(mlp_hidden, drop_path, name=f"layer_{i}", dtype=dtype) for i in range(token_depth)
        ]
        self.norm = GroupNorm(1, name="norm", dtype=dtype)

    def build(self, shape):
        batch, height, width, channels = shape
        self.out = ConvNorm(channels, activation=None, name="out", dtype=self.dtype_policy)
        self.build_tokens(shape)
        self.out.build((batch, height, width, self.token_width))

    def build_tokens(self, shape):
        batch, height, width, _ = shape
        self.local.build(shape)
        self.embed.build(shape)
        pixels = self.patch_size**2
        for layer in (*self.transformer, self.norm):
            layer.build((batch, pixels, height * width // pixels, self.token_width))

    def tokens(self, x):
        """(B,h,w,D) -> (B,h,w,D): fold(norm(transformer(unfold(x)))), what v2 and v3 have in common."""
        height, width = x.shape[1:3]
        x = unfold(x, self.patch_size)
        for layer in self.transformer:
            x = layer(x)
        return fold(self.norm(x), height, width, self.patch_size)

    def call(self, x):
        return self.out(self.tokens(apply(self.embed, self.local(x))))


def sizes(multiplier):
    """A row of the paper's table: widths are a multiple of those of the model 1.0, and D is half of a stage's width."""
    widths = tuple(int(c * multiplier) for c in (64, 128, 256, 384, 512))
    return dict(stem_width=int(32 * multiplier), widths=widths, token_widths=tuple(c // 2 for c in widths[2:]))


@register
class MobileViTV2(VisionModel):
    Config = MobileViTV2Config
    Block = MobileViTV2Block
    preprocessing_defaults = dict(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), crop=0.888)
    variants = {
        "mobilevitv2_050": sizes(0.5),
        "mobilevitv2_075": sizes(0.75),
        "mobilevitv2_100": sizes(1.0),
        "mobilevitv2_125": sizes(1.25),
        "mobilevitv2_150": sizes(1.5),
        "mobilevitv2_175": sizes(1.75),
        "mobilevitv2_200": sizes(2.0),
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
            "stage_{s}_block_{i}/layer_{j}/attention/qkv": "stages.{s}.{i}.transformer.{j}.attn.qkv_proj",
            "stage_{s}_block_{i}/layer_{j}/attention/out": "stages.{s}.{i}.transformer.{j}.attn.out_proj",
            "stage_{s}_block_{i}/norm": "stages.{s}.{i}.norm",
            "stage_{s}_block_{i}/out": "stages.{s}.{i}.conv_proj",
            "head": "head.fc",
        },
        "transformers": {
            **TRANSFORMERS,
            "stage_{s}_block_{i}/layer_{j}/attention/qkv": (
                "encoder.layer.{s}.transformer.layer.{j}.attention.qkv_proj.convolution"
            ),
            "stage_{s}_block_{i}/layer_{j}/attention/out": (
                "encoder.layer.{s}.transformer.layer.{j}.attention.out_proj.convolution"
            ),
            "stage_{s}_block_{i}/layer_{j}/mlp/fc1": "encoder.layer.{s}.transformer.layer.{j}.ffn.conv1.convolution",
            "stage_{s}_block_{i}/layer_{j}/mlp/fc2": "encoder.layer.{s}.transformer.layer.{j}.ffn.conv2.convolution",
        },
    }

    @staticmethod
    def check(cfg):
        check_mobile(cfg)

    @staticmethod
    def size_multiple(cfg):
        return total_stride(cfg.widths, cfg.patch_size)

    @classmethod
    def backbone(cls, cfg, image):
        x = mobile_stages(cfg, image, cls.Block)
        return layers.GlobalAveragePooling2D(name=layer_names.POOL)(x)
