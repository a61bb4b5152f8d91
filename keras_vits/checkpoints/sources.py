"""What a checkpoint's source says of it beside the tensors, in the `config.json` of timm and of transformers.

No tensor's shape reveals the number of heads, the activation, the pooling or an epsilon: they are read from here, and a
setting that is not known is refused. The structures below are the schemas of the files; other fields are ignored.
"""

import dataclasses
import math
import pathlib
import typing
from collections.abc import Mapping
from typing import Any

import msgspec

from keras_vits.checkpoints.files import parsed
from keras_vits.preprocess import INTERPOLATIONS

FIELDS = {  # of Preprocessing <- of timm
    "mean": "mean",
    "std": "std",
    "interpolation": "interpolation",
    "crop": "crop_pct",
    "crop_mode": "crop_mode",
}
SETTINGS = {  # of a Config <- of transformers, settings that no tensor's shape reveals
    "heads": "num_attention_heads",
    "epsilon": "layer_norm_eps",
    "activation": "hidden_act",
    "qkv_bias": "qkv_bias",
    "stride": "output_stride",
    "patch_size": "patch_size",
}
FIXED = {"epsilon": 1e-5, "activation": "silu", "stride": 32}  # of the families that have no such setting
VIT = dict(heads=12, epsilon=1e-12, activation="gelu", qkv_bias=True)
MOBILEVIT = dict(epsilon=1e-5, activation="silu", stride=32, patch_size=2)
MODEL_TYPES: dict[str, dict[str, Any]] = {  # of transformers -> what a config.json means that leaves it out
    "vit": VIT,
    "deit": VIT,
    "vit_mae": VIT,
    "vit_msn": VIT | dict(epsilon=1e-6),
    "dinov2": VIT | dict(epsilon=1e-6),
    "dinov2_with_registers": VIT | dict(epsilon=1e-6),
    "mobilevit": MOBILEVIT | dict(heads=4, qkv_bias=True),
    "mobilevitv2": MOBILEVIT,
}
ACTIVATIONS = {  # of both -> ours
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python": "gelu",
    "swish": "silu",
}
SAME_ACTIVATIONS = (  # those that mean the same everywhere; `leaky_relu` has another slope in Keras than in PyTorch
    *("gelu", "gelu_tanh", "quick_gelu", "silu", "relu", "relu6", "elu", "selu", "tanh", "sigmoid", "mish"),
)
MODEL_ARGS = {  # of timm -> of a Config
    "img_size": "image_size",
    "in_chans": "in_channels",
    "num_classes": "num_classes",
    "patch_size": "patch_size",
    "embed_dim": "width",
    "depth": "depth",
    "num_heads": "heads",
    "qkv_bias": "qkv_bias",
    "qk_norm": "qk_norm",
    "init_values": "layer_scale",
    "class_token": "class_token",
    "reg_tokens": "registers",
    "pre_norm": "norm_pre",
    "act_layer": "activation",
    "norm_layer": "epsilon",
    "pos_embed": "position",
}
FOUND_OTHERWISE = ("img_size", "in_chans", "num_classes")  # MODEL_ARGS that tensors and pretrained_cfg tell better
OF_VIT = ("act_layer", "norm_layer", "pos_embed")  # MODEL_ARGS whose values mean something else in other families
# What the shapes of the tensors tell: a model of another one does not load, and the tensors are named.
IN_SHAPES = ("depths", "head_widths", "mlp_ratio", "num_blocks", "num_features", "stem_chs", "widths")
# What changes training or how a model is made, but not what it computes for images of one size.
WITHOUT_EFFECT = (
    *("drop_rate", "drop_path_rate", "proj_drop_rate", "attn_drop_rate", "pos_drop_rate", "patch_drop_rate"),
    *("weight_init", "fix_init", "dynamic_img_size", "strict_img_size"),
)
AS_OURS = {  # arguments of timm's that ours know in one form only
    "proj_bias": True,
    "scale_attn_norm": False,
    "scale_mlp_norm": False,
    "pool_include_prefix": False,
    "dynamic_img_pad": False,
}
POOLS = {"token": "token", "avg": "mean"}  # of timm -> of ViT
POSITIONS = {"learn": "learned", "none": "none", "": "none"}  # of timm -> of ViT
EPSILONS = {"layernorm": 1e-6, None: 1e-6}  # of timm's norms of a ViT by their names
LARGEST_SIDE = 4096  # pixels of an image that a configuration may ask for: five times the largest that is published
Side = typing.Annotated[int, msgspec.Meta(ge=1, le=LARGEST_SIDE)]
# Of a square, or (height, width), checked by `_check_sides`: msgspec 0.22 loses the tuple's length beside a limit.
Sides = int | tuple[int, int]
Positive = typing.Annotated[int, msgspec.Meta(ge=1, le=2**20)]
Count = typing.Annotated[int, msgspec.Meta(ge=0, le=2**20)]
Name = typing.Annotated[str, msgspec.Meta(max_length=1000)]
Epsilon = typing.Annotated[float, msgspec.Meta(gt=0, lt=1)]
Fractions = typing.Annotated[tuple[float, ...], msgspec.Meta(min_length=1, max_length=1024)]


