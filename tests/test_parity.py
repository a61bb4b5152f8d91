"""Each family computes what timm computes: weights in the hub's layout in, the same logits and block outputs out."""

import dataclasses

import families
import keras
import numpy as np
import pytest
from timm_models import import_timm, randomized

import keras_vits
from keras_vits import checkpoints
from keras_vits.models import _registry as registry

IN_TIMM = [family for family in families.FAMILIES if family.timm_tiny]
PUBLISHED = [f for f in IN_TIMM if {c.variant for c in checkpoints.table()}.intersection(f.variants)]


def outputs(reference, images, blocks):
    """timm's logits, and the outputs of some of its modules, channels last."""
    import torch

    found = {}
    for name in blocks:
        reference.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: found.update({name: o}))
    with torch.no_grad():
        logits = reference(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    return logits.numpy(), [found[n].movedim(1, -1).numpy() if found[n].ndim == 4 else found[n].numpy() for n in blocks]


def close(ours, theirs):
    scale = np.abs(theirs).max()
    assert ours.shape == theirs.shape
    assert np.ptp(theirs, axis=0).max() > 0.05 * scale, "the same numbers for every image prove nothing"
    assert np.abs(ours - theirs).max() <= 1e-4 * scale


@pytest.fixture(scope="module", autouse=True)
def first_values_are_not_drawn():
    """`randomized` gives a model of timm's all its values; those that it draws before took a fifth of the time here."""
    torch = pytest.importorskip("torch")
    import_timm()
    from timm.layers import weight_init

    kept = lambda tensor, *args, **options: tensor
    with pytest.MonkeyPatch.context() as patch:
        for name in ("kaiming_normal_", "kaiming_uniform_", "normal_", "uniform_", "xavier_uniform_"):
            patch.setattr(torch.nn.init, name, kept)
        patch.setattr(weight_init, "_trunc_normal_", kept)
        yield


@pytest.fixture(scope="module")
def known():
    """Configuration of ours -> `build_of` timm's model that it was compared with."""
    return {}


@pytest.fixture(scope="module")
def networks():
    """Network -> the one model that computes it: what is the same, once shrunk, is compiled once."""
    return {}


def build_of(reference):
    """What a model of timm's computes: the class of each module and the plain numbers and options that it holds."""
    plain = (int, float, str, bool, type(None), tuple)
    held = lambda module: {k: v for k, v in vars(module).items() if isinstance(v, plain) and k != "training"}
    return [(name, type(module), held(module)) for name, module in reference.named_modules()]


def same(family, variant, reference, folder, networks, **hyperparameters):
    """Our model with timm's weights gives timm's logits and block outputs."""
    import timm

    timm.models.save_for_hf(randomized(reference), folder, safe_serialization=True, model_args={"blocks": None})
    model = keras_vits.create(variant, weights=folder, **hyperparameters)
    assert model.cfg.num_classes == reference.num_classes
    blocks = [layer.name for layer in model.layers if "block_" in layer.name]
    tapped = keras.Model(model.input, [model.output, *model.features(blocks).outputs])
    tapped = networks.setdefault((type(model), repr(model.cfg)), tapped)
    tapped.set_weights(model.get_weights())
    images = families.images(model)
    logits, *features = families.predict(tapped, images)
    expected, expected_features = outputs(reference, images, [family.timm_block(name) for name in blocks])
    close(logits, expected)
    assert len(features) == len(blocks) > 1
    for ours, theirs in zip(features, expected_features, strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("family", IN_TIMM, ids=lambda f: f.name)
def test_logits_and_blocks_equal_timm(timm, family, tmp_path, networks):
    shape = {k: v for k, v in family.tiny.items() if k != "num_classes"}
    same(family, family.variant, family.timm_tiny(timm), tmp_path, networks, **shape)


@pytest.mark.parametrize("family", [p for p in families.everywhere("vit", "mobilevit") if p.values[0] in IN_TIMM])
def test_full_size_equals_timm(timm, family, tmp_path, networks):
    same(family, family.variant, timm.create_model(family.variant), tmp_path, networks)


def small(family):
    return {k: v for k, v in family.small.items() if k != "num_classes"}


def shrunk(family, name):
    """(class, configuration) of the small model of this name."""
    cls, hyperparameters = registry.lookup(name)
    fields = {field.name for field in dataclasses.fields(cls.Config)}
    chosen = {key: value for key, value in (hyperparameters | small(family)).items() if key in fields}
    return cls, cls._checked(chosen)


def architectures():
    """Every name: of those with the same options, in whatever sizes, the first on every backend, the others once."""
    seen = set()
    for family in IN_TIMM:
        for name in family.variants:
            cls, config = shrunk(family, name)
            options = {k: v for k, v in dataclasses.asdict(config).items() if isinstance(v, (str, bool))}
            network = cls, *sorted(options.items())
            yield pytest.param(family, name, marks=pytest.mark.once if network in seen else (), id=name)
            seen.add(network)


@pytest.mark.parametrize(("family", "variant"), list(architectures()))
def test_every_architecture_equals_timm(timm, family, variant, tmp_path, networks, known):
    """What both build in the same way as for an earlier name is not computed again."""
    reference, ours = family.timm_small(timm, variant), repr(shrunk(family, variant))
    theirs = build_of(reference)
    if known.get(ours) != theirs:
        same(family, variant, reference, tmp_path, networks, **small(family))
        known[ours] = theirs


OTHER_INPUTS = {  # ours -> timm's
    "one_channel_no_head": (dict(in_channels=1, num_classes=0), dict(in_chans=1, num_classes=0)),
    "four_channels_another_size": (dict(in_channels=4, image_size=(128, 192)), dict(in_chans=4, img_size=(128, 192))),
}


@pytest.mark.parametrize("case", OTHER_INPUTS)
@pytest.mark.parametrize("family", [p for p in families.everywhere("vit", "mobilevit") if p.values[0] in PUBLISHED])
def test_other_inputs_equal_timm(timm, family, case, tmp_path):
    """The checkpoint adapted to other images, by timm's own loader and by ours."""
    ours, theirs = (dict(changes) for changes in OTHER_INPUTS[case])
    reference = randomized(timm.create_model(family.variant))
    timm.models.save_for_hf(reference, tmp_path, safe_serialization=True)
    if family.fixed_size:
        ours.pop("image_size", None), theirs.pop("img_size", None)
    elif not hasattr(reference, "patch_embed"):  # timm's convolutional models take any size as it comes
        theirs.pop("img_size", None)
    overlay = dict(file=str(tmp_path / "model.safetensors"))
    adapted = timm.create_model(family.variant, pretrained=True, pretrained_cfg_overlay=overlay, **theirs).eval()
    model = keras_vits.create(family.variant, weights=tmp_path, **ours)
    images = families.images(model)
    expected, _ = outputs(adapted, images, [])
    close(families.predict(model, images), expected)
