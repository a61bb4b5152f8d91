"""VisionModel: a family's Config becomes a functional Keras model that saves, loads and fine-tunes.

One file, since it is one class.
"""

import contextlib
import dataclasses
import fnmatch
import functools
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

import keras
from keras import ops

from keras_vits._util.files import writing
from keras_vits._util.keras_private import (
    flatten_layers,
    hears_of_clones,
    initialize,
    run_operations,
    set_value,
    temporary_files,
    values_at_the_end,
    values_later,
    without_tensorflow,
    writes_legacy_file,
)
from keras_vits._util.limits import MAX_PARAMETERS, whole
from keras_vits._util.quantized import refuse_quantized
from keras_vits._util.resampling import resample_positions
from keras_vits.heads import Classifier, Head, PooledFeatures
from keras_vits.layers import _names as layer_names
from keras_vits.models._config import checked
from keras_vits.preprocess import Preprocessing
from keras_vits.specs import InputSpec, OutputSpec, checked_names

STATE = {"moving_mean", "moving_variance", "seed_generator_state"}  # variables that a layer changes when it is called


@dataclasses.dataclass(frozen=True, kw_only=True)
class Feature:
    """A block's output as a feature map (B,height,width,channels), known without running the model.

    Attributes:
        name: of the block.
        channels: C, or the tokens' width D.
        stride: pixels of the image, along each side, for a pixel of the map.
        height: pixels of the map, or rows of the tokens' grid.
        width: pixels of the map, or columns of the tokens' grid.
    """

    name: str
    channels: int
    stride: int
    height: int
    width: int