class ModelArgs(typing.TypedDict, total=False):
    """Those of timm's arguments that are translated; others stand beside them."""

    img_size: Sides | None
    in_chans: Count | None
    num_classes: Count | None
    patch_size: Sides
    embed_dim: Positive
    depth: Positive
    num_heads: Positive
    qkv_bias: bool
    qk_norm: bool
    init_values: float | None
    class_token: bool
    reg_tokens: Count
    pre_norm: bool
    act_layer: Name | None
    norm_layer: Name | None
    pos_embed: Name
    mlp_ratio: float | tuple[float, ...]
    no_embed_class: bool
    global_pool: Name | None
    fc_norm: bool | None
    final_norm: bool


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """timm's `pretrained_cfg`."""

    input_size: tuple[Count, Side, Side] | None = None  # channels, height, width
    mean: Fractions | None = None
    std: Fractions | None = None
    interpolation: Name | None = None
    crop_pct: float | None = None
    crop_mode: Name | None = None
    global_pool: Name | None = None
    tag: Name | None = None
    license: Name | None = None
    num_classes: int | None = None
    label_names: list[str] | dict[str, str] | None = None


@dataclasses.dataclass(frozen=True)
class Timm:
    """timm's `config.json`; also what a file that lies alone says, which is nothing."""

    architecture: Name | None = None
    global_pool: Name | None = None
    label_names: list[str] | dict[str, str] | None = None
    model_args: dict[str, Any] | None = None
    pretrained_cfg: Pretrained | None = None

    format: typing.ClassVar[str] = "timm"

    @property
    def published(self) -> Pretrained:
        """The `pretrained_cfg`, of `None`s where there is none."""
        return self.pretrained_cfg or Pretrained()

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) in pixels that the checkpoint was made for, or `None`."""
        size, given = self.published.input_size, (self.model_args or {}).get("img_size")
        if given is not None:  # timm makes the model of this size, whatever it was published for
            return (given, given) if isinstance(given, int) else (given[0], given[1])
        return (size[1], size[2]) if size else None

    def class_names(self, classes: int) -> list[str] | None:
        """K names, or `None` if not every class is named."""
        names = self.label_names or self.published.label_names or []
        if isinstance(names, dict):
            names = [names.get(str(i), "") for i in range(classes)] if len(names) == classes else []
        return names if len(names) == classes and all(names) else None

    def preprocessing(self, file: pathlib.Path) -> dict[str, Any]:
        """Fields of `Preprocessing`."""
        published = {ours: getattr(self.published, theirs) for ours, theirs in FIELDS.items()}
        return {name: value for name, value in published.items() if value is not None}

    def settings(self, cls: type[Any], variant: Mapping[str, Any], source: Any, classes: int = 0) -> dict[str, Any]:
        """Fields of a family's Config, from `model_args` and `global_pool`.

        Args:
            cls: the family.
            variant: hyper-parameters of the architecture.
            source: where the checkpoint came from, for messages.
            classes: of the model that is made; 0 has no head.

        Raises:
            ValueError: an argument that the family cannot have, by its name.
        """
        args = {name: value for name, value in (self.model_args or {}).items() if name not in WITHOUT_EFFECT}
        fields = {field.name: field.default for field in dataclasses.fields(cls.Config)}
        now = {name: variant.get(name, default) for name, default in fields.items()}
        found = self._pooling(args, now, cls.__name__, source)
        if {"width", "mlp_hidden"} <= fields.keys() and {"mlp_ratio", "embed_dim"} & args.keys():
            halves = 2 if now.get("gated") else 1  # timm counts both of a gated perceptron
            ratio = args.pop("mlp_ratio", halves * now["mlp_hidden"] / now["width"])
            if isinstance(ratio, float | int):
                found["mlp_hidden"] = int(args.get("embed_dim", now["width"]) * ratio) // halves
        if "no_embed_class" in args and "prefix_position" in fields:
            found["prefix_position"] = not args.pop("no_embed_class")
        for theirs, ours in MODEL_ARGS.items():
            foreign = theirs in OF_VIT and "pool" not in fields
            if theirs in args and not foreign and (theirs in FOUND_OTHERWISE or ours in fields):
                value = args.pop(theirs)
                if theirs not in FOUND_OTHERWISE:
                    found[ours] = _translated(theirs, value, cls.__name__, source)
        told = lambda name: name in IN_SHAPES or args[name] is None or (name in AS_OURS and args[name] == AS_OURS[name])
        if unknown := sorted(name for name in args if not told(name)):
            raise ValueError(
                f"{source} has model_args that {cls.__name__} does not know: {', '.join(unknown)}. What they "
                "change would be lost: give the weights as a .safetensors file, and what fits them to create."
            )
        return found

    def _pooling(self, args: dict[str, Any], now: Mapping[str, Any], family: str, source: Any) -> dict[str, Any]:
        """`pool` and `norm`, and takes what tells them from the arguments."""
        pool = args.pop("global_pool", self.global_pool or self.published.global_pool)
        normed_after, normed = args.pop("fc_norm", None), args.pop("final_norm", None)
        if "pool" not in now:
            if normed_after is not None or normed is False or pool not in (None, "avg"):
                told = dict(global_pool=pool, fc_norm=normed_after, final_norm=normed)
                listed = ", ".join(f"{name} {value!r}" for name, value in told.items() if value is not None)
                raise ValueError(f"{source} has model_args that {family} cannot have: {listed}.")
            return {}
        if pool is not None and pool not in POOLS:
            raise ValueError(f"{source} has global_pool {pool!r}; {family} has {' and '.join(POOLS)} only.")
        found = {} if pool is None else {"pool": POOLS[pool]}
        pool = found.get("pool", now["pool"])
        if normed is False or (now["norm"] == "none" and normed is None):
            found["norm"] = "none"
        elif normed_after is not None or now["norm"] == "none" or pool != now["pool"]:
            after = pool == "mean" if normed_after is None else normed_after
            found["norm"] = "pooled" if after else "tokens"
        return found


def _translated(name: str, value: Any, family: str, source: Any) -> Any:
    """An argument of timm's as a field of a Config."""
    if name == "act_layer":
        value = "gelu" if value is None else value.lower()
        if ACTIVATIONS.get(value, value) in SAME_ACTIVATIONS:
            return ACTIVATIONS.get(value, value)
    elif name == "norm_layer":
        if value in EPSILONS:
            return EPSILONS[value]
    elif name == "pos_embed":
        if value in POSITIONS:
            return POSITIONS[value]
    elif name == "patch_size":
        if isinstance(value, int) or value[0] == value[1]:
            return value if isinstance(value, int) else value[0]
    else:
        return (value or 0.0) if name == "init_values" else value
    raise ValueError(f"{source} has model_args that {family} does not know: {name} {value!r}.")


