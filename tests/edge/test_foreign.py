"""Models that are not ours, unedited: keras.applications and keras-hub's transformers, as a LiteRT file."""

import keras
import numpy as np
import pytest
from families import randomize

from keras_vits import edge

pytestmark = pytest.mark.once
SHAPE = (64, 64, 3)


def application(name):
    return getattr(keras.applications, name)(weights=None, input_shape=SHAPE, classes=7, classifier_activation=None)


APPLICATIONS = "MobileNetV2 MobileNetV3Small EfficientNetB0 EfficientNetV2B0 ConvNeXtTiny ResNet50 ResNet50V2".split()


def vit(models):
    shape = dict(patch_size=16, num_layers=2, num_heads=2, hidden_dim=24, mlp_dim=48)
    return models.ViTImageClassifier(models.ViTBackbone(image_shape=SHAPE, **shape), 7)


def deit(models):
    shape = dict(patch_size=16, num_layers=2, num_heads=2, hidden_dim=24, intermediate_dim=48)
    return models.DeiTImageClassifier(models.DeiTBackbone(image_shape=SHAPE, **shape), 7)


def dinov2(models):
    shape = dict(patch_size=16, num_layers=2, num_heads=2, hidden_dim=24, intermediate_dim=48, num_register_tokens=2)
    return models.DINOV2Backbone(image_shape=SHAPE, **shape)


def mit(models):
    shape = dict(
        layerwise_depths=[1, 1, 1, 1],
        num_layers=4,
        layerwise_num_heads=[1, 2, 5, 8],
        layerwise_sr_ratios=[8, 4, 2, 1],
        layerwise_patch_sizes=[7, 3, 3, 3],
        layerwise_strides=[4, 2, 2, 2],
        max_drop_path_rate=0.1,
        hidden_dims=[32, 64, 160, 256],
    )
    return models.MiTImageClassifier(models.MiTBackbone(image_shape=SHAPE, **shape), 7)


def check(model, images, tmp_path):
    """The file is the model, one partition, and nothing that a phone's GPU refuses."""
    given = dict.fromkeys(model.input, images) if isinstance(model.input, dict) else images
    expected = model.predict(given, verbose=0)
    found = edge.verify(edge.litert.export(model, tmp_path), against=expected, images=images)
    assert found.partitions == 1 and found.gpu_offenders == ()
    assert found.max_abs_error <= 1e-4 * np.abs(expected).max()
    assert found.max_abs_error <= 0.05 * np.ptp(expected, axis=0).max()  # of what tells the images apart


@pytest.mark.parametrize("name", APPLICATIONS)
def test_keras_applications(name, tmp_path):
    images = np.random.default_rng(0).uniform(0, 255, (2, *SHAPE)).astype("float32")
    check(randomize(application(name), seed=1), images, tmp_path)  # with 0, EfficientNetV2 amplifies rounding 20 times


@pytest.mark.parametrize("build", [vit, deit, dinov2, mit])
def test_keras_hub(build, tmp_path):
    models = pytest.importorskip("keras_hub").models
    images = np.random.default_rng(0).normal(size=(2, *SHAPE)).astype("float32")
    check(randomize(build(models)), images, tmp_path)


def resnet_v2(models):
    stages = dict(stackwise_num_filters=[64, 64], stackwise_num_blocks=[2, 2], stackwise_num_strides=[1, 2])
    stem = dict(input_conv_filters=[64], input_conv_kernel_sizes=[7])
    shape = dict(block_type="basic_block", use_pre_activation=True, image_shape=SHAPE)
    return models.ResNetBackbone(**stem, **stages, **shape)


def retinanet(models):
    stages = dict(stackwise_num_filters=[64] * 4, stackwise_num_blocks=[1] * 4, stackwise_num_strides=[1, 2, 2, 2])
    stem = dict(input_conv_filters=[64], input_conv_kernel_sizes=[7], block_type="bottleneck_block_vd")
    encoder = models.ResNetBackbone(**stem, **stages, image_shape=(128, 128, 3))
    return models.RetinaNetBackbone(encoder, min_level=3, max_level=5, use_p5=False, image_shape=(128, 128, 3))


def swin(models):
    shape = dict(embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4)
    return models.SwinTransformerBackbone(image_shape=(64, 64, 3), **shape)


@pytest.mark.filterwarnings("ignore::UserWarning")  # keras-hub's own, of masks and of the structure of its inputs
@pytest.mark.parametrize("build", [resnet_v2, retinanet, swin])
def test_convolutions_pyramids_and_windows_of_keras_hub_are_one_partition(build, tmp_path):
    model = randomize(build(pytest.importorskip("keras_hub").models))
    images = np.random.default_rng(0).normal(size=(1, *model.inputs[0].shape[1:])).astype("float32")
    found = edge.verify(edge.litert.export(model, tmp_path), against=model, images=images)
    assert found.partitions == 1 and found.sqnr_db > 100
