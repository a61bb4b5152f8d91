"""Our models as keras-hub's and back: presets in a folder, and keras-hub's own ViT, DeiT and DINOv2 as our ViT.

    classifier(model).save_to_preset(folder)
    model(keras_hub.models.ImageClassifier.from_preset(folder))

A program that only reads such a folder imports this module first: keras-hub finds the classes in Keras' registry. Every
function here copies the weights; training the one model leaves the other as it is.
"""

import dataclasses
import pathlib

import keras
import numpy as np

from keras_vits._util import keras_private
from keras_vits._util.resampling import cubic
from keras_vits.checkpoints import assign as weights
from keras_vits.layers import _names as names
from keras_vits.models import _registry as registry
from keras_vits.preprocess import Preprocessing, _centered

try:
    import keras_hub
except ImportError:
    raise ImportError('keras_vits.hub needs keras-hub. From a checkout: pip install -e ".[keras-hub]"') from None

register = keras.saving.register_keras_serializable("keras_vits")


# ---------------------------------------------------------------- ours as keras-hub's


def backbone(model):
    """A model without its head, as a keras-hub backbone.

    Args:
        model: a `VisionModel`.

    Returns:
        A `VisionBackbone` from images (B,H,W,C), normalised as `model.preprocessing` says, to what the model pools:
        tokens (B,N,D) or a map (B,h,w,C).
    """
    ours = VisionBackbone(
        family=type(model).__name__,
        dtype=model.dtype_policy,
        name=f"{model.name}_backbone",
        **_without_classes(model.cfg),
    )
    _copy(model, ours)
    return ours


def preprocessor(model):
    """A model's preprocessing, as a keras-hub preprocessor.

    Args:
        model: a `VisionModel`.

    Returns:
        A `VisionImageClassifierPreprocessor` of pictures (B,h,w,C) or (h,w,C), 0 to 255.
    """
    return VisionImageClassifierPreprocessor(VisionImageConverter(**dataclasses.asdict(model.preprocessing)))


def classifier(model):
    """A model with its head and its preprocessing, as a keras-hub classifier.

    Args:
        model: a `VisionModel` with a head.

    Returns:
        A `VisionImageClassifier`. Called, it computes the model's logits (B,K) from images (B,H,W,C) as the model takes
        them; its `predict` and `fit` take pictures (B,h,w,C), 0 to 255.

    Raises:
        ValueError: the model has no head.
    """
    if not model.cfg.num_classes:
        raise ValueError(f"{model.name} has no head (num_classes=0): use keras_vits.hub.backbone(model).")
    ours = VisionImageClassifier(
        backbone(model),
        model.cfg.num_classes,
        preprocessor=preprocessor(model),
        class_names=model.class_names,
        name=model.name,
    )
    _copy(model, ours)
    return ours


@register
class VisionBackbone(keras_hub.models.Backbone):
    """Any of our families up to its pooling, as a keras-hub backbone: images (B,H,W,C) -> (B,N,D) or (B,h,w,C).

    Args:
        family: name of a family's class, such as `"ViT"` or `"MobileViTV2"`.
        dtype, name, trainable: as of every Keras model.
        **hyperparameters: the fields of the family's `Config` but for `num_classes`.

    Attributes:
        neck: the layers between the backbone's output and the head, a `keras.Model`. They belong to the backbone, so
            that a classifier with other classes keeps their weights.

    Raises:
        ValueError: an unknown family, or impossible hyper-parameters.
    """

    def __init__(self, family, dtype=None, name=None, trainable=True, **hyperparameters):
        families = {cls.__name__: cls for cls, _ in registry.variants().values()}
        if family not in families:
            raise ValueError(f"family must be one of {', '.join(families)}; received {family!r}.")
        model = families[family](num_classes=1, dtype=dtype, **hyperparameters)
        tokens, head = model.get_layer(names.POOL).input, model.get_layer(names.HEAD)
        super().__init__(inputs=model.inputs[0], outputs=tokens, dtype=dtype, name=name, trainable=trainable)
        self.neck = keras.Model(tokens, head.input, name="neck")
        self.family, self.family_class = family, type(model)
        self.hyperparameters = _without_classes(model.cfg)
        self._head = type(head), head.get_config()

    def head(self, num_classes):
        """A new head of the family's kind, a layer from the neck's output to logits (B,K)."""
        cls, config = self._head
        return cls.from_config({**config, "units" if "units" in config else "num_classes": num_classes})

    def get_config(self):
        return {**super().get_config(), "family": self.family, **self.hyperparameters}


