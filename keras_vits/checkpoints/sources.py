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
}
FIXED = {"epsilon": 1e-5, "activation": "silu", "stride": 32}  # of the families that have no such setting
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "swish": "silu"}  # of both -> ours
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
}
FOUND_OTHERWISE = ("img_size", "in_chans", "num_classes")  # MODEL_ARGS that tensors and pretrained_cfg tell better
# What the shapes of the tensors tell: a model of another one does not load, and the tensors are named.
IN_SHAPES = ("blocks", "depths", "head_widths", "mlp_ratio", "num_blocks", "num_features", "stem_chs", "widths")
TRAINING_ARGS = ("drop_rate", "drop_path_rate", "proj_drop_rate", "attn_drop_rate", "pos_drop_rate", "patch_drop_rate")
POOLS = {"token": "token", "avg": "mean"}  # of timm -> of ViT


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """timm's `pretrained_cfg`."""

    input_size: tuple[int, ...] | None = None  # channels, height, width
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str | None = None
    crop_pct: float | None = None
    crop_mode: str | None = None
    tag: str | None = None
    license: str | None = None
    num_classes: int | None = None
    label_names: list[str] | None = None


@dataclasses.dataclass(frozen=True)
class Timm:
    """timm's `config.json`; also what a file that lies alone says, which is nothing."""

    architecture: str | None = None
    global_pool: str | None = None
    label_names: list[str] | None = None
    model_args: dict[str, Any] | None = None
    pretrained_cfg: Pretrained = Pretrained()

    format: typing.ClassVar[str] = "timm"

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) in pixels that the checkpoint was made for, or `None`."""
        size = self.pretrained_cfg.input_size
        return (size[1], size[2]) if size else None

    def class_names(self, classes: int) -> list[str] | None:
        """K names, or `None` if not every class is named."""
        names = self.label_names or self.pretrained_cfg.label_names or []
        return names if len(names) == classes and all(names) else None

    def preprocessing(self, file: pathlib.Path) -> dict[str, Any]:
        """Fields of `Preprocessing`."""
        published = {ours: getattr(self.pretrained_cfg, theirs) for ours, theirs in FIELDS.items()}
        return {name: value for name, value in published.items() if value is not None}

    def settings(self, cls: type[Any], variant: Mapping[str, Any], source: Any) -> dict[str, Any]:
        """Fields of a family's Config, from `model_args` and `global_pool`; `variant` has those of the architecture."""
        args = {name: value for name, value in (self.model_args or {}).items() if name not in TRAINING_ARGS}
        fields = {field.name: field.default for field in dataclasses.fields(cls.Config)}
        now = {name: variant.get(name, default) for name, default in fields.items()}
        found: dict[str, Any] = {}
        pool = args.pop("global_pool", None) or self.global_pool
        normed_after = args.pop("fc_norm", None)
        if "pool" in fields and (pool or normed_after is not None):
            if pool and pool not in POOLS:
                raise ValueError(f"{source} has global_pool {pool!r}; {cls.__name__} has {' and '.join(POOLS)} only.")
            found["pool"] = POOLS[pool] if pool else now["pool"]
            if normed_after is not None or (found["pool"] != now["pool"] and now["norm"] != "none"):
                after = found["pool"] == "mean" if normed_after is None else normed_after
                found["norm"] = "pooled" if after else "tokens"
        elif normed_after is not None or (pool and pool != "avg" and "global_pool" in (self.model_args or {})):
            raise ValueError(f"{source} has model_args that {cls.__name__} cannot have: global_pool {pool!r}.")
        if "mlp_ratio" in args and {"width", "mlp_hidden"} <= fields.keys() and not now.get("gated"):
            found["mlp_hidden"] = int(args.get("embed_dim", now["width"]) * args.pop("mlp_ratio"))
        if "no_embed_class" in args and "prefix_position" in fields:
            found["prefix_position"] = not args.pop("no_embed_class")
        for theirs, ours in MODEL_ARGS.items():
            if theirs in args and (theirs in FOUND_OTHERWISE or ours in fields):
                value = args.pop(theirs)
                if theirs not in FOUND_OTHERWISE:
                    found[ours] = value
        if isinstance(found.get("activation"), str):
            found["activation"] = ACTIVATIONS.get(found["activation"], found["activation"])
        if "layer_scale" in found:
            found["layer_scale"] = found["layer_scale"] or 0.0
        told = lambda name: name in IN_SHAPES or args[name] is None  # None: timm's own default
        if unknown := sorted(name for name in args if not told(name)):
            raise ValueError(
                f"{source} has model_args that {cls.__name__} does not know: {', '.join(unknown)}. What they "
                "change would be lost: give the weights as a .safetensors file, and what fits them to create."
            )
        return found


