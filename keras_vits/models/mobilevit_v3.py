"""MobileViT v3: the networks of v1 (S, XS, XXS) and of v2 (1.0, 0.75, 0.5) with another fusion in their blocks.

    image -> stem -> stages 0, 1 (inverted residuals) -> stages 2, 3, 4 (inverted residual, MobileViT v3 block)
          -> final_conv (S, XS, XXS) -> pool (mean) -> head

Paper    Wadekar and Chaurasia, MobileViTv3: Mobile-Friendly Vision Transformer with Simple and Effective Fusion of
         Local, Global and Input Features, arXiv 2209.15159, figures 1 and 2, tables 1 and 2.
Code     none was read: the published code is for non-commercial use only. The names `*_l2` are the paper's models with
         two transformer layers in stage 3 instead of four.
Differs  Height and width must be multiples of 64 (total stride x patch size). LayerNorm epsilon is 1e-5, as in v1 and
         v2, and there is no GELU: every activation is SiLU.
"""

from keras import ops

from keras_vits.layers import ConvNorm
from keras_vits.layers._backend import apply
from keras_vits.models._registry import register
from keras_vits.models.mobilevit import MobileViT, MobileViTBlock
from keras_vits.models.mobilevit_v2 import MobileViTV2, MobileViTV2Block, sizes


class MobileViTV3Block(MobileViTBlock):
    """(B,h,w,C) -> (B,h,w,C): x + fuse([y, out(tokens(y))]), y = embed(local(x)). MobileViT v3, section 3.1.

    Three changes of v1's block: a depthwise local convolution, a 1 x 1 fusion of local features instead of the input,
    and the input added.
    """

    def build(self, shape):
        batch, height, width, channels = shape
        self.local = ConvNorm(None, 3, name="local", dtype=self.dtype_policy)
        self.out = ConvNorm(channels, name="out", dtype=self.dtype_policy)
        self.fuse = ConvNorm(channels, name="fuse", dtype=self.dtype_policy)
        self.local.build(shape)
        self.build_tokens(shape)
        self.out.build((batch, height, width, self.token_width))
        self.fuse.build((batch, height, width, self.token_width + channels))

    def call(self, x):
        y = apply(self.embed, self.local(x))
        return x + self.fuse(ops.concatenate([y, self.out(self.tokens(y))], axis=-1))


class SeparableV3Block(MobileViTV2Block):
    """(B,h,w,C) -> (B,h,w,C): x + out([tokens(y), y]), y = embed(local(x)). MobileViT v3, section 3.2.

    Two changes of v2's block: local features beside the global ones in its last convolution, and the input added.
    """

    def build(self, shape):
        batch, height, width, channels = shape
        self.out = ConvNorm(channels, activation=None, name="out", dtype=self.dtype_policy)
        self.build_tokens(shape)
        self.out.build((batch, height, width, 2 * self.token_width))

    def call(self, x):
        y = apply(self.embed, self.local(x))
        return x + self.out(ops.concatenate([self.tokens(y), y], axis=-1))


# ---------------------------------------------------------------- layout of the published checkpoints


def _conv_norm(ours, theirs):
    """Rows of a `ConvNorm`."""
    return {f"{ours}/conv": f"{theirs}.block.conv", f"{ours}/bn": f"{theirs}.block.norm"}


def _last_norm(stage, leaf):
    """Function of a weight table: the norm that follows a stage's transformer layers, and is numbered as one more."""

    def norm(take, model, i):
        depth = model.cfg.token_depths[stage - len(model.cfg.widths)]
        return take(f"layer_{stage + 1}.{i}.global_rep.{depth}.{leaf}")

    return norm


def _table(local, transformer, rest):
    """A weight table; `local` names the two convolutions before the transformer, `transformer` its layers' parts."""
    table = {**_conv_norm("stem", "conv_1"), **rest}
    for stage in range(5):
        ours, theirs = f"stage_{stage}_block_{{i}}", f"layer_{stage + 1}.{{i}}"
        for part, name in dict(expand="exp_1x1", depthwise="conv_3x3", project="red_1x1").items():
            table |= _conv_norm(f"{ours}/{part}", f"{theirs}.block.{name}")
        if stage < 2:
            continue
        depthwise, embed = local
        table |= _conv_norm(f"{ours}/local", f"{theirs}.local_rep.{depthwise}")
        table[f"{ours}/embed"] = f"{theirs}.local_rep.{embed}.block.conv"
        for part, name in transformer.items():
            table[f"{ours}/layer_{{j}}/{part}"] = f"{theirs}.global_rep.{{j}}.{name}"
        table[f"{ours}/norm/gamma"] = _last_norm(stage, "weight")
        table[f"{ours}/norm/beta"] = _last_norm(stage, "bias")
        table |= _conv_norm(f"{ours}/out", f"{theirs}.conv_proj")
        if "final_conv/conv" in rest:
            table |= _conv_norm(f"{ours}/fuse", f"{theirs}.fusion")
    return table


# ---------------------------------------------------------------- the models

XXS = dict(widths=(16, 24, 64, 80, 128), token_widths=(64, 80, 96), final_width=512, expansion=2)
XS = dict(widths=(32, 48, 96, 160, 160), token_widths=(96, 120, 144), final_width=640)
S = dict(widths=(32, 64, 128, 256, 320), token_widths=(144, 192, 240), final_width=960)
L2 = dict(token_depths=(2, 2, 3))


@register
class MobileViTV3(MobileViT):
    Block = MobileViTV3Block
    preprocessing_defaults = {**MobileViT.preprocessing_defaults, "channel_order": "bgr"}
    variants = {
        "mobilevitv3_xxs": dict(**XXS),
        "mobilevitv3_xxs_l2": dict(**XXS, **L2),
        "mobilevitv3_xs": dict(**XS),
        "mobilevitv3_xs_l2": dict(**XS, **L2),
        "mobilevitv3_s": dict(**S),
        "mobilevitv3_s_l2": dict(**S, **L2),
    }
    names = {
        "cvnets": _table(
            local=("conv_3x3", "conv_1x1"),
            transformer={
                "norm1": "pre_norm_mha.0",
                "attention/qkv": "pre_norm_mha.1.qkv_proj",
                "attention/out": "pre_norm_mha.1.out_proj",
                "norm2": "pre_norm_ffn.0",
                "mlp/fc1": "pre_norm_ffn.1",
                "mlp/fc2": "pre_norm_ffn.4",
            },
            rest={**_conv_norm("final_conv", "conv_1x1_exp"), "head": "classifier.fc"},
        )
    }


@register
class SeparableMobileViTV3(MobileViTV2):
    Block = SeparableV3Block
    variants = {
        "mobilevitv3_050": sizes(0.5),
        "mobilevitv3_075": sizes(0.75),
        "mobilevitv3_100": sizes(1.0),
    }
    names = {
        "cvnets": _table(
            local=("0", "1"),
            transformer={
                "norm1": "pre_norm_attn.0",
                "attention/qkv": "pre_norm_attn.1.qkv_proj.block.conv",
                "attention/out": "pre_norm_attn.1.out_proj.block.conv",
                "norm2": "pre_norm_ffn.0",
                "mlp/fc1": "pre_norm_ffn.1.block.conv",
                "mlp/fc2": "pre_norm_ffn.3.block.conv",
            },
            rest={"head": "classifier.1"},
        )
    }
