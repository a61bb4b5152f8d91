"""Vision Transformer.

    image -> stem (patches) -> tokens (+ class token, registers, position) -> block x depth -> norm -> pool -> head

Paper    Dosovitskiy et al., An Image is Worth 16x16 Words, arXiv 2010.11929, table 1; sizes tiny and small: DeiT,
         arXiv 2012.12877, table 1; giant and gigantic: arXiv 2106.04560, table 2; so150m and so400m: arXiv 2305.13035.
         What the variants add: distillation token (DeiT), layer scale (DeiT III, arXiv 2204.07118), registers (arXiv
         2309.16588), SwiGLU (DINOv2, arXiv 2304.07193), norm before the blocks (CLIP, arXiv 2103.00020).
Code     timm/models/vision_transformer.py and deit.py (Apache-2.0), whose variant names and checkpoints these are.
Differs  LayerNorm epsilon is 1e-6 (1e-5 in the CLIP models), GELU the exact erf form (the tanh form or CLIP's sigmoid
         form where the variant says so), as in timm. The two heads of a distilled model are averaged in training, too,
         which is timm's default. Sizes that patches do not cover are refused, so there is no
         vit_so400m_patch14_siglip_gap_384: that is the variant of 378 pixels. FlexiViT's and RADIO's positions are
         resampled bicubically, like all others; timm takes the bilinear filter for those two.
"""

import functools
from dataclasses import dataclass

from keras import initializers, layers, ops

from keras_vits._util.resampling import resample_positions
from keras_vits.heads import Classifier, PooledFeatures
from keras_vits.layers import ATTENTIONS, PositionEmbedding, TransformerBlock, drop_path_rates
from keras_vits.layers import _names as layer_names
from keras_vits.models._base import VisionModel
from keras_vits.models._config import divides, one_of
from keras_vits.models._registry import register


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    image_size: int | tuple[int, int] = 224  # pixels, or (height, width)
    in_channels: int = 3
    patch_size: int = 16  # pixels
    width: int  # D
    depth: int = 12  # L
    heads: int
    mlp_hidden: int
    num_classes: int = 1000  # K; 0 stops at the pooled features (B,D)
    drop_path: float = 0.0  # probability at the last block, growing linearly from 0
    dropout: float = 0.0  # probability after the position embedding and in the blocks' dense layers
    class_token: bool = True
    distill_token: bool = False  # a second class token with a head of its own
    registers: int = 0  # number of further learned tokens that no head reads
    position: str = "learned"  # "learned", "sincos2d", "sincos1d" or "none"
    prefix_position: bool = True  # whether class token and registers have a position, too; learned ones only
    norm_pre: bool = False  # a LayerNorm before the blocks, and then no bias in the stem
    qkv_bias: bool = True
    qk_norm: bool = False  # a LayerNorm of each head's queries and keys
    layer_scale: float = 0.0  # initial gain at the end of a residual branch; 0 for none
    activation: str = "gelu"  # of the perceptrons; "gelu_tanh" and "quick_gelu" are approximations
    gated: bool = False  # with activation "silu": SwiGLU
    epsilon: float = 1e-6  # of every LayerNorm
    attention: str = "softmax"  # or a linear one, a key of keras_vits.layers.linear_attention.ATTENTIONS
    pool: str = "token"  # the class token, the "mean" of the image's tokens, or both: "token_and_mean", (B,2D)
    norm: str = "tokens"  # where the last LayerNorm is: before ("tokens") or after the pooling ("pooled"), or "none"


class PrefixTokens(layers.Layer):
    """(B,N,D) -> (B,P+N,D): puts learned tokens before the others. ViT, equation 1; DeiT, section 4; arXiv 2309.16588.

    Args:
        class_token, distill_token: whether there is one.
        registers: number of further tokens.
    """

    def __init__(self, class_token=True, distill_token=False, registers=0, **kwargs):
        super().__init__(**kwargs)
        self.class_token, self.distill_token, self.registers = class_token, distill_token, registers

    def build(self, shape):
        counts = dict(class_token=self.class_token, distill_token=self.distill_token, registers=self.registers)
        self.tokens = [
            self.add_weight(
                shape=(1, int(count), shape[-1]),
                initializer="zeros" if name == "class_token" else initializers.RandomNormal(stddev=0.02),
                name=name,
            )
            for name, count in counts.items()
            if count
        ]

    def compute_output_shape(self, shape):
        return (shape[0], shape[1] + self.class_token + self.distill_token + self.registers, shape[2])

    def call(self, x):
        batch, width = ops.shape(x)[0], x.shape[-1]
        tokens = [ops.broadcast_to(t, (batch, t.shape[1], width)) for t in self.tokens]
        return ops.concatenate([*tokens, x], axis=1)


