"""The one place a family is entered: every contract test runs over this list and the registry."""

import dataclasses
from collections.abc import Callable

import numpy as np

import keras_vits
from keras_vits import registry


def nested(name):
    """timm's name of a block: block_3 -> blocks.3, stage_2_block_1 -> stages.2.1."""
    numbers = ".".join(part for part in name.split("_") if part.isdigit())
    return f"{'stages' if name.startswith('stage') else 'blocks'}.{numbers}"


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """A family under test.

    Attributes:
        name: of its file in `keras_vits/models/`.
        variant: the full-size variant that parity is shown on.
        tiny: hyper-parameters that shrink `variant` to something that every test can afford.
        timm_tiny: (timm) -> the same tiny model, built by timm.
        small: hyper-parameters that shrink every variant of the family, so that all of them can be compared with timm.
        timm_small: (timm, name) -> the variant of this name, shrunk in the same way by timm.
        timm_block: name of a block of ours -> timm's name of it.
    """

    name: str
    variant: str
    tiny: dict
    timm_tiny: Callable
    small: dict = dataclasses.field(default_factory=lambda: dict(num_classes=5))
    timm_small: Callable = lambda timm, name: timm.create_model(name, num_classes=5)
    timm_block: Callable = nested

    @property
    def variants(self):
        """Names of all variants in the family's file."""
        return [n for n, (cls, _) in registry.variants().items() if cls.__module__.endswith(f".{self.name}")]

    def create(self, **overrides):
        """The tiny model, with random weights and statistics of unequal size."""
        return randomize(keras_vits.create(self.variant, **{**self.tiny, **overrides}))


def _vit(timm):
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=24,
        depth=2,
        num_heads=2,
        mlp_ratio=2,
        num_classes=5,
    )


def _mixer(timm):
    return timm.models.mlp_mixer._create_mixer(
        "mixer_s32_224", img_size=32, patch_size=8, embed_dim=24, num_blocks=2, mlp_ratio=(0.5, 2.0), num_classes=5
    )


def _two_blocks(timm, name):
    model = timm.create_model(name, img_size=64, num_classes=5)
    model.blocks = model.blocks[:2]
    return model


def _mobilevit(timm):
    m = timm.models.mobilevit
    blocks = (
        m._inverted_residual_block(d=1, c=8, s=1, br=2.0),
        m._mobilevit_block(d=2, c=16, s=2, transformer_dim=24, transformer_depth=2, patch_size=2, br=2.0),
        m._mobilevit_block(d=1, c=16, s=2, transformer_dim=32, transformer_depth=1, patch_size=2, br=2.0),
    )
    return timm.create_model("mobilevit_xxs", blocks=blocks, stem_chs=8, num_features=32, num_classes=5)


def _mobilevit_v2(timm):
    m = timm.models.mobilevit
    blocks = (
        m._inverted_residual_block(d=1, c=8, s=1, br=2.0),
        m._mobilevitv2_block(d=2, c=16, s=2, transformer_depth=2),
        m._mobilevitv2_block(d=1, c=32, s=2, transformer_depth=1),
    )
    return timm.create_model("mobilevitv2_050", blocks=blocks, stem_chs=8, num_classes=5)


FAMILIES = [
    Family(
        "vit",
        "vit_tiny_patch16_224",
        dict(image_size=32, patch_size=8, width=24, depth=2, heads=2, mlp_hidden=48, num_classes=5),
        _vit,
        small=dict(image_size=64, patch_size=16, width=48, heads=3, mlp_hidden=192, depth=2, num_classes=5),
        timm_small=lambda timm, name: timm.create_model(
            name, img_size=64, patch_size=16, embed_dim=48, num_heads=3, depth=2, num_classes=5
        ),
    ),
    Family(
        "mixer",
        "mixer_s32_224",
        dict(image_size=32, patch_size=8, width=24, depth=2, token_hidden=12, channel_hidden=48, num_classes=5),
        _mixer,
        small=dict(image_size=64, depth=2, num_classes=5),
        timm_small=_two_blocks,
    ),
    Family(
        "mobilevit",
        "mobilevit_xxs",
        dict(
            image_size=32,
            stem_width=8,
            widths=(8, 16, 16),
            depths=(1, 2, 1),
            token_widths=(24, 32),
            token_depths=(2, 1),
            final_width=32,
            num_classes=5,
        ),
        _mobilevit,
        small=dict(image_size=64, num_classes=5),
    ),
    Family(
        "mobilevit_v2",
        "mobilevitv2_050",
        dict(
            image_size=32,
            stem_width=8,
            widths=(8, 16, 32),
            depths=(1, 2, 1),
            token_widths=(8, 16),
            token_depths=(2, 1),
            num_classes=5,
        ),
        _mobilevit_v2,
        small=dict(image_size=64, num_classes=5),
    ),
]


def randomize(model, seed=0):
    """Gives every weight and running statistic a random value, none of them 0 or 1; returns the model.

    Kernels keep the signal's size, so that the logits still tell the images apart.
    """
    random = np.random.default_rng(seed)
    for variable in model.weights:
        if "seed" in variable.path:
            continue
        shape = tuple(variable.shape)
        leaf = variable.path.rsplit("/", 1)[-1]
        if leaf in ("gamma", "moving_variance"):
            value = random.uniform(0.5, 1.5, shape)
        elif leaf == "kernel":
            depthwise = len(shape) == 4 and shape[-1] == 1
            inputs = np.prod(shape[:2] if depthwise else shape[:-1])
            value = random.normal(0, (1.3 if len(shape) == 4 else 1) / np.sqrt(inputs), shape)
        else:
            value = random.normal(0, 0.2, shape)
        variable.assign(value.astype("float32"))
    return model


def images(model, count=2, seed=1):
    """Random images (count,H,W,C) in the model's input size: coarse patches and noise."""
    random = np.random.default_rng(seed)
    _, height, width, channels = model.input_shape
    coarse = random.normal(size=(count, 4, 4, channels)).repeat(-(-height // 4), 1).repeat(-(-width // 4), 2)
    noise = random.normal(0, 0.5, (count, height, width, channels))
    return (coarse[:, :height, :width] + noise).astype("float32")
