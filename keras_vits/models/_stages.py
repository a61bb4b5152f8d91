"""Forward passes that several families share, up to the pooled features."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import layers

from keras_vits.layers import ConvNorm, InvertedResidual, drop_path_rates
from keras_vits.layers import _names as names
from keras_vits.models._config import same_length


def mlp_blocks(
    cfg: Any,
    image: keras.KerasTensor,
    block: Callable[..., keras.Layer],
    norm: Callable[..., keras.Layer],
) -> keras.KerasTensor:
    """Image (B,H,W,C) -> stem (patches) -> tokens (B,N,D) -> block x depth -> norm -> mean (B,D): Mixer, gMLP, ResMLP.

    Args:
        cfg: a Config with `width`, `patch_size`, `depth` and `drop_path`.
        image: the symbolic image.
        block: (drop path rate, name=) -> a layer (B,N,D) -> (B,N,D).
        norm: (name=) -> the last normalisation.
    """
    x = layers.Conv2D(cfg.width, cfg.patch_size, strides=cfg.patch_size, name=names.STEM)(image)
    x = layers.Reshape((-1, cfg.width), name=names.TOKENS)(x)
    for i, rate in enumerate(drop_path_rates(cfg.drop_path, cfg.depth)):
        x = block(rate, name=names.block(i))(x)
    x = norm(name=names.NORM)(x)
    return layers.GlobalAveragePooling1D(name=names.POOL)(x)


def mobile_stages(cfg: Any, image: keras.KerasTensor, block: type[keras.Layer], *sizes: int) -> keras.KerasTensor:
    """Image (B,H,W,C) -> stem -> stages -> feature map (B,h,w,widths[-1]), what MobileViT v1, v2 and v3 share.

    A stage is inverted residuals, the first of which halves the size but in stage 0; the last stages end in a block
    with tokens.

    Args:
        cfg: a Config with `stem_width`, `widths`, `depths`, `token_widths`, `token_depths`, `expansion`,
            `mlp_expansion`, `patch_size` and `drop_path`.
        image: the symbolic image.
        block: class of the blocks with tokens: (token width, token depth, *sizes, hidden width, patch size, drop path).
        *sizes: of the block, such as its number of heads.
    """
    x = ConvNorm(cfg.stem_width, 3, strides=2, name=names.STEM)(image)
    first = len(cfg.widths) - len(cfg.token_widths)  # stage that begins to have a block with tokens
    rates = iter(drop_path_rates(cfg.drop_path, sum(cfg.depths) + len(cfg.token_widths)))
    for s, (width, depth) in enumerate(zip(cfg.widths, cfg.depths, strict=True)):
        for i in range(depth):
            strides = 2 if s > 0 and i == 0 else 1
            x = InvertedResidual(width, strides, cfg.expansion, next(rates), name=names.stage_block(s, i))(x)
        if s >= first:
            token_width, token_depth = cfg.token_widths[s - first], cfg.token_depths[s - first]
            hidden = cfg.mlp_expansion * token_width
            name = names.stage_block(s, depth)
            x = block(token_width, token_depth, *sizes, hidden, cfg.patch_size, next(rates), name=name)(x)
    return x


def check_mobile(cfg: Any) -> None:
    """Raises a ValueError for a Config that `mobile_stages` cannot build."""
    same_length(cfg, {"widths": len(cfg.widths), "depths": len(cfg.widths)})
    same_length(cfg, {"token_widths": len(cfg.token_widths), "token_depths": len(cfg.token_widths)})
    if not 0 < len(cfg.token_widths) <= len(cfg.widths) or not all(cfg.depths):
        raise ValueError(
            "Each stage has one inverted residual or more, and the last ones a block with tokens; received depths="
            f"{cfg.depths} and token_widths={cfg.token_widths} of {len(cfg.widths)} stages."
        )


def total_stride(widths: Sequence[int], patch_size: int) -> int:
    """Pixels, along a side, for a patch of the last map: the stem and every stage but the first halve the size."""
    return 2 ** len(widths) * patch_size