class Pool(layers.Layer):
    """(B,N,D) -> (B,D): the first token, or the mean of all but the first ones. ViT, equation 4.

    Args:
        kind: `"token"`, `"mean"`, `"two tokens"`: (B,N,D) -> (B,2,D), the class and the distillation token, or
            `"token_and_mean"`: (B,N,D) -> (B,2D), one after the other, as DINOv2's linear classifiers read them.
        prefix: number of tokens before those of the image.
    """

    def __init__(self, kind, prefix=1, **kwargs):
        super().__init__(**kwargs)
        self.kind, self.prefix = kind, prefix

    def compute_output_shape(self, shape):
        if self.kind == "two tokens":
            return (shape[0], 2, shape[2])
        return (shape[0], shape[2] * (2 if self.kind == "token_and_mean" else 1))

    def call(self, x):
        if self.kind == "token_and_mean":
            return ops.concatenate([x[:, 0], ops.mean(x[:, self.prefix :], axis=1)], axis=-1)
        if self.kind == "mean":
            return ops.mean(x[:, self.prefix :], axis=1)
        return x[:, 0] if self.kind == "token" else x[:, :2]


class DistilledHead(layers.Layer):
    """(B,2,D) -> (B,K): the mean of the class head and of the distillation head. DeiT (arXiv 2012.12877), section 4."""

    def __init__(self, num_classes, **kwargs):
        super().__init__(**kwargs)
        self.num_classes = num_classes
        self.heads = [layers.Dense(num_classes, name=name, dtype=self.dtype_policy) for name in ("class", "distill")]

    def build(self, shape):
        for head in self.heads:
            head.build((shape[0], shape[2]))

    def compute_output_shape(self, shape):
        return (shape[0], self.num_classes)

    def call(self, x):
        logits, distilled = (head(x[:, i]) for i, head in enumerate(self.heads))
        return (logits + distilled) / 2


def encode(cfg, x):
    """From the map of patches (B,h,w,D) to the features (B,D), or (B,2,D) if distilled, for ViT and its hybrids."""
    prefix = cfg.class_token + cfg.distill_token + cfg.registers
    grid = x.shape[1:3]
    x = layers.Reshape((-1, cfg.width), name=layer_names.TOKENS)(x)
    if cfg.position != "none" and not positions_of_prefix(cfg):
        x = PositionEmbedding(cfg.position, grid, name="position")(x)
    if prefix:
        x = PrefixTokens(cfg.class_token, cfg.distill_token, cfg.registers, name="prefix")(x)
    if cfg.position != "none" and positions_of_prefix(cfg):
        x = PositionEmbedding(cfg.position, name="position")(x)
    x = layers.Dropout(cfg.dropout, name="drop")(x)
    if cfg.norm_pre:
        x = layers.LayerNormalization(epsilon=cfg.epsilon, name="norm_pre")(x)
    for i, rate in enumerate(drop_path_rates(cfg.drop_path, cfg.depth)):
        x = TransformerBlock(
            cfg.heads,
            cfg.mlp_hidden,
            cfg.epsilon,
            cfg.activation,
            cfg.dropout,
            rate,
            cfg.qkv_bias,
            cfg.qk_norm,
            cfg.layer_scale,
            cfg.gated,
            cfg.attention,
            name=layer_names.block(i),
        )(x)
    if cfg.norm == "tokens":
        x = layers.LayerNormalization(epsilon=cfg.epsilon, name=layer_names.NORM)(x)
    x = Pool("two tokens" if cfg.distill_token else cfg.pool, prefix, name=layer_names.POOL)(x)
    if cfg.norm == "pooled":
        x = layers.LayerNormalization(epsilon=cfg.epsilon, name="fc_norm")(x)
    return x


