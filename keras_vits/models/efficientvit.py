"""EfficientViT of MIT, series B and L.

    image -> stem, stem_{i} -> stages 0, 1 (convolution blocks) -> stages 2, 3 (convolution or attention blocks)
          -> final_conv -> pool (mean, hidden layer) -> head

Paper    Cai et al., EfficientViT: Multi-Scale Linear Attention for High-Resolution Dense Prediction, arXiv 2205.14756.
Code     timm/models/efficientvit_mit.py (Apache-2.0), whose variant names and checkpoints these are.
Differs  Height and width must be multiples of 32, the total stride: timm takes other sizes and rounds up. `depths`
         counts the blocks that keep the size, in every stage of both series. drop_path applies to residual branches of
         the stages; timm has none. Series B has hard swish and epsilon 1e-5 in every norm; series L has GELU in its
         tanh form and 1e-7, but 1e-5 in the BatchNorm of final_conv, as in timm.
"""

from dataclasses import dataclass

from keras import layers, ops

from keras_vits.layers import ConvNorm, DropPath, SameShape, drop_path_rates
from keras_vits.layers import _names as layer_names
from keras_vits.layers._backend import apply
from keras_vits.layers.linear_attention import kernel_attention, wide
from keras_vits.layers.mlp import activation_function
from keras_vits.models._base import VisionModel
from keras_vits.models._config import one_of, same_length
from keras_vits.models._registry import register

LOCAL = {  # kind of a convolution block -> names and kernel sizes of its convolutions; the last has no activation
    "separable": (("depthwise", 3), ("project", 1)),
    "plain": (("conv1", 3), ("conv2", 3)),
    "fused": (("spatial", 3), ("project", 1)),
    "inverted": (("expand", 1), ("depthwise", 3), ("project", 1)),
    "lean": (("expand", 1), ("depthwise", 3), ("project", 1)),  # biases in place of the norms but the last
}


@dataclass(frozen=True, kw_only=True)
class EfficientViTConfig:
    image_size: int | tuple[int, int] = 224  # pixels, or (height, width)
    in_channels: int = 3
    widths: tuple[int, ...]  # channels of the stem and of each stage
    depths: tuple[int, ...]  # blocks that keep the size: in the stem, and in each stage after its stride-2 block
    stem_kind: str  # a key of LOCAL
    kinds: tuple[str, ...]  # of the blocks in each stage: a key of LOCAL, or "attention" (after a lean stride-2 block)
    first_expansions: tuple[int, ...]  # hidden channels of each stage's stride-2 block, as a multiple of its input's
    expansions: tuple[int, ...]  # and of each stage's other blocks
    head_width: int  # channels of an attention head
    activation: str  # see `ConvNorm`
    epsilon: float  # of the norms
    final_width: int  # channels that are pooled
    final_hidden: int  # D of the layer between the pooled features and the head
    num_classes: int = 1000  # K; 0 stops at the hidden features (B,D)
    drop_path: float = 0.0  # probability at the last block, growing linearly from 0