@register
class VisionImageConverter(keras_hub.layers.ImageConverter):
    """`Preprocessing` for arrays, on every backend and in a `tf.data` pipeline: (B,h,w,C) or (h,w,C) -> (B,H,W,C).

    Pictures have the model's channels (three of them in the order R, G, B) and a height and width that are known; a
    list may hold pictures of several sizes. The result is that of `Preprocessing`, but where the two round a pixel to
    another side: PIL's resampling, antialiasing, crop and border included.

    Args:
        image_size, mean, std, interpolation, crop, crop_mode, channel_order: as of
            `keras_vits.preprocess.Preprocessing`.
    """

    backbone_cls = VisionBackbone

    def __init__(
        self,
        image_size,
        mean=Preprocessing.mean,
        std=Preprocessing.std,
        interpolation=Preprocessing.interpolation,
        crop=Preprocessing.crop,
        crop_mode=Preprocessing.crop_mode,
        channel_order=Preprocessing.channel_order,
        **kwargs,
    ):
        self._preprocessing = Preprocessing(
            image_size=image_size,
            mean=mean,
            std=std,
            interpolation=interpolation,
            crop=crop,
            crop_mode=crop_mode,
            channel_order=channel_order,
        )
        super().__init__(
            image_size=tuple(image_size),
            scale=[1 / (255 * s) for s in std],
            offset=[-m / s for m, s in zip(mean, std, strict=True)],
            antialias=True,
            **kwargs,
        )
        self.interpolation = interpolation
        self.resizing = _ResizeAndCrop(self._preprocessing, dtype="float32", name="resizing")

    @property
    def preprocessing(self):
        """The `Preprocessing` that this layer does."""
        return dataclasses.replace(self._preprocessing, image_size=self.image_size)

    def get_config(self):
        return {**keras.layers.Layer.get_config(self), **dataclasses.asdict(self.preprocessing)}


class _ResizeAndCrop(keras.layers.Resizing):
    """(B,h,w,C) -> (B,H,W,C): each axis resampled by a matrix whose rows are the pixels that the crop leaves."""

    def __init__(self, preprocessing, **kwargs):
        super().__init__(*preprocessing.image_size, **kwargs)
        self.preprocessing = preprocessing

    def transform_images(self, images, transformation=None, training=True):
        height, width = images.shape[-3:-1]
        if height is None or width is None:
            raise ValueError(f"The pictures' height and width must be known; received shape {tuple(images.shape)}.")
        wanted = dataclasses.replace(self.preprocessing, image_size=(self.height, self.width))
        new_width, new_height = wanted._resized(width, height)
        rows = resampling(height, new_height, self.height, wanted.interpolation)
        columns = resampling(width, new_width, self.width, wanted.interpolation)
        ops = self.backend.numpy
        pixels = lambda x: ops.floor(ops.clip(x, 0, 255) + 0.5)  # PIL's rounding, after each axis
        x = self.backend.cast(images, "float32")
        x = pixels(ops.einsum("xw,...hwc->...hxc", columns, x))
        x = pixels(ops.einsum("yh,...hxc->...yxc", rows, x))
        x = ops.flip(x, axis=-1) if wanted.channel_order == "bgr" else x
        border = ~np.outer(rows.any(1), columns.any(1))[..., None]
        if border.any():
            x = x + self.backend.convert_to_tensor(border * np.float32([round(255 * value) for value in wanted.mean]))
        return x