class ViTHead(VisionModel):
    """What ViT and its hybrids have behind the features: two heads of a distilled model, (B,2,D), otherwise one."""

    @staticmethod
    def check(cfg):
        one_of(cfg, "position", ("learned", "sincos2d", "sincos1d", "none"))
        one_of(cfg, "pool", ("token", "mean", "token_and_mean"))
        one_of(cfg, "norm", ("tokens", "pooled", "none"))
        one_of(cfg, "attention", ("softmax", *ATTENTIONS))
        divides(cfg, "heads", "width")
        if cfg.pool != "mean" and not cfg.class_token:
            raise ValueError(f"pool={cfg.pool!r} takes the class token, but class_token is False: give pool='mean'.")
        if cfg.distill_token and cfg.pool != "token":
            raise ValueError(f"distill_token needs pool='token', what its two heads read; received {cfg.pool!r}.")

    @classmethod
    def head(cls, cfg):
        if not cfg.distill_token:
            return super().head(cfg)
        if cfg.num_classes:
            return Classifier(cfg.num_classes, DistilledHead)
        return PooledFeatures(functools.partial(layers.GlobalAveragePooling1D, name="mean"))


def positions_of_prefix(cfg):
    """Whether the position table begins with the positions of class token and registers."""
    return cfg.position == "learned" and cfg.prefix_position


def position_table(take, model, name="pos_embed"):
    """Weight table: the source's position embedding, resampled if its grid is of another size."""
    return _on_grid(take(name), take.image_size, model)


