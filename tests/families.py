"""The one place a family is entered: every contract test runs over this list and the registry."""

import dataclasses
import functools
from collections.abc import Callable

import keras
import numpy as np
import pytest

import keras_vits
from keras_vits._util import keras_private
from keras_vits.models import _registry as registry


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
        timm_tiny: (timm) -> the same tiny model, built by timm; `None` where timm has no such family.
        small: hyper-parameters that shrink every variant of the family, so that all of them can be compared with timm.
        timm_small: (timm, name) -> the variant of this name, shrunk in the same way by timm.
        timm_block: name of a block of ours -> timm's name of it.
        fixed_size: whether the weights hold for one image size only, as those of dense layers across tokens do.
    """

    name: str
    variant: str
    tiny: dict
    timm_tiny: Callable
    small: dict = dataclasses.field(default_factory=lambda: dict(num_classes=5))
    timm_small: Callable = lambda timm, name: timm.create_model(name, num_classes=5)
    timm_block: Callable = nested
    fixed_size: bool = False

    @property
    def variants(self):
        """Names of all variants in the family's file."""
        return [n for n, (cls, _) in registry.variants().items() if cls.__module__.endswith(f".{self.name}")]

    def create(self, **overrides):
        """The tiny model, with random weights and statistics of unequal size."""
        with keras_private.values_later():
            model = keras_vits.create(self.variant, **{**self.tiny, **overrides})
        return randomize(model)


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


def _small_vit(timm, name):
    ratio = 8 if registry.variants()[name][1].get("gated") else 4  # timm counts both halves of a gated perceptron
    return timm.create_model(
        name, img_size=64, patch_size=16, embed_dim=48, num_heads=3, depth=2, mlp_ratio=ratio, num_classes=5
    )


def _vit_hybrid(timm):
    module = timm.models.vision_transformer_hybrid
    conv = functools.partial(timm.layers.StdConv2dSame, eps=1e-8)
    options = dict(num_classes=0, global_pool="", stem_type="same", preact=False, conv_layer=conv)
    backbone = timm.models.resnetv2.ResNetV2(layers=(1, 2), channels=(256, 512), **options)
    options = dict(img_size=32, embed_dim=24, depth=2, num_heads=2, mlp_ratio=2, num_classes=5)
    return module._create_vision_transformer_hybrid("vit_small_r26_s32_224", backbone, **options)


def _small_vit_hybrid(timm, name):
    return timm.create_model(name, img_size=64, embed_dim=64, num_heads=4, depth=2, mlp_ratio=4, num_classes=5)


def _vit_resnetd(timm):
    module = timm.models.vision_transformer_hybrid
    options = dict(layers=(1, 2), channels=(64, 128), features_only=True, out_indices=[2])
    backbone = timm.models.resnet.resnet26d(**options)
    options = dict(img_size=32, embed_dim=24, depth=2, num_heads=2, mlp_ratio=2, num_classes=5)
    return module._create_vision_transformer_hybrid("vit_small_resnet26d_224", backbone, **options)


def _in_resnetd(name):
    """timm's name of a block behind a ResNet-D: stage_2_block_1 -> patch_embed.backbone.layer3.1."""
    stage, _, block = nested(name).removeprefix("stages.").partition(".")
    return f"patch_embed.backbone.layer{int(stage) + 1}.{block}" if name.startswith("stage") else nested(name)


def _in_backbone(name):
    """timm's name of a hybrid's block: stage_2_block_1 -> patch_embed.backbone.stages.2.blocks.1."""
    stage, _, block = nested(name).removeprefix("stages.").partition(".")
    return f"patch_embed.backbone.stages.{stage}.blocks.{block}" if name.startswith("stage") else nested(name)


def _mixer(timm):
    return timm.models.mlp_mixer._create_mixer(
        "mixer_s32_224", img_size=32, patch_size=8, embed_dim=24, num_blocks=2, mlp_ratio=(0.5, 2.0), num_classes=5
    )


def _gmlp(timm):
    m = timm.models.mlp_mixer
    options = dict(img_size=32, patch_size=8, embed_dim=24, num_blocks=2, mlp_ratio=2, num_classes=5)
    return m._create_mixer("gmlp_ti16_224", block_layer=m.SpatialGatingBlock, mlp_layer=m.GatedMlp, **options)


def _resmlp(timm):
    m = timm.models.mlp_mixer
    options = dict(img_size=32, patch_size=8, embed_dim=24, num_blocks=2, mlp_ratio=2, num_classes=5)
    return m._create_mixer("resmlp_12_224", block_layer=m.ResBlock, norm_layer=m.Affine, **options)


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


def _efficientvit(timm):
    return timm.create_model(
        "efficientvit_b1", widths=(8, 8, 16, 32, 32), depths=(1, 2, 1, 1, 2), head_widths=(48, 40), num_classes=5
    )


def _efficientvit_shallow(timm, name):
    depths = (1, 2, 2, 1, 1) if name.startswith("efficientvit_b") else (1, 1, 1, 1, 1)
    return timm.create_model(name, depths=depths, head_widths=(64, 48), num_classes=5)