@dataclasses.dataclass(frozen=True)
class Transformers:
    """transformers' `config.json`."""

    model_type: Name
    image_size: Sides | None = None  # pixels, or (height, width)
    patch_size: Sides | None = None
    num_attention_heads: Positive | None = None
    layer_norm_eps: Epsilon | None = None
    hidden_act: Name | None = None
    qkv_bias: bool | None = None
    output_stride: int | None = None
    use_swiglu_ffn: bool | None = None
    id2label: dict[str, str] | None = None

    format: typing.ClassVar[str] = "transformers"
    architecture: typing.ClassVar[None] = None

    @property
    def published(self) -> Pretrained:
        """timm's; of `None`s."""
        return Pretrained()

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) in pixels that the checkpoint was made for, or `None`."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    def class_names(self, classes: int) -> list[str] | None:
        """K names, or `None` if not every class is named, or transformers has made the names up."""
        given = self.id2label or {}
        names = [given.get(str(i), "") for i in range(classes)] if len(given) == classes else []
        return names if all(names) and names and names[0] != "LABEL_0" else None

    def settings(self, cls: type[Any], variant: Mapping[str, Any], source: Any, classes: int = 0) -> dict[str, Any]:
        """Fields of a family's Config; arguments and errors as of `Timm.settings`."""
        if self.model_type not in MODEL_TYPES:
            raise ValueError(
                f"{source} has the model_type {self.model_type!r}, which is not among those whose settings are known: "
                f"{', '.join(MODEL_TYPES)}."
            )
        values = {ours: getattr(self, theirs) for ours, theirs in SETTINGS.items()}
        given = MODEL_TYPES[self.model_type] | {name: value for name, value in values.items() if value is not None}
        if isinstance(patch := given.get("patch_size"), tuple):
            if patch[0] != patch[1]:
                raise ValueError(f"{source} has patch_size {patch!r}; {cls.__name__} has square patches only.")
            given["patch_size"] = patch[0]
        if self.use_swiglu_ffn:
            given["activation"] = "silu"  # whatever hidden_act says
        else:
            given["activation"] = ACTIVATIONS.get(given["activation"], given["activation"])
        fields = {field.name for field in dataclasses.fields(cls.Config)}
        for name, fixed in FIXED.items():
            if name not in fields and given.get(name, fixed) != fixed:
                raise ValueError(
                    f"{source} has {SETTINGS[name]} {given[name]!r}; {cls.__name__} computes with {fixed!r} only."
                )
        if given["activation"] not in SAME_ACTIVATIONS:
            raise ValueError(f"{source} has hidden_act {given['activation']!r}, which {cls.__name__} does not know.")
        if classes and self.model_type.startswith("dinov2") and "pool" in fields:
            given["pool"] = "token_and_mean"  # what the classifier of transformers reads; without one, the class token
        return {name: value for name, value in given.items() if name in fields}

    def preprocessing(self, file: pathlib.Path) -> dict[str, Any]:
        """Fields of `Preprocessing`, from the preprocessor_config.json beside the weights; {} if there is none."""
        return processor_fields(parsed(file), self.model_type, file) if file.is_file() else {}