def _on_grid(table, image_size, model):
    cfg, multiple = model.cfg, model.size_multiple(model.cfg)
    grid, old = ([side // multiple for side in size] if size else None for size in (cfg.image_size, image_size))
    prefix = (cfg.class_token + cfg.distill_token + cfg.registers) if cfg.prefix_position else 0
    return resample_positions(table, grid, prefix, old)


NAMES = {  # of everything behind the stem, in timm
    "prefix/class_token": "cls_token",
    "prefix/distill_token": "dist_token",
    "prefix/registers": "reg_token",
    "position/table": position_table,
    "norm_pre": "norm_pre",
    "block_{i}": "blocks.{i}",
    "block_{i}/attention": "blocks.{i}.attn",
    "block_{i}/attention/out": "blocks.{i}.attn.proj",
    "block_{i}/scale{j}/scale": "blocks.{i}.ls{j}.gamma",
    "norm": "norm",
    "fc_norm": "fc_norm",
    "head": "head",
    "head/class": "head",
    "head/distill": "head_dist",
}


def _keras_hub(kind, fc1, fc2):
    """Weight table of keras-hub's `"vit"` and `"deit"`, which name the layers of the perceptron differently."""
    embeddings, block = f"{kind}_patching_and_embedding", f"{kind}_encoder.transformer_block_{{i+1}}"
    position = f"{embeddings}.position_embedding" + (".embeddings" if kind == "vit" else "")
    return {
        "stem": f"{embeddings}.patch_embedding",
        "prefix/class_token": f"{embeddings}.class_token",
        "prefix/registers": f"{embeddings}.distillation_token",
        "position/table": functools.partial(position_table, name=position),
        "block_{i}/norm1": f"{block}.ln_1",
        "block_{i}/attention/qkv": (f"{block}.mha.query", f"{block}.mha.key", f"{block}.mha.value"),
        "block_{i}/attention/out": f"{block}.mha.attention_output",
        "block_{i}/norm2": f"{block}.ln_2",
        "block_{i}/mlp/fc1": f"{block}.{fc1}",
        "block_{i}/mlp/fc2": f"{block}.{fc2}",
        "norm": f"{kind}_encoder.ln",
        "head": "predictions",
    }


def _keras_hub_dinov2(fc1, fc2):
    """Weight table of keras-hub's DINOv2, whose two kinds of perceptron name their layers differently."""
    block = "encoder.layers_{i}"
    attention = f"{block}.attention.attention"
    return {
        "stem": "embeddings.patch_embeddings.projection",
        "prefix/class_token": lambda take, model: _dinov2_tokens(take, model)[0],
        "prefix/registers": "embeddings.register_tokens",
        "position/table": lambda take, model: _dinov2_tokens(take, model)[1],
        "block_{i}": block,
        "block_{i}/attention/qkv": (f"{attention}.query", f"{attention}.key", f"{attention}.value"),
        "block_{i}/attention/out": f"{attention}.attention_output",
        "block_{i}/scale{j}/scale": f"{block}.layer_scale{{j}}.lambda1",
        "block_{i}/mlp/fc1": f"{block}.mlp.{fc1}",
        "block_{i}/mlp/fc2": f"{block}.mlp.{fc2}",
        "norm": "layernorm",
        "head": None,
        None: ("embeddings.mask_token",),
    }


def _dinov2_tokens(take, model):
    """Class token and position table of keras-hub's DINOv2, which keeps trained and resampled positions."""
    cfg, token = model.cfg, take("embeddings.cls_token")
    trained, resampled = take("embeddings.position_embeddings"), take("embeddings.interpolated_position_embeddings")
    grid = [side // cfg.patch_size for side in cfg.image_size]
    table = resampled if cfg.image_size == take.image_size else resample_positions(trained, grid, prefix=1)
    return (token, table) if cfg.prefix_position else (token + table[:, :1], table[:, 1:])


def _transformers_tokens(take, model):
    """Class token and position table of transformers: the token's position is part of it where registers have none."""
    token, table = take("embeddings.cls_token"), take("embeddings.position_embeddings")
    if not model.cfg.prefix_position:
        token, table = token + table[:, :1], table[:, 1:]
    return token, _on_grid(table, take.image_size, model)


# ViT, DINO, MAE's encoder, DeiT and DINOv2. Where DeiT has one head for two tokens, the second is a register here. The
# "pooler" of a model without a head is left out. DINOv2's head reads the tokens' mean, too: pool="token_and_mean".
TRANSFORMERS = {
    "stem": "embeddings.patch_embeddings.projection",
    "prefix/class_token": lambda take, model: _transformers_tokens(take, model)[0],
    "prefix/distill_token": "embeddings.distillation_token",
    "prefix/registers": ["embeddings.register_tokens", "embeddings.distillation_token"],
    "position/table": lambda take, model: _transformers_tokens(take, model)[1],
    "block_{i}/norm1": ["encoder.layer.{i}.layernorm_before", "encoder.layer.{i}.norm1"],
    "block_{i}/attention/qkv": tuple(f"encoder.layer.{{i}}.attention.attention.{p}" for p in ("query", "key", "value")),
    "block_{i}/attention/out": "encoder.layer.{i}.attention.output.dense",
    "block_{i}/scale{j}/scale": "encoder.layer.{i}.layer_scale{j}.lambda1",
    "block_{i}/norm2": ["encoder.layer.{i}.layernorm_after", "encoder.layer.{i}.norm2"],
    "block_{i}/mlp/fc1": [f"encoder.layer.{{i}}.{fc1}" for fc1 in ("intermediate.dense", "mlp.fc1", "mlp.weights_in")],
    "block_{i}/mlp/fc2": [f"encoder.layer.{{i}}.{fc2}" for fc2 in ("output.dense", "mlp.fc2", "mlp.weights_out")],
    "norm": "layernorm",
    "head": "classifier",
    "head/class": "cls_classifier",
    "head/distill": "distillation_classifier",
    "": ("vit", "deit", "dinov2", "dinov2_with_registers"),
    None: ("pooler", "embeddings.mask_token", "decoder"),  # of pretraining, or read by no head
}


def _variants(name, *sizes, **hyperparameters):
    """Variants of one architecture: `name` with the patch size and the image size, both in pixels, filled in."""
    return {name.format(p, s): dict(**hyperparameters, patch_size=p, image_size=s) for p, s in sizes}


WEE = dict(width=256, depth=14, heads=4, mlp_hidden=1280)
LITTLE = dict(width=320, depth=14, heads=5, mlp_hidden=1792)
XSMALL = dict(width=256, depth=10, heads=4, mlp_hidden=1024)
TINY = dict(width=192, heads=3, mlp_hidden=768)
SMALL = dict(width=384, heads=6, mlp_hidden=1536)
MEDIUM = dict(width=512, heads=8, mlp_hidden=2048)
BETWIXT = dict(width=640, heads=10, mlp_hidden=2560)
BASE = dict(width=768, heads=12, mlp_hidden=3072)
BASE_PLUS = dict(width=896, heads=14, mlp_hidden=3584)
LARGE = dict(width=1024, depth=24, heads=16, mlp_hidden=4096)
HUGE = dict(width=1280, depth=32, heads=16, mlp_hidden=5120)
GIANT = dict(width=1408, depth=40, heads=16, mlp_hidden=6144)
GIGANTIC = dict(width=1664, depth=48, heads=16, mlp_hidden=8192)
SO150M = dict(width=896, depth=18, heads=14, mlp_hidden=2304)
SO150M2 = dict(width=832, depth=21, heads=13, mlp_hidden=2176)
SO400M = dict(width=1152, depth=27, heads=16, mlp_hidden=4304)
GIANT_OPT = dict(width=1536, depth=40, heads=16, mlp_hidden=6144)  # of SigLIP 2
GIANT_SWIGLU = dict(width=1536, depth=40, heads=24, mlp_hidden=4096, gated=True, activation="silu")  # of DINOv2

DEIT3 = dict(layer_scale=1e-6, prefix_position=False)
DINOV2 = dict(layer_scale=1e-5)
REGISTERS = dict(layer_scale=1e-5, registers=4, prefix_position=False)  # of DINOv2
TIPS = dict(layer_scale=1.0, registers=1, prefix_position=False)
RADIO = dict(prefix_position=False, norm="none")
CLIP = dict(norm_pre=True, epsilon=1e-5)
QUICK = dict(**CLIP, activation="quick_gelu")
GAP = dict(class_token=False, pool="mean")
GAP_SCALE = dict(**GAP, qkv_bias=False, layer_scale=1e-6)
GAP_REG = dict(**GAP, norm="pooled", prefix_position=False, layer_scale=1e-5)
SO150M2_GAP = dict(**GAP, norm="pooled", registers=1, qkv_bias=False, layer_scale=1e-5)
TEST = dict(**GAP, norm="pooled", layer_scale=1e-5)
TANH = dict(activation="gelu_tanh")


@register
class ViT(ViTHead):
    Config = ViTConfig

    @staticmethod
    def size_multiple(cfg):
        return cfg.patch_size

    @staticmethod
    def backbone(cfg, image):
        x = layers.Conv2D(
            cfg.width, cfg.patch_size, strides=cfg.patch_size, use_bias=not cfg.norm_pre, name=layer_names.STEM
        )(image)
        return encode(cfg, x)

    names = {
        "timm": {"stem": "patch_embed.proj", **NAMES, None: ("attn_pool",)},  # SigLIP's other pooling
        "transformers": TRANSFORMERS,
        "keras_hub_vit": _keras_hub("vit", "mlp.dense_1", "mlp.dense_2"),
        "keras_hub_deit": _keras_hub("deit", "mlp.dense", "output_layer.output"),
        "keras_hub_dinov2": _keras_hub_dinov2("fc1", "fc2"),
        "keras_hub_dinov2_swiglu": _keras_hub_dinov2("weights_in", "weights_out"),
    }
    variants = {
        # supervised, DINO, MAE
        **_variants("vit_tiny_patch{}_{}", (16, 224), (16, 384), **TINY),
        **_variants("vit_small_patch{}_{}", (32, 224), (32, 384), (16, 224), (16, 384), (8, 224), **SMALL),
        **_variants("vit_base_patch{}_{}", (32, 224), (32, 384), (16, 224), (16, 384), (8, 224), **BASE),
        **_variants("vit_large_patch{}_{}", (32, 224), (32, 384), (16, 224), (16, 384), (14, 224), **LARGE),
        **_variants("vit_huge_patch{}_{}", (14, 224), **HUGE),
        **_variants("vit_giant_patch{}_{}", (14, 224), **GIANT),
        **_variants("vit_gigantic_patch{}_{}", (14, 224), **GIGANTIC),
        **_variants("vit_base_patch{}_{}_miil", (16, 224), **BASE, qkv_bias=False),
        **_variants("vit_base_patch{}_plus_{}", (32, 256), (16, 240), **BASE_PLUS, layer_scale=1e-5),
        **_variants("vit_small_patch{}_36x1_{}", (16, 224), **SMALL, depth=36, layer_scale=1e-5),
        **_variants("flexivit_small", (16, 240), **SMALL, prefix_position=False),
        **_variants("flexivit_base", (16, 240), **BASE, prefix_position=False),
        **_variants("flexivit_large", (16, 240), **LARGE, prefix_position=False),
        **_variants("eva_large_patch{}_{}", (14, 196), (14, 336), **LARGE, pool="mean", norm="pooled"),
        **_variants("vit_intern300m_patch{}_{}", (14, 448), **LARGE, layer_scale=0.1, norm="none"),
        # DeiT and DeiT III
        **_variants("deit_tiny_patch{}_{}", (16, 224), **TINY),
        **_variants("deit_small_patch{}_{}", (16, 224), **SMALL),
        **_variants("deit_base_patch{}_{}", (16, 224), (16, 384), **BASE),
        **_variants("deit_tiny_distilled_patch{}_{}", (16, 224), **TINY, distill_token=True),
        **_variants("deit_small_distilled_patch{}_{}", (16, 224), **SMALL, distill_token=True),
        **_variants("deit_base_distilled_patch{}_{}", (16, 224), (16, 384), **BASE, distill_token=True),
        **_variants("deit3_small_patch{}_{}", (16, 224), (16, 384), **SMALL, **DEIT3),
        **_variants("deit3_medium_patch{}_{}", (16, 224), **MEDIUM, **DEIT3),
        **_variants("deit3_base_patch{}_{}", (16, 224), (16, 384), **BASE, **DEIT3),
        **_variants("deit3_large_patch{}_{}", (16, 224), (16, 384), **LARGE, **DEIT3),
        **_variants("deit3_huge_patch{}_{}", (14, 224), **HUGE, **DEIT3),
        # DINOv2, TIPSv2, RADIO
        **_variants("vit_small_patch{}_dinov2", (14, 518), **SMALL, **DINOV2),
        **_variants("vit_base_patch{}_dinov2", (14, 518), **BASE, **DINOV2),
        **_variants("vit_large_patch{}_dinov2", (14, 518), **LARGE, **DINOV2),
        **_variants("vit_giant_patch{}_dinov2", (14, 518), **GIANT_SWIGLU, **DINOV2),
        **_variants("vit_small_patch{}_reg4_dinov2", (14, 518), **SMALL, **REGISTERS),
        **_variants("vit_base_patch{}_reg4_dinov2", (14, 518), **BASE, **REGISTERS),
        **_variants("vit_large_patch{}_reg4_dinov2", (14, 518), **LARGE, **REGISTERS),
        **_variants("vit_giant_patch{}_reg4_dinov2", (14, 518), **GIANT_SWIGLU, **REGISTERS),
        **_variants("vit_base_patch{}_reg1_tipsv2", (14, 448), **BASE, **TIPS),
        **_variants("vit_large_patch{}_reg1_tipsv2", (14, 448), **LARGE, **TIPS),
        **_variants("vit_so400m_patch{}_reg1_tipsv2", (14, 448), **SO400M, **TIPS),
        **_variants("vit_giant_patch{}_reg1_tipsv2", (14, 448), **GIANT_SWIGLU, **TIPS),
        **_variants("vit_base_patch{}_radio_v3", (16, 512), **BASE, **RADIO, registers=7, layer_scale=1e-5),
        **_variants("vit_large_patch{}_radio_v3", (16, 512), **LARGE, **RADIO, registers=7, layer_scale=1e-5),
        **_variants("vit_huge_patch{}_radio_v3", (16, 512), **HUGE, **RADIO, registers=7),
        **_variants("vit_giant_patch{}_radio_v3", (16, 512), **{**GIANT_OPT, "heads": 24}, **RADIO, registers=7),
        **_variants("vit_so400m_patch{}_radio_v4", (16, 512), **SO400M, **RADIO, registers=9),
        **_variants("vit_huge_patch{}_radio_v4", (16, 512), **HUGE, **RADIO, registers=9),
        # mean of the image's tokens, without and with registers
        **_variants("vit_medium_patch{}_gap_{}", (16, 240), (16, 256), (16, 384), **MEDIUM, **GAP_SCALE),
        **_variants("vit_betwixt_patch{}_gap_{}", (16, 256), **BETWIXT, **GAP_SCALE),
        **_variants("vit_base_patch{}_gap_{}", (16, 224), **{**BASE, "heads": 16}, **GAP),
        **_variants("vit_huge_patch{}_gap_{}", (14, 224), (16, 448), **HUGE, **GAP),
        **_variants("vit_giant_patch{}_gap_{}", (16, 224), **GIANT, **GAP),
        **_variants("vit_wee_patch{}_reg1_gap_{}", (16, 256), **WEE, **GAP_REG, registers=1),
        **_variants("vit_little_patch{}_reg1_gap_{}", (16, 256), **LITTLE, **GAP_REG, registers=1),
        **_variants("vit_little_patch{}_reg4_gap_{}", (16, 256), **LITTLE, **GAP_REG, registers=4),
        **_variants("vit_medium_patch{}_reg1_gap_{}", (16, 256), **MEDIUM, **GAP_REG, registers=1),
        **_variants("vit_medium_patch{}_reg4_gap_{}", (16, 256), **MEDIUM, **GAP_REG, registers=4),
        **_variants(
            "vit_mediumd_patch{}_reg4_gap_{}", (16, 256), (16, 384), **MEDIUM, depth=20, **GAP_REG, registers=4
        ),
        **_variants("vit_betwixt_patch{}_reg1_gap_{}", (16, 256), **BETWIXT, **GAP_REG, registers=1),
        **_variants("vit_betwixt_patch{}_reg4_gap_{}", (16, 256), (16, 384), **BETWIXT, **GAP_REG, registers=4),
        **_variants("vit_base_patch{}_reg4_gap_{}", (16, 256), **BASE, **{**GAP_REG, "layer_scale": 0.0}, registers=4),
        **_variants("vit_so150m_patch{}_reg4_gap_{}", (16, 256), (16, 384), **SO150M, **GAP, registers=4),
        **_variants("vit_so150m2_patch{}_reg1_gap_{}", (16, 256), (16, 384), (16, 448), **SO150M2, **SO150M2_GAP),
        # CLIP and SigLIP
        **_variants("vit_xsmall_patch{}_clip_{}", (16, 224), **XSMALL, **CLIP),
        **_variants("vit_medium_patch{}_clip_{}", (32, 224), (16, 224), **MEDIUM, **CLIP),
        **_variants("vit_betwixt_patch{}_clip_{}", (32, 224), **BETWIXT, **CLIP),
        **_variants("vit_base_patch{}_clip_{}", (32, 224), (32, 256), (32, 384), (32, 448), **BASE, **CLIP),
        **_variants("vit_base_patch{}_clip_{}", (16, 224), (16, 384), **BASE, **CLIP),
        **_variants("vit_base_patch{}_plus_clip_{}", (16, 240), **BASE_PLUS, **CLIP),
        **_variants("vit_large_patch{}_clip_{}", (14, 224), (14, 336), **LARGE, **CLIP),
        **_variants("vit_huge_patch{}_clip_{}", (14, 224), (14, 336), (14, 378), **HUGE, **CLIP),
        **_variants("vit_giant_patch{}_clip_{}", (14, 224), **GIANT, **CLIP),
        **_variants("vit_gigantic_patch{}_clip_{}", (14, 224), (14, 378), **GIGANTIC, **CLIP),
        **_variants("vit_base_patch{}_clip_quickgelu_{}", (32, 224), (16, 224), **BASE, **QUICK),
        **_variants("vit_large_patch{}_clip_quickgelu_{}", (14, 224), (14, 336), **LARGE, **QUICK),
        **_variants("vit_huge_patch{}_clip_quickgelu_{}", (14, 224), (14, 378), **HUGE, **QUICK),
        **_variants("vit_gigantic_patch{}_clip_quickgelu_{}", (14, 224), **GIGANTIC, **QUICK),
        **_variants("vit_base_patch{}_siglip_gap_{}", (32, 256), **BASE, **GAP, **TANH),
        **_variants("vit_base_patch{}_siglip_gap_{}", (16, 224), (16, 256), (16, 384), (16, 512), **BASE, **GAP),
        **_variants("vit_large_patch{}_siglip_gap_{}", (16, 256), (16, 384), **LARGE, **GAP),
        **_variants("vit_large_patch{}_siglip_gap_{}", (16, 512), **LARGE, **GAP, **TANH),
        **_variants("vit_so400m_patch{}_siglip_gap_{}", (14, 224), (14, 378), (14, 448), (14, 896), **SO400M, **GAP),
        **_variants("vit_so400m_patch{}_siglip_gap_{}", (16, 256), (16, 384), (16, 512), **SO400M, **GAP, **TANH),
        **_variants("vit_giantopt_patch{}_siglip_gap_{}", (16, 256), (16, 384), **GIANT_OPT, **GAP, **TANH),
        # for tests
        **_variants("test_vit", (16, 160), width=64, depth=6, heads=2, mlp_hidden=192),
        **_variants("test_vit2", (16, 160), width=64, depth=8, heads=2, mlp_hidden=192, registers=1, **TEST),
    }