def resampling(old, new, target, interpolation):
    """Matrix (target, old) that resamples `old` pixels to `new` as PIL does, and takes the `target` in the middle.

    Rows of pixels beyond the picture are zero.
    """
    scale = old / new
    centers = (np.arange(new)[:, None] + 0.5) * scale
    if interpolation == "nearest":
        matrix = np.arange(old) == np.floor(centers)
    else:
        matrix = FILTERS[interpolation](np.abs(np.arange(old) + 0.5 - centers) / max(scale, 1))
    (first, to), size = _centered(new, target), min(new, target)
    cropped = np.zeros((target, old), "float32")
    cropped[to : to + size] = (matrix / matrix.sum(1, keepdims=True))[first : first + size]
    return cropped


FILTERS = {  # of the distance, in pixels of the smaller picture
    "bilinear": lambda x: np.maximum(1 - x, 0),
    "bicubic": cubic,
    "lanczos": lambda x: np.where(x < 3, np.sinc(x) * np.sinc(x / 3), 0),
}


@register
class VisionImageClassifierPreprocessor(keras_hub.models.ImageClassifierPreprocessor):
    """What keras-hub's classifiers do to their pictures before the model: a `VisionImageConverter`."""

    backbone_cls = VisionBackbone
    image_converter_cls = VisionImageConverter


@register
class VisionImageClassifier(keras_hub.models.ImageClassifier):
    """A `VisionBackbone` with its family's pooling and head, as a keras-hub classifier: images (B,H,W,C) -> (B,K).

    Args:
        backbone: a `VisionBackbone`.
        num_classes: K.
        preprocessor: a `VisionImageClassifierPreprocessor`, or `None` if pictures come normalised.
        class_names: K names of the classes in the order of the logits, or `None`.
        activation: of the logits, such as `"softmax"`; none by default.
        **kwargs: `name`, and `compile`, as of every keras-hub task.
    """

    backbone_cls = VisionBackbone
    preprocessor_cls = VisionImageClassifierPreprocessor

    def __init__(self, backbone, num_classes, preprocessor=None, class_names=None, activation=None, **kwargs):
        self.backbone = backbone
        self.preprocessor = preprocessor
        image = backbone.input
        logits = backbone.head(num_classes)(backbone.neck(backbone(image)))
        outputs = keras.layers.Activation(activation, dtype="float32", name="predictions")(logits)
        keras_hub.models.Task.__init__(self, inputs=image, outputs=outputs, **kwargs)
        self.num_classes, self.class_names, self.activation = num_classes, class_names, activation

    def get_config(self):
        return {
            **keras_hub.models.Task.get_config(self),
            "num_classes": self.num_classes,
            "class_names": self.class_names and list(self.class_names),
            "activation": keras.activations.serialize(keras.activations.get(self.activation)),
        }


def _without_classes(cfg):
    return {name: value for name, value in dataclasses.asdict(cfg).items() if name != "num_classes"}


def _layers(model):
    """Name -> layer, for the layers of a `VisionModel`, a `VisionBackbone` or a `VisionImageClassifier`."""
    layers = {layer.name: layer for layer in model.layers}
    if isinstance(model, VisionImageClassifier):
        layers |= _layers(model.backbone)
    if isinstance(model, VisionBackbone):
        layers |= {layer.name: layer for layer in model.neck.layers}
    return layers


def _copy(source, target):
    """Gives the layers of one model the weights of the other's layers of the same name."""
    given = _layers(source)
    for name, layer in _layers(target).items():
        if layer.weights and name in given:
            layer.set_weights(given[name].get_weights())


# ---------------------------------------------------------------- keras-hub's as ours