@hears_of_clones
class VisionModel(keras.Model):
    """Base of every family: image (B,H,W,C) -> stem -> tokens -> blocks -> pool -> head -> logits (B,K).

    A family states its `Config` (a frozen dataclass), its `variants` (name -> hyper-parameters), its weight tables
    `names` and a static `backbone(cfg, image)` that reads top to bottom, and `head(cfg)` where it has an odd head. A
    hyper-parameter is written in one place, the Config: `get_config` is `asdict(cfg)`.

    Args:
        name: name of the model, also the name of the variant it was created as.
        dtype: Keras dtype policy of all layers, e.g. `"mixed_bfloat16"`; the global policy by default. Weights stay in
            float32 under a mixed policy, and the head always computes in float32.
        trainable: whether the weights train.
        preprocessing: a `Preprocessing`, how an image becomes the model's input; the family's own by default.
        class_names: K names of the classes in the order of the logits, or `None`.
        frozen: names of the layers, or paths of those inside (`"block_0/attention"`), that do not train.
        remat: whether training keeps only the blocks' inputs for the backward pass and computes the rest a second time
            (gradient checkpointing): much less memory for about a third more time, the same results. Models that
            `features` returns do not.
        **hyperparameters: the fields of `Config`.

    Raises:
        ValueError: a hyper-parameter that does not exist or is impossible.
    """

    Config: ClassVar[Any] = None
    variants: ClassVar[dict[str, dict[str, Any]]] = {}
    # Source format -> {our layer name: the source's layer name}; see checkpoints/assign.py.
    names: ClassVar[dict[str, dict[Any, Any]]] = {}
    # Fields of Preprocessing that the family's published weights were trained with.
    preprocessing_defaults: ClassVar[dict[str, Any]] = {}

    @staticmethod
    def backbone(cfg: Any, image: keras.KerasTensor) -> keras.KerasTensor:
        """The forward pass, from the symbolic image (B,H,W,C) to the features (B,D) that a head reads."""
        raise NotImplementedError("A family must define backbone(cfg, image).")

    @classmethod
    def head(cls, cfg: Any) -> Head:
        """What makes the output of the features: logits of `num_classes` classes, or for none the features."""
        return Classifier(cfg.num_classes) if cfg.num_classes else PooledFeatures()

    @staticmethod
    def check(cfg: Any) -> None:
        """`ValueError` for values that do not fit each other. What a field alone may be, `_config.checked` says."""

    @staticmethod
    def size_multiple(cfg: Any) -> int:
        """What the image's height and width must be multiples of, in pixels."""
        return 1

    def __new__(cls, inputs: Any = None, outputs: Any = None, name: str | None = None, **_: Any) -> Any:
        if inputs is not None and not hasattr(outputs, "_vision_model"):
            return keras.Model(inputs, outputs, name=name)
        return super().__new__(cls)

    def __init__(
        self,
        inputs: Any = None,
        outputs: Any = None,
        name: str | None = None,
        *,
        dtype: Any = None,
        trainable: bool = True,
        preprocessing: Preprocessing | Mapping[str, Any] | None = None,
        class_names: Sequence[str] | None = None,
        frozen: Sequence[str] = (),
        remat: bool = False,
        **hyperparameters: Any,
    ) -> None:
        if inputs is not None:
            self._become_clone(outputs._vision_model, inputs, outputs, name)
            return
        cfg = self._checked(hyperparameters)
        if keras.config.image_data_format() != "channels_last":
            raise ValueError(
                "Models of keras_vits take images (B,H,W,C): call keras.config.set_image_data_format('channels_last')."
            )
        with values_at_the_end(functools.partial(_check_count, name or type(self).__name__)), _policy(dtype):
            image = keras.Input((*cfg.image_size, cfg.in_channels), name=layer_names.IMAGE)
            outputs = self.head(cfg)(self.backbone(cfg, image))
            policy = keras.config.dtype_policy()
        super().__init__(inputs=image, outputs=outputs, name=name)
        self.dtype_policy = policy
        self.trainable = trainable
        self._freeze(frozen)
        self.remat = remat
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

    def _cloned(self, made: dict[Any, Any], outputs: Any) -> None:
        """Tells a clone what it was made of: `keras.models.clone_model` passes the results to a constructor with Keras'
        own three arguments, if a class has such a one, but no configuration. A clone whose layers differ is another
        architecture, which Keras' plain functional model describes.
        """
        changed = (made[layer] is layer or not _alike(layer, made[layer]) for layer in made)
        if made and not any(changed) and tuple(outputs.shape) == tuple(self.outputs[0].shape):
            outputs._vision_model = self

    def _become_clone(self, model: Any, inputs: Any, outputs: Any, name: str | None) -> None:
        super().__init__(inputs=inputs, outputs=outputs, name=name)
        self.dtype_policy, self.trainable, self.remat = model.dtype_policy, model.trainable, model.remat
        self.cfg, self.preprocessing, self.class_names = model.cfg, model.preprocessing, model.class_names
        self._freeze(model._frozen)

    def _freeze(self, frozen: Sequence[str]) -> None:
        inside = {layer.path: layer for layer in flatten_layers(self)} if any("/" in path for path in frozen) else {}
        for path in frozen:
            (inside[path] if path in inside else self.get_layer(path)).trainable = False

    @property
    def class_names(self) -> list[str] | None:
        """Names of the K classes in the order of the logits, or `None`."""
        return list(self._class_names) if self._class_names else None

    @class_names.setter
    def class_names(self, names: Sequence[str] | Mapping[int, str] | None) -> None:
        names = checked_names(names)
        if names and len(names) != self.cfg.num_classes:
            raise ValueError(f"class_names has {len(names)} names but the model has {self.cfg.num_classes} classes.")
        self._class_names = names

    @property
    def input_specs(self) -> tuple[InputSpec, ...]:
        """The `InputSpec` of the image, as a tuple."""
        fields = dataclasses.asdict(self.preprocessing)
        return (InputSpec(name=layer_names.IMAGE, shape=(1, *self.input_shape[1:]), preprocessing=fields),)

    @property
    def output_specs(self) -> tuple[OutputSpec, ...]:
        """An `OutputSpec` for each output, as the head says: logits, of one class a binary logit, or features."""
        shapes = keras.tree.map_structure(lambda output: (1, *output.shape[1:]), self.output)
        return self.head(self.cfg).specs(shapes, tuple(self.class_names or ()))

    @classmethod
    def _checked(cls, hyperparameters: dict[str, Any]) -> Any:
        """A Config with `image_size` as (height, width); `ValueError` for what cannot be built."""
        cfg = checked(cls.__name__, cls.Config, hyperparameters)
        cls.check(cfg)
        multiple, size = cls.size_multiple(cfg), cfg.image_size
        if any(s % multiple for s in size):
            near = " x ".join(str(max(multiple, round(s / multiple) * multiple)) for s in size)
            raise ValueError(
                f"image_size {size[0]} x {size[1]} does not fit {cls.__name__}: height and width must be multiples of "
                f"{multiple} pixels (patch size or total stride). The nearest size is {near}."
            )
        return cfg

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        if not (self.remat and training):
            return super().call(inputs, training=training, mask=mask)

        def operation(layer: Any) -> Any:
            if layer_names.BLOCK.fullmatch(layer.name):
                return _rematerialized(layer)
            if isinstance(layer, keras.Layer):  # told so itself: in JAX's stateless call no context tells it
                return lambda *args, **kwargs: layer(*args, **{**kwargs, "training": True})
            return layer

        return run_operations(self, inputs, operation)

    # ---------------------------------------------------------------- training

    def compile(
        self,
        optimizer: str | keras.optimizers.Optimizer = "rmsprop",
        loss: Any = "auto",
        loss_weights: Any = None,
        metrics: Any = "auto",
        weighted_metrics: Any = None,
        **options: Any,
    ) -> None:
        """Configures the model for training, as `keras.Model.compile` does, with the loss that fits its logits.

        Args:
            optimizer: name or object, e.g. `"adamw"` or what `keras_vits.training.adamw` returns.
            loss: `"auto"` is cross-entropy from logits: sparse for K > 1 classes, whose labels are class numbers (B,),
                binary for K = 1, whose labels are 0 and 1, and none for the features of a model without a head. A
                cross-entropy that is given by its name or as Keras' function means its form for logits, too. A loss
                object is taken as it is; one that takes probabilities is warned about (`compiling.LogitsWarning`).
            loss_weights: see `keras.Model.compile`.
            metrics: list of names or objects, read like the losses; `"accuracy"` of one class has the threshold 0.
                `"auto"` is the accuracy that fits an automatic loss, and nothing for a given loss.
            weighted_metrics: the same, weighted by the samples' weights.
            **options: further arguments of `keras.Model.compile`, e.g. `jit_compile`.
        """
        head, automatic = self.head(self.cfg), isinstance(loss, str) and loss == "auto"
        if isinstance(metrics, str) and metrics == "auto":
            metrics = head.metrics() if automatic else []  # for None, Keras keeps those from before
        loss = head.fitting_loss(head.loss() if automatic else loss)
        metrics, weighted_metrics = (head.fitting_metrics(m) for m in (metrics, weighted_metrics))
        super().compile(
            optimizer,
            loss=loss,
            loss_weights=loss_weights,
            metrics=metrics,
            weighted_metrics=weighted_metrics,
            **options,
        )

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles with exactly what a file holds, whatever `compile` would make of it."""
        super().compile(**keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)

    # ---------------------------------------------------------------- features

    @property
    def feature_info(self) -> list[Feature]:
        """A `Feature` for each block, in the order of the forward pass.

        A pyramid of maps, the last one of every stride: `{f.stride: f.name for f in model.feature_info}.values()`.
        """
        found = []
        for name in self._blocks:
            height, width = self._grid(name)
            stride = self.cfg.image_size[0] // height
            channels = self.get_layer(name).output.shape[-1]
            found.append(Feature(name=name, channels=channels, stride=stride, height=height, width=width))
        return found

    def features(self, which: Sequence[int | str] | None = None, maps: bool = False) -> keras.Model:
        """A model of intermediate results, sharing this model's weights.

        Args:
            which: block numbers in the order of the forward pass (negative ones count from the end), or layer names
                such as `"block_3"`, `"stage_2_block_0"`, `"norm"`; every block by default.
            maps: whether tokens (B,N,D) become a feature map (B,h,w,D), without the tokens that stand before the
                patches (class, distillation, registers).

        Returns:
            A `keras.Model` from images (B,H,W,C) to a list of the chosen layers' outputs.

        Raises:
            ValueError: no such block or layer, a layer after the pooling that has no map, or a model that Keras has
                quantized.
        """
        refuse_quantized(self)
        outputs = []
        for name in map(self._name, self._blocks if which is None else which):
            x = self.get_layer(name).output
            if maps and len(x.shape) != 4:
                height, width = self._grid(name)
                x = ops.reshape(x[:, x.shape[1] - height * width :], (-1, height, width, x.shape[-1]))
            outputs.append(x)
        return keras.Model(self.input, outputs, name=f"{self.name}_features")

    @property
    def _blocks(self) -> list[str]:
        return [layer.name for layer in self.layers if layer_names.BLOCK.fullmatch(layer.name)]

    def _name(self, key: int | str) -> str:
        """The layer that a block number or a layer name means."""
        blocks = self._blocks
        if isinstance(key, int) and -len(blocks) <= key < len(blocks):
            return blocks[key]
        if any(layer.name == key for layer in self.layers):
            return str(key)
        raise ValueError(
            f"No block or layer {key!r}: {self.name} has blocks 0 to {len(blocks) - 1}, named {', '.join(blocks)}."
        )

    def _grid(self, name: str) -> tuple[int, int]:
        """Height and width of a layer's map. Tokens have those of the last map before them, and end with its pixels."""
        grid = self.cfg.image_size
        for layer in self.layers:
            shape = layer.output.shape
            if len(shape) == 4:
                grid = shape[1:3]
            if layer.name == name:
                break
        if len(shape) < 3 or (len(shape) == 3 and shape[1] < math.prod(grid)):
            raise ValueError(f"Layer {name!r} of {self.name} gives {shape}, which is no feature map: choose a block.")
        return grid

    # ---------------------------------------------------------------- fine-tuning

    def reset_head(self, num_classes: int) -> Self:
        """A model like this one with a new head for other classes; this one stays as it is.

        Everything but the head keeps its weights, and the new model the preprocessing, the dtype and what is frozen;
        adapters are merged. It has no class names and is not compiled.

        Args:
            num_classes: K, classes of the new, randomly initialised head; 0 for none, which gives the pooled features.

        Returns:
            A `VisionModel` from images (B,H,W,C) to logits (B,K).

        Raises:
            ValueError: a negative number of classes, or a model that Keras has quantized.
        """
        frozen = [name for name in self._frozen if not layer_names.in_head(name)]
        return self._rebuilt(
            lambda path: not layer_names.in_head(path), num_classes=num_classes, class_names=None, frozen=frozen
        )

    def resized(self, image_size: int | tuple[int, int]) -> Self:
        """A model like this one for images of another size, with position embeddings resampled; this one stays.

        Args:
            image_size: pixels, or (height, width).

        Returns:
            A `VisionModel` from images of that size. It is not compiled; adapters are merged.

        Raises:
            ValueError: a size that the model cannot take, weights that hold for one size only, as those of dense
                layers across tokens do, or a model that Keras has quantized.
        """
        return self._rebuilt(lambda path: True, image_size=image_size)

    def freeze(self, up_to: int | str | None = None) -> None:
        """Keeps the layers from the image up to one of them from training, and lets those behind it train.

        A frozen batch normalisation uses its statistics and does not update them. Saved models stay frozen. Compile
        afterwards: Keras fixes what trains when a model is compiled and first fitted.

        Args:
            up_to: a layer's name or a block number (negative ones count from the end), inclusive, in the order of the
                forward pass; everything but the head by default.

        Raises:
            ValueError: no such block or layer; or `enable_lora` was called, which has frozen what it does not adapt.
        """
        self._refuse_lora("freeze")
        names = [layer.name for layer in self.layers]
        if up_to is None:
            frozen = [name for name in names if not layer_names.in_head(name)]
        else:
            frozen = names[: names.index(self._name(up_to)) + 1]
        self._train_everything()
        for name in frozen:
            self.get_layer(name).trainable = False

    def unfreeze(self) -> None:
        """Lets every layer train. Compile afterwards.

        Raises:
            ValueError: `enable_lora` was called: `merge_lora` gives a model that trains as a whole.
        """
        self._refuse_lora("unfreeze")
        self._train_everything()

    def _train_everything(self) -> None:
        self.trainable = False  # TensorFlow passes nothing on to the layers when the model's own value stays the same
        self.trainable = True

    def enable_lora(self, rank: int, pattern: str = "*/attention/*", alpha: float | None = None) -> None:
        """Trains low-rank changes of the blocks' dense layers instead of their kernels. LoRA, arXiv 2106.09685.

        A kernel becomes kernel + alpha / rank * a b, with a (I,rank) random and b (rank,O) zero at first. These and
        the head train, all else is frozen. A file that `save` writes holds the merged kernels of a plain model that
        trains as a whole, from a new optimizer. Compile afterwards.

        Args:
            rank: of the changes, a positive integer; 4 to 16 are usual.
            pattern: shell pattern of dense layers in the blocks; by default those of attention. `"*"` means all.
            alpha: how strongly the changes count, over `rank`; equal to `rank` by default.

        Raises:
            ValueError: an impossible rank, no such layer, or adapters that are there already.
        """
        self._refuse_lora("enable_lora")
        rank = whole("rank", rank)
        dense = {
            layer.kernel.path.removesuffix("/kernel"): layer
            for block in self._blocks
            for layer in flatten_layers(self.get_layer(block))
            if isinstance(layer, keras.layers.Dense)
        }
        chosen = fnmatch.filter(dense, pattern)
        if not chosen:
            raise ValueError(f"No dense layer of {self.name} matches {pattern!r}. It has {', '.join(sorted(dense))}.")
        self.freeze()
        for path in chosen:
            layer = dense[path]
            with contextlib.ExitStack() as scopes:  # the new variables get the layer's whole path
                for part in path.split("/")[:-1]:
                    scopes.enter_context(keras.name_scope(part))
                layer.enable_lora(rank, lora_alpha=alpha)
            layer.lora_kernel_a.trainable = layer.lora_kernel_b.trainable = True  # in a layer that is frozen

    def merge_lora(self) -> Self:
        """A plain model in which the changes that `enable_lora` trained are part of the kernels; this one stays.

        Returns:
            A `VisionModel` that computes the same and trains as a whole. It is not compiled.

        Raises:
            ValueError: a model that Keras has quantized.
        """
        return self._rebuilt(lambda path: True)

    @property
    def _lora(self) -> list[Any]:
        """The dense layers that `enable_lora` changed."""
        return [layer for layer in flatten_layers(self) if getattr(layer, "lora_enabled", False)]

    @property
    def _frozen(self) -> list[str]:
        """Paths of the outermost layers whose weights do not train, for a model that trains; none with adapters."""
        if not self.trainable or self._lora:
            return []
        frozen = [layer.name for layer in self.layers if layer.weights and not layer.trainable]
        for layer in self.layers:
            if layer.trainable:
                inside = flatten_layers(layer, include_self=False)
                paths = {sub.path for sub in inside if sub.weights and not sub.trainable}
                frozen += sorted(p for p in paths if not any(p.startswith(f"{other}/") for other in paths))
        return frozen

    def _refuse_lora(self, method: str) -> None:
        if self._lora:
            raise ValueError(
                f"{self.name} has LoRA adapters, so {method} does not apply: take model.merge_lora() first."
            )

    def _rebuilt(self, keep: Callable[[str], bool], **changes: Any) -> Self:
        """A model with a changed configuration and, where `keep` says so of their path, this one's merged weights."""
        refuse_quantized(self)
        values = {v.path: v for v in self.weights}
        for layer in self._lora:
            kernel = next(v for v in layer.weights if v.name == "kernel")
            change = ops.matmul(layer.lora_kernel_a, layer.lora_kernel_b)
            values[kernel.path] = kernel + layer.lora_alpha / layer.lora_rank * change
        with values_later():
            model = type(self).from_config({**self.get_config(), **changes})
        for variable in model.weights:
            if keep(variable.path):
                value = self._at_size(model, variable, values[variable.path])
                set_value(variable, ops.copy(value))  # JAX would share the array, and training deletes it
        initialize(model)
        return model

    def _at_size(self, model: Any, variable: Any, value: Any) -> Any:
        """The value of one of our variables for a model like this one, whose images may be of another size."""
        if tuple(value.shape) == tuple(variable.shape):
            return value
        if variable.path != layer_names.POSITION_TABLE:
            raise ValueError(
                f"{self.name} is for images of {self.cfg.image_size} pixels only: at {model.cfg.image_size} its "
                f"{variable.path} would be {tuple(variable.shape)}, and it is {tuple(value.shape)}."
            )
        old, new = ([side // m.size_multiple(m.cfg) for side in m.cfg.image_size] for m in (self, model))
        return resample_positions(ops.convert_to_numpy(value), new, value.shape[1] - math.prod(old), old)

    # ---------------------------------------------------------------- saving

    def save(
        self, filepath: str | os.PathLike[str], overwrite: bool = True, zipped: bool | None = None, **kwargs: Any
    ) -> None:
        """Writes a `.keras` file, as `keras.Model.save` does, but whole or not at all; see `keras_vits.load`.

        Args:
            filepath: of the file; its folder is made if it does not exist.
            overwrite: whether it may replace another file; otherwise Keras asks on the terminal.
            zipped: see `keras.Model.save`.
            **kwargs: further arguments of `keras.Model.save`.

        Raises:
            ValueError: another kind of file: Keras would write its legacy `.h5`, and cannot read that again; a folder
                that cannot be written; or a model that Keras has quantized, which `keras_vits.load` does not open.
        """
        if str(filepath).endswith((".h5", ".hdf5")):
            raise ValueError(f"Models of keras_vits are saved as .keras files; received {filepath}.")
        refuse_quantized(self)
        name = str(filepath)
        one_file = name.endswith(".keras") and zipped is not False and not name.startswith("hf://")
        asks = not overwrite and os.path.lexists(filepath)  # Keras does
        target = writing(pathlib.Path(filepath)) if one_file and not asks else contextlib.nullcontext(filepath)
        with without_tensorflow(), temporary_files(), target as place:
            super().save(place, overwrite=overwrite, zipped=zipped, **kwargs)

    def get_config(self) -> dict[str, Any]:
        if writes_legacy_file():  # by keras.saving.save_model, of this model or of one that has it as a layer
            raise ValueError(f"Models of keras_vits are saved as .keras files; received a legacy .h5 for {self.name}.")
        with without_tensorflow():
            dtype = keras.dtype_policies.serialize(self.dtype_policy)
        return {
            **dataclasses.asdict(self.cfg),
            "name": self.name,
            "dtype": dtype,
            "trainable": self.trainable,
            "preprocessing": dataclasses.asdict(self.preprocessing),
            "class_names": self.class_names,
            "frozen": self._frozen,
            "remat": self.remat,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None) -> Self:
        config = dict(config)
        if isinstance(config.get("dtype"), dict):
            config["dtype"] = keras.dtype_policies.deserialize(config["dtype"])
        return cls(**config)


def _rematerialized(layer: Any) -> Callable[..., Any]:
    """Calls a layer in training so that only its inputs are kept, and the backward pass computes the rest again.

    Its variables go in as tensors, and its state (statistics, seeds) comes out as tensors: the second run sees what the
    first saw, draws the same random numbers and updates nothing. `keras.RematScope` does not see to that.
    """
    state = [v for v in layer.variables if v.name in STATE]
    fixed = [v for v in layer.variables if v.name not in STATE]

    def run(values: Sequence[Any], *inputs: Any) -> tuple[Any, list[Any]]:
        mapping = list(zip(state + fixed, values, strict=True))
        with keras.StatelessScope(state_mapping=mapping) as scope:
            outputs = layer(*inputs, training=True)
        return outputs, [scope.get_current_value(v) for v in state]

    def call(*inputs: Any) -> Any:
        # `v[...]` is a tensor in the variable's memory; the state's must outlive that, as PyTorch assigns in place.
        values = [ops.copy(v) for v in state] + [v[...] for v in fixed]
        outputs, after = keras.remat(run)(values, *inputs)
        for variable, value in zip(state, after, strict=True):
            variable.assign(value)
        return outputs

    return call


def _check_count(name: str, variables: Sequence[Any]) -> None:
    """Refuses a model of absurd size before memory is asked for."""
    if (count := sum(math.prod(v.shape) for v in variables)) > MAX_PARAMETERS:
        raise ValueError(
            f"{name} would have {count:,} parameters, and the limit is {MAX_PARAMETERS:,}: give smaller "
            "hyper-parameters."
        )


def _alike(layer: Any, other: Any) -> bool:
    return type(layer) is type(other) and (
        not isinstance(layer, keras.Layer) or layer.get_config() == other.get_config()
    )


def _per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """The values, or their average for every channel if the numbers of channels differ."""
    return values if len(values) == channels else (sum(values) / len(values),) * channels


@contextlib.contextmanager
def _policy(dtype: Any) -> Iterator[None]:
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