FAMILIES = [
    Family(
        "vit",
        "vit_tiny_patch16_224",
        dict(image_size=32, patch_size=8, width=24, depth=2, heads=2, mlp_hidden=48, num_classes=5),
        _vit,
        small=dict(image_size=64, patch_size=16, width=48, heads=3, mlp_hidden=192, depth=2, num_classes=5),
        timm_small=_small_vit,
    ),
    Family(
        "vit_hybrid",
        "vit_small_r26_s32_224",
        dict(image_size=32, stages=(1, 2), width=24, depth=2, heads=2, mlp_hidden=48, num_classes=5),
        _vit_hybrid,
        small=dict(image_size=64, width=64, heads=4, mlp_hidden=256, depth=2, num_classes=5),
        timm_small=_small_vit_hybrid,
        timm_block=_in_backbone,
    ),
    Family(
        "vit_resnetd",
        "vit_small_resnet26d_224",
        dict(image_size=32, stages=(1, 2), width=24, depth=2, heads=2, mlp_hidden=48, num_classes=5),
        _vit_resnetd,
        small=dict(image_size=64, width=64, heads=4, mlp_hidden=256, depth=2, num_classes=5),
        timm_small=_small_vit_hybrid,
        timm_block=_in_resnetd,
    ),
    Family(
        "mixer",
        "mixer_s32_224",
        dict(image_size=32, patch_size=8, width=24, depth=2, token_hidden=12, channel_hidden=48, num_classes=5),
        _mixer,
        small=dict(image_size=64, depth=2, num_classes=5),
        timm_small=_two_blocks,
        fixed_size=True,
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
    Family(
        "gmlp",
        "gmlp_ti16_224",
        dict(image_size=32, patch_size=8, width=24, depth=2, mlp_hidden=48, num_classes=5),
        _gmlp,
        small=dict(image_size=64, depth=2, num_classes=5),
        timm_small=_two_blocks,
        fixed_size=True,
    ),
    Family(
        "resmlp",
        "resmlp_12_224",
        dict(image_size=32, patch_size=8, width=24, depth=2, mlp_hidden=48, num_classes=5),
        _resmlp,
        small=dict(image_size=64, depth=2, num_classes=5),
        timm_small=_two_blocks,
        fixed_size=True,
    ),
    Family(
        "efficientvit",
        "efficientvit_b1",
        dict(
            image_size=64,
            widths=(8, 8, 16, 32, 32),
            depths=(1, 1, 0, 1, 2),
            final_width=48,
            final_hidden=40,
            num_classes=5,
        ),
        _efficientvit,
        small=dict(image_size=64, depths=(1, 1, 1, 1, 1), final_width=64, final_hidden=48, num_classes=5),
        timm_small=_efficientvit_shallow,
        timm_block=lambda name: "stages.{}.blocks.{}".format(*(n for n in name.split("_") if n.isdigit())),
    ),
    Family(  # compared with a PyTorch model of ours in test_mobilevit_v3.py, as the next one
        "mobilevit_v3",
        "mobilevitv3_xxs",
        dict(
            image_size=64,
            stem_width=8,
            widths=(8, 8, 16, 16, 24),
            depths=(1, 1, 1, 1, 1),
            token_widths=(24, 32, 16),
            token_depths=(2, 1, 1),
            final_width=32,
            num_classes=5,
        ),
        timm_tiny=None,
        timm_small=None,
    ),
    Family(
        "mobilevit_v3",
        "mobilevitv3_050",
        dict(
            image_size=64,
            stem_width=8,
            widths=(8, 8, 16, 16, 32),
            depths=(1, 1, 1, 1, 1),
            token_widths=(8, 8, 16),
            token_depths=(2, 1, 1),
            num_classes=5,
        ),
        timm_tiny=None,
        timm_small=None,
    ),
]


def once_but(cases, *names):
    """Names of cases as a test's parameters: these on every backend, the others once."""
    assert set(names) <= set(cases)
    return [pytest.param(case, marks=() if case in names else pytest.mark.once) for case in cases]


def everywhere(*names, among=None):
    """The families, or those of some names, as a test's parameters: these on every backend, the others once.

    For what follows from a model's graph and weights, which are equal on every backend: graph/test_backends.py.
    """
    chosen = {family.name: family for family in FAMILIES if among is None or family.name in among}
    return [pytest.param(chosen[p.values[0]], marks=p.marks, id=p.values[0]) for p in once_but(chosen, *names)]


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
        if leaf in ("gamma", "moving_variance", "variance"):
            value = random.uniform(0.5, 1.5, shape)
        elif leaf == "kernel":
            depthwise = len(shape) == 4 and shape[-1] == 1
            inputs = np.prod(shape[:2] if depthwise else shape[:-1])
            value = random.normal(0, (1.3 if len(shape) == 4 else 1) / np.sqrt(inputs), shape)
        else:
            value = random.normal(0, 0.2, shape)
        keras_private.set_value(variable, value.astype("float32"))
    keras_private.initialize(model)
    return model


def signature(graph):
    """What two Graphs of one model have in common: operations, layers, shapes of the inputs, attributes."""
    return [
        [n.op, n.layer, [v and list(v.shape) for v in n.inputs], repr(sorted(n.attrs.items()))] for n in graph.nodes
    ]


def predict(model, images):
    """The model's outputs on images, in numpy; TensorFlow runs the layers one by one: to trace them takes longer."""
    if keras.backend.backend() == "tensorflow":
        return keras.tree.map_structure(keras.ops.convert_to_numpy, model(images, training=False))
    return model.predict(images, verbose=0)


def images(model, count=2, seed=1):
    """Random images (count,H,W,C) in the model's input size: coarse patches and noise."""
    random = np.random.default_rng(seed)
    _, height, width, channels = model.input_shape
    coarse = random.normal(size=(count, 4, 4, channels)).repeat(-(-height // 4), 1).repeat(-(-width // 4), 2)
    noise = random.normal(0, 0.5, (count, height, width, channels))
    return (coarse[:, :height, :width] + noise).astype("float32")