class LocalBlock(layers.Layer):
    """(B,H,W,C) -> (B,H/s,W/s,width): convolutions one after the other, + x at stride 1. MobileNetV2, arXiv 1801.04381.

    Args:
        kind: which convolutions, a key of LOCAL.
        width: output channels.
        strides: s, of the first convolution that is larger than 1 x 1.
        expansion: channels between the convolutions, as a multiple of C.
        activation: see `ConvNorm`.
        epsilon: of the norms.
        drop_path: probability that a sample loses the branch beside x in training.
    """

    def __init__(self, kind, width, strides, expansion, activation, epsilon, drop_path=0.0, **kwargs):
        super().__init__(**kwargs)
        self.kind, self.width, self.strides, self.expansion = kind, width, strides, expansion
        self.activation, self.epsilon = activation, epsilon
        self.drop_path = DropPath(drop_path, name="drop_path", dtype=self.dtype_policy)

    def build(self, shape):
        dtype = self.dtype_policy
        epsilon = None if self.kind == "lean" else self.epsilon
        *first, (last, size) = LOCAL[self.kind]
        self.convs = []
        for name, kernel_size in first:
            width = None if name == "depthwise" else self.expansion * shape[-1]
            strides = self.strides if kernel_size > 1 else 1
            self.convs.append(
                ConvNorm(width, kernel_size, strides, self.activation, epsilon, "norm", name=name, dtype=dtype)
            )
        self.convs.append(ConvNorm(self.width, size, 1, None, self.epsilon, "norm", name=last, dtype=dtype))
        for conv in self.convs:
            conv.build(shape)
            shape = conv.compute_output_shape(shape)
        self.drop_path.build(shape)

    def compute_output_shape(self, shape):
        batch, height, width, _ = shape
        return batch, -(-height // self.strides), -(-width // self.strides), self.width

    def call(self, x):
        y = x
        for conv in self.convs:
            y = conv(y)
        return x + self.drop_path(y) if self.strides == 1 else y


class MultiScaleAttention(SameShape):
    """(B,h,w,C) -> (B,h,w,C): project(relu linear attention over all pixels), two sets of heads. Paper, section 3.1.

    The first set sees the queries, keys and values of the pixels, the second those of 5 x 5 surroundings: a depthwise
    convolution, and a 1 x 1 convolution within each of the C / head_width groups of q, of k and of v.

    Args:
        head_width: d, channels of a head; must divide C.
        epsilon: of the norm; 1e-5 is added to the attention's divisor.
    """

    def __init__(self, head_width, epsilon, **kwargs):
        super().__init__(**kwargs)
        self.head_width, self.epsilon = head_width, epsilon

    def build(self, shape):
        width, dtype = shape[-1], self.dtype_policy
        if width % self.head_width:
            raise ValueError(f"head_width must divide the width; received {self.head_width}, width {width}.")
        self.heads = width // self.head_width
        wide_shape = (*shape[:-1], 3 * width)
        options = dict(use_bias=False, dtype=dtype)
        self.qkv = layers.Conv2D(3 * width, 1, name="qkv", **options)
        self.surround = layers.DepthwiseConv2D(5, padding="same", name="surround", **options)
        self.mix = layers.Conv2D(3 * width, 1, groups=3 * self.heads, name="mix", **options)
        self.project = ConvNorm(width, 1, 1, None, self.epsilon, "norm", name="project", dtype=dtype)
        self.qkv.build(shape)
        self.surround.build(wide_shape)
        self.mix.build(wide_shape)
        self.project.build((*shape[:-1], 2 * width))

    def call(self, x):
        height, width, channels = x.shape[1:]
        d = self.head_width
        qkv = apply(self.qkv, x)
        qkv = ops.concatenate([qkv, self.mix(apply(self.surround, qkv))], axis=-1)
        qkv = wide(ops.reshape(qkv, (-1, height * width, 2 * self.heads, 3 * d)))
        qkv = ops.transpose(qkv, (0, 2, 1, 3))  # (B,2 heads,N,3d)
        y = kernel_attention(ops.relu(qkv[..., :d]), ops.relu(qkv[..., d : 2 * d]), qkv[..., 2 * d :], 1e-5)
        y = ops.reshape(ops.transpose(y, (0, 2, 1, 3)), (-1, height, width, 2 * channels))
        return self.project(ops.cast(y, self.compute_dtype))


class AttentionBlock(SameShape):
    """(B,h,w,C) -> (B,h,w,C): x + attention(x), then x + local(x). Paper, figure 2."""

    def __init__(self, head_width, expansion, activation, epsilon, drop_path=0.0, **kwargs):
        super().__init__(**kwargs)
        dtype = self.dtype_policy
        self.expansion, self.activation, self.epsilon = expansion, activation, epsilon
        self.attention = MultiScaleAttention(head_width, epsilon, name="attention", dtype=dtype)
        self.drop_path = DropPath(drop_path, name="drop_path", dtype=dtype)

    def build(self, shape):
        self.local = LocalBlock(
            "lean",
            shape[-1],
            1,
            self.expansion,
            self.activation,
            self.epsilon,
            self.drop_path.rate,
            name="local",
            dtype=self.dtype_policy,
        )
        for layer in (self.attention, self.drop_path, self.local):
            layer.build(shape)

    def call(self, x):
        return self.local(x + self.drop_path(self.attention(x)))


class HiddenPooling(layers.Layer):
    """(B,h,w,C) -> (B,D): act(norm(hidden(mean of x over the pixels)))."""

    def __init__(self, width, activation, epsilon, **kwargs):
        super().__init__(**kwargs)
        self.activation = activation
        self.hidden = layers.Dense(width, use_bias=False, name="hidden", dtype=self.dtype_policy)
        self.norm = layers.LayerNormalization(epsilon=epsilon, name="norm", dtype=self.dtype_policy)

    def build(self, shape):
        self.hidden.build((shape[0], shape[-1]))
        self.norm.build(self.compute_output_shape(shape))

    def compute_output_shape(self, shape):
        return shape[0], self.hidden.units

    def call(self, x):
        return activation_function(self.activation)(self.norm(self.hidden(ops.mean(x, axis=(1, 2)))))


B = dict(
    stem_kind="separable",
    kinds=("inverted", "inverted", "attention", "attention"),
    first_expansions=(4, 4, 4, 4),
    expansions=(4, 4, 4, 4),
    activation="hard_silu",
    epsilon=1e-5,
)
L = dict(
    stem_kind="plain",
    kinds=("fused", "fused", "lean", "attention"),
    first_expansions=(16, 16, 16, 24),
    expansions=(4, 4, 4, 6),
    head_width=32,
    activation="gelu_tanh",
    epsilon=1e-7,
)


def _sizes(series, width, depths, final_width, final_hidden, **others):
    """A row of the paper's table: the width doubles from the stem to the last stage."""
    widths = tuple(width * 2**s for s in range(5))
    return dict(**series, widths=widths, depths=depths, final_width=final_width, final_hidden=final_hidden, **others)


@register
class EfficientViT(VisionModel):
    Config = EfficientViTConfig
    preprocessing_defaults = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), crop=0.95)
    variants = {
        "efficientvit_b0": _sizes(B, 8, (1, 1, 1, 2, 2), 1024, 1280, head_width=16),
        "efficientvit_b1": _sizes(B, 16, (1, 1, 2, 3, 4), 1536, 1600, head_width=16),
        "efficientvit_b2": _sizes(B, 24, (1, 2, 3, 4, 6), 2304, 2560, head_width=32),
        "efficientvit_b3": _sizes(B, 32, (1, 3, 5, 6, 9), 2304, 2560, head_width=32),
        "efficientvit_l1": _sizes(L, 32, (1, 1, 1, 6, 6), 3072, 3200),
        "efficientvit_l2": _sizes(L, 32, (1, 2, 2, 8, 8), 3072, 3200),
        "efficientvit_l3": _sizes(L, 64, (1, 2, 2, 8, 8), 6144, 6400),
    }
    names = {
        "timm": {
            "stem": "stem.in_conv",
            "stem_{i}": "stem.res{i}.main",
            "stem_{i}/depthwise": "stem.res{i}.main.depth_conv",
            "stem_{i}/project": "stem.res{i}.main.point_conv",
            "stage_{s}_block_{i}/spatial": "stages.{s}.blocks.{i}.main.spatial_conv",
            "stage_{s}_block_{i}/expand": "stages.{s}.blocks.{i}.main.inverted_conv",
            "stage_{s}_block_{i}/depthwise": "stages.{s}.blocks.{i}.main.depth_conv",
            "stage_{s}_block_{i}/project": "stages.{s}.blocks.{i}.main.point_conv",
            "stage_{s}_block_{i}/attention/qkv": "stages.{s}.blocks.{i}.context_module.main.qkv.conv",
            "stage_{s}_block_{i}/attention/surround": "stages.{s}.blocks.{i}.context_module.main.aggreg.0.0",
            "stage_{s}_block_{i}/attention/mix": "stages.{s}.blocks.{i}.context_module.main.aggreg.0.1",
            "stage_{s}_block_{i}/attention/project": "stages.{s}.blocks.{i}.context_module.main.proj",
            "stage_{s}_block_{i}/local/expand": "stages.{s}.blocks.{i}.local_module.main.inverted_conv",
            "stage_{s}_block_{i}/local/depthwise": "stages.{s}.blocks.{i}.local_module.main.depth_conv",
            "stage_{s}_block_{i}/local/project": "stages.{s}.blocks.{i}.local_module.main.point_conv",
            "final_conv": "head.in_conv",
            "pool/hidden": "head.classifier.0",
            "pool/norm": "head.classifier.1",
            "head": "head.classifier.4",
        }
    }

    @staticmethod
    def check(cfg):
        stages = len(cfg.kinds)
        lengths = {"kinds": stages, "widths": stages + 1, "depths": stages + 1}
        same_length(cfg, {**lengths, "first_expansions": stages, "expansions": stages})
        one_of(cfg, "stem_kind", LOCAL)
        one_of(cfg, "kinds", (*LOCAL, "attention"))
        for width, kind in zip(cfg.widths[1:], cfg.kinds, strict=True):
            if kind == "attention" and width % cfg.head_width:
                raise ValueError(f"head_width must divide the width; received {cfg.head_width}, width {width}.")

    @staticmethod
    def size_multiple(cfg):
        return 2 ** len(cfg.widths)  # the stem and every stage halve the size

    @staticmethod
    def backbone(cfg, image):
        act, epsilon = cfg.activation, cfg.epsilon
        x = ConvNorm(cfg.widths[0], 3, 2, act, epsilon, "norm", name=layer_names.STEM)(image)
        for i in range(cfg.depths[0]):
            x = LocalBlock(cfg.stem_kind, cfg.widths[0], 1, 1, act, epsilon, name=f"stem_{i}")(x)
        rates = iter(drop_path_rates(cfg.drop_path, sum(cfg.depths[1:]) + len(cfg.kinds)))
        for s, kind in enumerate(cfg.kinds):
            width, expansion = cfg.widths[s + 1], cfg.first_expansions[s]
            first = "lean" if kind == "attention" else kind
            x = LocalBlock(first, width, 2, expansion, act, epsilon, next(rates), name=layer_names.stage_block(s, 0))(x)
            expansion = cfg.expansions[s]
            for i in range(1, cfg.depths[s + 1] + 1):
                name, rate = layer_names.stage_block(s, i), next(rates)
                if kind == "attention":
                    x = AttentionBlock(cfg.head_width, expansion, act, epsilon, rate, name=name)(x)
                else:
                    x = LocalBlock(kind, width, 1, expansion, act, epsilon, rate, name=name)(x)
        x = ConvNorm(cfg.final_width, 1, 1, act, 1e-5, "norm", name="final_conv")(x)
        return HiddenPooling(cfg.final_hidden, act, epsilon, name=layer_names.POOL)(x)