def model(source, **overrides):
    """Our model of a keras-hub model: of what this module made, or of keras-hub's own ViT, DeiT or DINOv2.

    keras-hub's are the same in every number, with these differences in form. Keras-hub's DeiT has a distillation token
    but no head that reads it: here it is a register. The activation of a classifier's head is left out: ours give
    logits. At another `image_size` the position embeddings are resampled antialiased, as timm does it; keras-hub
    resamples DINOv2's only, as its backend does it, without. `attention_dropout` has no counterpart.

    Args:
        source: a `VisionImageClassifier` or `VisionBackbone`; a `keras_hub.models.ViTImageClassifier`,
            `DeiTImageClassifier`, `ViTBackbone`, `DeiTBackbone` or `DINOV2Backbone`; or a local folder with the preset
            of one of these. A preset that keras-hub downloads is loaded by keras-hub's `from_preset` first.
        **overrides: fields of the `Config` that shall be others, such as `image_size` or `num_classes`, whose head then
            has random weights; and `name`, `dtype`, `preprocessing`, `class_names`.

    Returns:
        A `VisionModel`. Of a backbone, it has no head and returns the pooled features (B,D);
        `model.features(["norm"])` are then keras-hub's.

    Raises:
        ValueError: another kind of model or folder, or a model that none of ours equals.
    """
    if isinstance(source, (str, pathlib.Path)):
        source = _load(source)
    task = source if isinstance(source, keras_hub.models.ImageClassifier) else None
    inner = task.backbone if task else source
    classes = task.num_classes if task else 0
    settings = {"name": source.name, "num_classes": classes}
    if converter := getattr(task and task.preprocessor, "image_converter", None):
        settings["preprocessing"] = _preprocessing(converter, inner.input_shape[-1])

    if isinstance(inner, VisionBackbone):
        settings |= dict(dtype=inner.dtype_policy, class_names=task and task.class_names, **inner.hyperparameters)
        if overrides.get("num_classes", classes) != classes:
            settings["class_names"] = None
        ours = inner.family_class(**{**settings, **overrides})
        given = _layers(source)
        for layer in ours.layers:
            if layer.weights and (layer.name != names.HEAD or ours.cfg.num_classes == classes):
                layer.set_weights(given[layer.name].get_weights())
        return ours

    cls, _ = registry.lookup("vit_tiny_patch16_224")
    format, hyperparameters = _translate(inner, task)
    with keras_private.values_later():
        ours = cls(**{**settings, **hyperparameters, **overrides})
    skip = () if ours.cfg.num_classes == classes else (names.HEAD,)
    prefix = f"{inner.name}_" if isinstance(inner, keras_hub.models.DINOV2Backbone) else ""
    weights.assign(ours, _tensors(source, prefix), source.name, format, skip, hyperparameters["image_size"])
    keras_private.initialize(ours)
    return ours


def _load(folder):
    """The classifier or the backbone of a preset in a local folder."""
    folder = pathlib.Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} is not a local folder with a preset. One that keras-hub downloads is loaded by "
            "keras_hub.models.ImageClassifier.from_preset or keras_hub.models.Backbone.from_preset first."
        )
    kind = keras_hub.models.ImageClassifier if (folder / "task.json").is_file() else keras_hub.models.Backbone
    try:
        return kind.from_preset(str(folder))
    except Exception as e:  # of a damaged preset: of json, of h5py, of whatever class its configuration names
        reason = " ".join(str(e).split())[:200] or type(e).__name__
        raise ValueError(f"{folder} is not a preset that keras-hub can read ({reason}).") from None


