"""VisionModel: a family's Config becomes a functional Keras model that saves, loads and exposes its features."""

import contextlib
import dataclasses
import re

import keras

from keras_vits.preprocess import Preprocessing

BLOCK = re.compile(r"(stage_\d+_)?block_\d+")  # the layers that `features` numbers


class VisionModel(keras.Model):
    """Base of every family: image (B,H,W,C) -> stem -> tokens -> blocks -> pool -> head -> logits (B,K).

    A family states its `Config` (a frozen dataclass), its `variants` (name -> hyper-parameters), its weight tables
    `names` and a static `graph(cfg, image)` that reads top to bottom. A hyper-parameter is written in one place, the
    Config: `get_config` is `asdict(cfg)`.

    Args:
        name: name of the model, also the name of the variant it was created as.
        dtype: Keras dtype policy of all layers, e.g. `"mixed_bfloat16"`; the global policy by default. Weights stay in
            float32 under a mixed policy, and the head always computes in float32.
        trainable: whether the weights train.
        preprocessing: a `Preprocessing`, how an image becomes the model's input; the family's own by default.
        class_names: K names of the classes in the order of the logits, or `None`.
        **hyperparameters: the fields of `Config`.

    Raises:
        ValueError: a hyper-parameter that does not exist or is impossible.
    """

    Config = None
    variants = {}
    names = {}  # source format -> {our layer name: the source's layer name}; see weights.py
    preprocessing_defaults = {}  # fields of Preprocessing that the family's published weights were trained with

    @staticmethod
    def graph(cfg, image):
        """The forward pass, from the symbolic image (B,H,W,C) to the symbolic logits (B,K)."""
        raise NotImplementedError("A family must define graph(cfg, image).")

    @staticmethod
    def size_multiple(cfg):
        """What the image's height and width must be multiples of, in pixels."""
        return 1

    def __init__(
        self, *, name=None, dtype=None, trainable=True, preprocessing=None, class_names=None, **hyperparameters
    ):
        cfg = self._checked(hyperparameters)
        with _policy(dtype):
            image = keras.Input((*cfg.image_size, cfg.in_channels), name="image")
            logits = self.graph(cfg, image)
            policy = keras.config.dtype_policy()
        super().__init__(inputs=image, outputs=logits, name=name)
        self.dtype_policy = policy
        self.trainable = trainable
        self.cfg = cfg
        if not isinstance(preprocessing, Preprocessing):
            preprocessing = Preprocessing(**(preprocessing or self.preprocessing_defaults))
        self.preprocessing = dataclasses.replace(
            preprocessing,
            image_size=cfg.image_size,
            mean=_per_channel(preprocessing.mean, cfg.in_channels),
            std=_per_channel(preprocessing.std, cfg.in_channels),
        )
        self.class_names = class_names

    @property
    def class_names(self):
        """Names of the K classes in the order of the logits, or `None`."""
        return list(self._class_names) if self._class_names else None

    @class_names.setter
    def class_names(self, names):
        names = tuple(str(n) for n in names) if names else ()
        if names and len(names) != self.cfg.num_classes:
            raise ValueError(f"class_names has {len(names)} names but the model has {self.cfg.num_classes} classes.")
        self._class_names = names

    @classmethod
    def _checked(cls, hyperparameters):
        """A Config with `image_size` as (height, width); `ValueError` for what cannot be built."""
        fields = {f.name for f in dataclasses.fields(cls.Config)}
        if unknown := sorted(set(hyperparameters) - fields):
            raise ValueError(
                f"{cls.__name__} has no hyper-parameter {', '.join(unknown)}. It has: {', '.join(sorted(fields))}."
            )
        try:
            cfg = cls.Config(**hyperparameters)
        except TypeError as e:
            raise ValueError(
                f"{cls.__name__}: {e}. Use keras_vits.create(name) to start from a published variant."
            ) from None
        size = (cfg.image_size, cfg.image_size) if isinstance(cfg.image_size, int) else tuple(cfg.image_size)
        if len(size) != 2 or any(not isinstance(s, int) or s < 1 for s in size):
            raise ValueError(
                f"image_size must be pixels or (height, width), both positive; received {cfg.image_size!r}."
            )
        tuples = {k: tuple(v) for k, v in vars(cfg).items() if isinstance(v, list)}  # JSON has no tuples
        cfg = dataclasses.replace(cfg, **{**tuples, "image_size": size})
        if not isinstance(cfg.in_channels, int) or cfg.in_channels < 1:
            raise ValueError(f"in_channels must be a positive integer; received {cfg.in_channels!r}.")
        if not isinstance(cfg.num_classes, int) or cfg.num_classes < 0:
            raise ValueError(f"num_classes must be 0 (no head) or a positive integer; received {cfg.num_classes!r}.")
        if not 0 <= cfg.drop_path < 1:
            raise ValueError(f"drop_path is a probability in [0, 1); received {cfg.drop_path!r}.")
        multiple = cls.size_multiple(cfg)
        if any(s % multiple for s in size):
            near = " x ".join(str(max(multiple, round(s / multiple) * multiple)) for s in size)
            raise ValueError(
                f"image_size {size[0]} x {size[1]} does not fit {cls.__name__}: height and width must be multiples of "
                f"{multiple} pixels (patch size or total stride). The nearest size is {near}."
            )
        return cfg

    def features(self, which=None):
        """A model of intermediate results, sharing this model's weights.

        Args:
            which: block numbers in the order of the forward pass (negative ones count from the end), or layer names
                such as `"block_3"`, `"stage_2_block_0"`, `"norm"`; every block by default.

        Returns:
            A `keras.Model` from images (B,H,W,C) to a list of the chosen layers' outputs.

        Raises:
            ValueError: no such block or layer.
        """
        blocks = [layer.name for layer in self.layers if BLOCK.fullmatch(layer.name)]
        named = {layer.name for layer in self.layers}
        chosen = []
        for key in blocks if which is None else which:
            if isinstance(key, int) and -len(blocks) <= key < len(blocks):
                chosen.append(blocks[key])
            elif key in named:
                chosen.append(key)
            else:
                raise ValueError(
                    f"No block or layer {key!r}: {self.name} has blocks 0 to {len(blocks) - 1}, named "
                    f"{', '.join(blocks)}."
                )
        return keras.Model(self.inputs, [self.get_layer(key).output for key in chosen], name=f"{self.name}_features")

    def get_config(self):
        return {
            **dataclasses.asdict(self.cfg),
            "name": self.name,
            "dtype": keras.dtype_policies.serialize(self.dtype_policy),
            "trainable": self.trainable,
            "preprocessing": dataclasses.asdict(self.preprocessing),
            "class_names": self.class_names,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        if isinstance(config.get("dtype"), dict):
            config["dtype"] = keras.dtype_policies.deserialize(config["dtype"])
        return cls(**config)


def _per_channel(values, channels):
    """The values, or their average for every channel if their number is another one."""
    return values if len(values) == channels else (sum(values) / len(values),) * channels


@contextlib.contextmanager
def _policy(dtype):
    """Layers made inside get this dtype policy."""
    if dtype is None:
        yield
        return
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(dtype)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)