@dataclasses.dataclass(frozen=True)
class Processor:
    """transformers' `preprocessor_config.json`."""

    size: int | dict[str, int | None] | None = None
    crop_size: int | dict[str, int | None] | None = None
    do_resize: bool | None = None
    do_rescale: bool | None = None
    do_center_crop: bool | None = None
    do_normalize: bool | None = None
    do_flip_channel_order: bool | None = None
    rescale_factor: float | None = None
    resample: int | None = None
    image_mean: Fractions | None = None
    image_std: Fractions | None = None


def read(config: Mapping[str, Any], path: pathlib.Path) -> Timm | Transformers:
    """A checkpoint's `config.json`, {} for a file that lies alone, in the structure of whoever wrote it."""
    if "model_type" in config and "architecture" not in config:
        of_transformers: Transformers = as_structure(config, Transformers, path)
        _check_sides(path, image_size=of_transformers.image_size, patch_size=of_transformers.patch_size)
        return of_transformers
    if "architecture" in config and "pretrained_cfg" not in config:  # as older versions of timm wrote it
        config = {"label_names": config.get("labels"), **config, "pretrained_cfg": config}
    of_timm: Timm = as_structure(config, Timm, path)
    if of_timm.model_args:
        known = as_structure(of_timm.model_args, ModelArgs, path, "model_args.")
        _check_sides(path, **{f"model_args.{name}": known.get(name) for name in ("img_size", "patch_size")})
        of_timm = dataclasses.replace(of_timm, model_args={**of_timm.model_args, **known})
    return of_timm