def _translate(source, task):
    """Name of the weight table, and hyper-parameters of our ViT, for a backbone of keras-hub."""
    if isinstance(source, keras_hub.models.ViTBackbone):
        format = "keras_hub_vit"
        ours = dict(
            mlp_hidden=source.mlp_dim,
            epsilon=source.layer_norm_epsilon,
            qkv_bias=source.use_mha_bias,
            class_token=source.use_class_token,
            pool="token" if source.use_class_token else "mean",
        )
    elif isinstance(source, keras_hub.models.DeiTBackbone):
        format = "keras_hub_deit"
        ours = dict(
            mlp_hidden=source.intermediate_dim,
            epsilon=source.layer_norm_epsilon,
            qkv_bias=source.use_mha_bias,
            registers=1,
        )
    elif isinstance(source, keras_hub.models.DINOV2Backbone):
        format = "keras_hub_dinov2_swiglu" if source.use_swiglu_ffn else "keras_hub_dinov2"
        hidden = source.intermediate_dim
        ours = dict(
            mlp_hidden=(int(hidden * 2 / 3) + 7) // 8 * 8 if source.use_swiglu_ffn else hidden,
            activation="silu" if source.use_swiglu_ffn else "gelu",
            gated=source.use_swiglu_ffn,
            layer_scale=source.layer_scale_init_value or 1.0,
            registers=source.num_register_tokens,
            prefix_position=not source.num_register_tokens,
            drop_path=source.drop_path_rate,
        )
    else:
        raise ValueError(
            "source must be a model of keras_vits.hub, or keras-hub's ViT, DeiT or DINOv2, or a preset's folder; "
            f"received {type(source).__name__}."
        )
    patch = np.broadcast_to(source.patch_size, 2).tolist()
    if patch[0] != patch[1]:
        raise ValueError(f"Patches must be square; {source.name} has {patch[0]} x {patch[1]} pixels.")
    if getattr(task, "intermediate_dim", None):
        raise ValueError(f"{task.name} has a dense layer before its head (intermediate_dim), which our ViT has not.")
    if task and task.pooling != ours.get("pool", "token").replace("mean", "gap"):
        raise ValueError(
            f"{task.name} has pooling={task.pooling!r}: our ViT takes the class token, and averages all tokens only "
            "where there is none."
        )
    *size, channels = source.image_shape
    return format, dict(
        image_size=tuple(size),
        in_channels=channels,
        patch_size=patch[0],
        width=source.hidden_dim,
        depth=source.num_layers,
        heads=source.num_heads,
        dropout=source.dropout_rate,
        **ours,
    )


def _tensors(source, prefix):
    """Name -> array of a keras-hub model's weights: PyTorch's layout and leaf names, dots for slashes, no prefix."""
    tensors = {}
    for variable in source.weights:
        path, _, leaf = variable.path.removeprefix(prefix).replace("/", ".").rpartition(".")
        layer = path.rpartition(".")[-1]
        value = keras.ops.convert_to_numpy(variable)
        if layer in ("query", "key", "value"):  # kernel (D,heads,size), bias (heads,size)
            value = value.reshape(*value.shape[:-2], -1)
        if leaf == "kernel":
            if layer == "attention_output":  # (heads,size,D)
                value = value.reshape(-1, value.shape[-1])
            value = np.moveaxis(value, (-1, -2), (0, 1))
        tensors[f"{path}.{weights.LEAVES.get(leaf, leaf)}"] = value[None] if leaf == "embeddings" else value
    for name, value in list(tensors.items()):  # a bias that keras-hub leaves out and our model has is zero
        if name.endswith(".weight") and value.ndim > 1 and not name.endswith(QKV):
            tensors.setdefault(name.removesuffix("weight") + "bias", np.zeros(len(value), "float32"))
    return tensors


QKV = (".query.weight", ".key.weight", ".value.weight")


def _preprocessing(converter, channels):
    """Fields of `Preprocessing` for an image converter of keras-hub, which computes pixels * scale + offset."""
    if isinstance(converter, VisionImageConverter):
        return converter.preprocessing
    scale, offset = (
        np.broadcast_to(default if given is None else given, channels).astype(float)
        for given, default in ((converter.scale, 1), (converter.offset, 0))
    )
    stretched = not (converter.crop_to_aspect_ratio or converter.pad_to_aspect_ratio)
    return dict(
        mean=(-offset / (255 * scale)).tolist(),
        std=(1 / (255 * scale)).tolist(),
        interpolation=converter.interpolation.removesuffix("3"),
        crop=1.0,
        crop_mode="squash" if stretched else "border" if converter.pad_to_aspect_ratio else "center",
    )