@dataclasses.dataclass(frozen=True)
class Transformers:
    """transformers' `config.json`."""

    model_type: str
    image_size: int | tuple[int, int] | None = None  # pixels, or (height, width)
    num_attention_heads: int | None = None
    layer_norm_eps: float | None = None
    hidden_act: str | None = None
    qkv_bias: bool | None = None
    output_stride: int | None = None
    use_swiglu_ffn: bool | None = None
    id2label: dict[str, str] | None = None

    format: typing.ClassVar[str] = "transformers"

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) in pixels that the checkpoint was made for, or `None`."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    def class_names(self, classes: int) -> list[str] | None:
        """K names, or `None` if not every class is named, or transformers has made the names up."""
        given = self.id2label or {}
        names = [given.get(str(i), "") for i in range(classes)]
        return names if len(given) == classes and all(names) and names[:1] != ["LABEL_0"] else None

    def settings(self, cls: type[Any], variant: Mapping[str, Any], source: Any) -> dict[str, Any]:
        """Fields of a family's Config."""
        values = {ours: getattr(self, theirs) for ours, theirs in SETTINGS.items()}
        given = {name: value for name, value in values.items() if value is not None}
        if self.use_swiglu_ffn:
            given["activation"] = "silu"  # whatever hidden_act says
        elif "activation" in given:
            given["activation"] = ACTIVATIONS.get(given["activation"], given["activation"])
        fields = {field.name for field in dataclasses.fields(cls.Config)}
        for name, fixed in FIXED.items():
            if name not in fields and given.get(name, fixed) != fixed:
                raise ValueError(
                    f"{source} has {SETTINGS[name]} {given[name]!r}; {cls.__name__} computes with {fixed!r} only."
                )
        return {name: value for name, value in given.items() if name in fields}

    def preprocessing(self, file: pathlib.Path) -> dict[str, Any]:
        """Fields of `Preprocessing`, from the preprocessor_config.json beside the weights; {} if there is none."""
        return processor_fields(parsed(file), self.model_type, file) if file.is_file() else {}


@dataclasses.dataclass(frozen=True)
class Processor:
    """transformers' `preprocessor_config.json`."""

    size: int | dict[str, int] | None = None
    crop_size: int | dict[str, int] | None = None
    do_resize: bool | None = None
    do_rescale: bool | None = None
    do_center_crop: bool | None = None
    do_normalize: bool | None = None
    do_flip_channel_order: bool | None = None
    rescale_factor: float = 1 / 255
    resample: int = 2
    image_mean: tuple[float, ...] | None = None
    image_std: tuple[float, ...] | None = None


def read(config: Mapping[str, Any], path: pathlib.Path) -> Timm | Transformers:
    """A checkpoint's `config.json`, {} for a file that lies alone, in the structure of whoever wrote it."""
    return as_structure(config, Transformers if "model_type" in config and "architecture" not in config else Timm, path)


def as_structure(given: Mapping[str, Any], kind: type, path: pathlib.Path) -> Any:
    """What a JSON file holds, as a dataclass; fields that it does not have are ignored.

    Raises:
        ValueError: a field has another type; file and field are named.
    """
    import msgspec

    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as e:
        reason, _, where = str(e).partition(" - at ")
        field = where.strip("`").removeprefix("$.") or "one of its fields"
        raise ValueError(f"{path} has another type in {field}: {reason.rstrip('.').lower()}.") from None


def processor_fields(config: Mapping[str, Any], model_type: str, source: Any) -> dict[str, Any]:
    """Fields of `Preprocessing`, from what transformers' preprocessor_config.json holds."""
    processor = as_structure(config, Processor, source)
    given = lambda value, default: default if value is None else value
    mobile, stretched = model_type.startswith("mobilevit"), model_type in ("vit", "vit_mae", "vit_msn", "deit")
    square = lambda size: {"height": size, "width": size} if isinstance(size, int) else size or {}
    size = processor.size
    size = {"shortest_edge": size} if isinstance(size, int) and not stretched else square(size)
    side = size.get("shortest_edge", size.get("height"))
    cropped = given(processor.do_center_crop, processor.crop_size is not None)
    kept = square(processor.crop_size) if cropped else size
    if not (
        given(processor.do_resize, True)
        and given(processor.do_rescale, True)
        and math.isclose(processor.rescale_factor, 1 / 255)
        and side
        and size.get("width", side) == side
        and kept.get("height") == kept.get("width")
        and 0 < kept.get("height", 0) <= side
        and processor.resample < len(INTERPOLATIONS)
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
        interpolation=("nearest", "lanczos", "bilinear", "bicubic")[processor.resample],  # PIL's numbers
        crop=crop,
        crop_mode="center" if "shortest_edge" in size else "squash",
        channel_order="bgr" if given(processor.do_flip_channel_order, mobile) else "rgb",
    )