def _check_sides(path: Any, **sizes: int | tuple[int, ...] | Mapping[str, int | None] | None) -> None:
    """Refuses a size in pixels that no image has, before memory is asked for."""
    for field, size in sizes.items():
        sides = size.values() if isinstance(size, Mapping) else size if isinstance(size, tuple) else (size,)
        if not all(side is None or 1 <= side <= LARGEST_SIDE for side in sides):
            raise ValueError(f"{path} has an impossible {field}: sides have 1 to {LARGEST_SIDE} pixels.")


def as_structure(given: Mapping[str, Any], kind: Any, path: pathlib.Path, inside: str = "") -> Any:
    """What a JSON file holds, as a dataclass; fields that it does not have are ignored.

    Raises:
        ValueError: a field has another type; file and field are named.
    """
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as e:
        reason, _, where = str(e).partition(" - at ")
        field = inside + where.strip("`").removeprefix("$.") or "one of its fields"
        reason = reason[:1].lower() + reason[1:].rstrip(".")
        raise ValueError(f"{path} has another type in {field}: {reason}.") from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply to be a configuration: download it again.") from None


def processor_fields(config: Mapping[str, Any], model_type: str, source: Any) -> dict[str, Any]:
    """Fields of `Preprocessing`, from what transformers' preprocessor_config.json holds."""
    processor = as_structure(config, Processor, source)
    _check_sides(source, size=processor.size, crop_size=processor.crop_size)
    given = lambda value, default: default if value is None else value
    mobile, stretched = model_type.startswith("mobilevit"), model_type in ("vit", "vit_mae", "vit_msn", "deit")
    square = lambda size: {"height": size, "width": size} if isinstance(size, int) else size or {}
    size = processor.size
    size = {"shortest_edge": size} if isinstance(size, int) and not stretched else square(size)
    size = {name: value for name, value in size.items() if value is not None}
    side = size.get("shortest_edge", size.get("height"))
    crops = processor.crop_size is not None or model_type not in ("vit", "vit_mae", "vit_msn")  # as their processors do
    cropped = given(processor.do_center_crop, crops)
    kept = square(processor.crop_size) if cropped else size
    resample = given(processor.resample, 3 if model_type.startswith(("deit", "dinov2")) else 2)
    if not (
        given(processor.do_resize, True)
        and given(processor.do_rescale, True)
        and math.isclose(given(processor.rescale_factor, 1 / 255), 1 / 255)
        and side
        and size.get("width", side) == side
        and size.keys() <= {"height", "width", "shortest_edge"}
        and kept.get("height") == kept.get("width")
        and 0 < (kept.get("height") or 0) <= side
        and 0 <= resample < len(INTERPOLATIONS)
    ):
        raise ValueError(f"{source} asks for steps that Preprocessing does not have: give another by `preprocessing=`.")
    crop = kept["height"] / side
    if math.floor(kept["height"] / crop) < side:  # so much for floating point
        crop = math.nextafter(crop, 0)
    normalized = given(processor.do_normalize, not mobile)
    if normalized and not (processor.image_mean and processor.image_std):
        raise ValueError(f"{source} normalises pictures and has no image_mean and image_std: give `preprocessing=`.")
    return dict(
        mean=processor.image_mean if normalized else (0.0, 0.0, 0.0),
        std=processor.image_std if normalized else (1.0, 1.0, 1.0),
        interpolation=("nearest", "lanczos", "bilinear", "bicubic")[resample],  # PIL's numbers
        crop=crop,
        crop_mode="center" if "shortest_edge" in size else "squash",
        channel_order="bgr" if given(processor.do_flip_channel_order, mobile) else "rgb",
    )
