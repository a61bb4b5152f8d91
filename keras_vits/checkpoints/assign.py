"""Published weights into a model: a family's table maps layers, this file derives the tensors. All or nothing.

A table (`VisionModel.names["timm"]`) has one row for a layer, our name: the source's name, where `{i}` is a number and
`{i+1}`, on the right side, the next one. The longest row that a weight's path begins with wins, and names below it are
taken as equal. The right side may also be

    a tuple of names    their tensors are concatenated along the outputs (separate q, k, v into one qkv)
    a list of names     the first that the file has
    a function          (take, model, **numbers) -> array in our layout; `take(name)` gives a source tensor, and
                        `take.image_size` is the (height, width) that the checkpoint was made for, or None
    None                our layer keeps its initial value

The row `None: (name, ...)` lists layers of the source that are knowingly ignored, and the row `"": (name, ...)` what a
file may put before its names.
"""

import dataclasses
import json
import math
import pathlib
import re

import numpy as np

from keras_vits._util.keras_private import initialize, set_value, values_later
from keras_vits.checkpoints import catalogue as checkpoints
from keras_vits.models import _registry as registry
from keras_vits.preprocess import INTERPOLATIONS

LEAVES = {  # of Keras -> of PyTorch; a name that is not here is the same in both
    "kernel": "weight",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
FIELDS = {
    "mean": "mean",
    "std": "std",
    "interpolation": "interpolation",
    "crop": "crop_pct",
    "crop_mode": "crop_mode",
}  # of Preprocessing <- of timm
SETTINGS = {  # of a Config <- of transformers, what no tensor's shape tells
    "heads": "num_attention_heads",
    "epsilon": "layer_norm_eps",
    "activation": "hidden_act",
    "qkv_bias": "qkv_bias",
    "stride": "output_stride",
}
FIXED = {"epsilon": 1e-5, "activation": "silu", "stride": 32}  # of the families that have no such setting
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "swish": "silu"}  # of transformers -> ours


def load_weights(model, source, *, format="timm", skip=(), allow_pickle=False):
    """Gives a model published weights. Either every weight is set, or the model stays as it is.

    Args:
        model: a `VisionModel`.
        source: a Hugging Face hub id (`"timm/mobilevit_xs.cvnets_in1k"`), a local folder with `config.json` and
            `model.safetensors`, or a file.
        format: whose names the file uses, a key of the family's `names`. What no tensor's shape tells is the model's:
            those of transformers have a LayerNorm `epsilon` of 1e-12 (DINOv2's 1e-6), which `create` reads from there.
        skip: names of our layers that keep their weights, e.g. `("head",)`.
        allow_pickle: whether a `.pt` or `.pth` file may be read, by PyTorch with `weights_only=True`.

    Returns:
        The model.

    Raises:
        ValueError: the file cannot be read, or does not fit: every tensor that is missing, left over or of another
            shape is named.
    """
    file, config = _locate(source)
    assign(model, _read(file, allow_pickle), source, format, skip, _image_size(config))
    checkpoints.name_license(source, config)
    return model


def create_from_checkpoint(name, weights, overrides):
    """A model with the weights, classes, image size and preprocessing of a checkpoint; see `keras_vits.create`."""
    cls, hyperparameters = registry.lookup(name)
    file, config = _locate(weights)
    format = "transformers" if "model_type" in config and "architecture" not in config else "timm"
    table, tensors = _resolved(_table(cls.names, format, name), _read(file))
    published = config.get("pretrained_cfg", {})
    stem, head = (_find(tensors, table, layer, rank) for layer, rank in (("stem", 4), ("head", 2)))
    classes = len(tensors[head]) if head else 0

    settings = {**hyperparameters, "num_classes": classes}
    if stem:
        settings["in_channels"] = tensors[stem].shape[1]
    if size := _image_size(config):
        settings["image_size"] = size
    fields = {ours: published[theirs] for ours, theirs in FIELDS.items() if published.get(theirs) is not None}
    if format == "transformers":
        settings |= _settings(cls, config, weights)
        processor = file.with_name("preprocessor_config.json")
        if processor.is_file() and "preprocessing" not in overrides:
            fields = _preprocessing(_json(processor), config["model_type"], processor)
    settings.update(overrides)
    settings.setdefault("preprocessing", {**cls.preprocessing_defaults, **fields})
    if settings["num_classes"] == classes:
        names = _class_names({**published, **config}, classes) or checkpoints.class_names(config)
        settings.setdefault("class_names", names)
    try:
        with values_later():
            model = cls(**{"name": name, **settings})
        if stem:
            tensors[stem] = adapt_channels(tensors[stem], model.cfg.in_channels)
        skip = () if model.cfg.num_classes == classes else ("head",)
        assign(model, tensors, weights, format, skip, _image_size(config))
    except ValueError as e:
        architecture = config.get("architecture", name)
        if architecture != name:
            raise ValueError(f"{weights} holds weights of {architecture!r}, not of {name!r}. {e}") from None
        raise
    initialize(model)
    checkpoints.name_license(weights, config)
    return model


def adapt_channels(kernel, channels):
    """A first convolution's kernel (O,I,h,w) for images of another number of channels, of about the same response.

    One channel gets the sum of the kernels; several get them in turn, scaled by I / channels. As timm does it.
    """
    given = kernel.shape[1]
    if channels == given:
        return kernel
    if channels == 1:
        return kernel.sum(1, keepdims=True, dtype="float32")
    return np.tile(kernel, (1, math.ceil(channels / given), 1, 1))[:, :channels].astype("float32") * (given / channels)


def cubic(distance):
    """Keys' cubic convolution of distances >= 0, a = -0.5."""
    near = 1.5 * distance**3 - 2.5 * distance**2 + 1
    far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    return np.where(distance < 1, near, np.where(distance < 2, far, 0))


def resample_grid(table, old, new):
    """A table of vectors (old[0] * old[1], D) on a grid of another size (new[0] * new[1], D): antialiased bicubic."""

    def matrix(n, m):
        scale = n / m
        weights = cubic(np.abs((np.arange(n) + 0.5 - (np.arange(m)[:, None] + 0.5) * scale) / max(scale, 1)))
        return weights / weights.sum(1, keepdims=True)

    grid = np.asarray(table, "float64").reshape(*old, -1)
    grid = np.einsum("yh,hwd,xw->yxd", matrix(old[0], new[0]), grid, matrix(old[1], new[1]), optimize=True)
    return grid.reshape(new[0] * new[1], -1).astype("float32")


def resample_positions(table, grid, prefix=0, old=None):
    """A position table (1, prefix + N, D) for another grid (height, width); the first `prefix` vectors stay.

    `old` is the grid that the table was made for. Where that is unknown or of another length, a table of the right
    length is taken as it is, as in timm, any other as a square, and one that is no square will not fit.
    """
    count = table.shape[1] - prefix
    if old is None or math.prod(old) != count:
        old = grid if math.prod(grid) == count else (math.isqrt(count),) * 2
    if tuple(old) == tuple(grid) or math.prod(old) != count:
        return table
    resampled = resample_grid(table[0, prefix:], old, grid)
    return np.concatenate([table[:, :prefix].astype("float32"), resampled[None]], axis=1)


# ---------------------------------------------------------------- files


def _locate(source):
    """The file of tensors that a source means, and the configuration beside it ({} for a file given by itself)."""
    path = pathlib.Path(source)
    if path.is_file():
        return path, {}
    if not path.is_dir():
        if not checkpoints.HUB_ID.fullmatch(str(source)):
            raise ValueError(
                f"No such file or folder: {source}. Give a hub id such as 'timm/mobilevit_xs.cvnets_in1k', a folder "
                "with config.json and model.safetensors, or a .safetensors file."
            )
        path = checkpoints.download(str(source))
    for name in ("config.json", "model.safetensors"):
        if not (path / name).is_file():
            raise ValueError(f"{path} has no {name}: a checkpoint's folder holds config.json and model.safetensors.")
    return path / "model.safetensors", _json(path / "config.json")


def _json(path):
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as e:
        raise ValueError(f"{path} is not a JSON object ({e}).") from None


def _read(file, allow_pickle=False):
    """Name -> array, for every tensor in a file."""
    if file.suffix != ".safetensors":
        return _read_pickle(file, allow_pickle)
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ImportError('Reading .safetensors files needs: pip install "keras-vits[hub]"') from None
    import ml_dtypes  # noqa: F401, a dependency of Keras that teaches numpy bfloat16

    try:
        with safe_open(file, "np") as f:
            return {name: f.get_tensor(name) for name in f.keys()}
    except SafetensorError as e:
        raise ValueError(f"{file} is truncated or not a safetensors file ({e}): download it again.") from None


def _read_pickle(file, allow_pickle):
    if not allow_pickle:
        raise ValueError(
            f"{file} is not a .safetensors file. A pickled .pt or .pth file is read only by "
            "load_weights(model, file, allow_pickle=True)."
        )
    try:
        import torch
    except ImportError:
        raise ImportError('Reading pickled checkpoints needs PyTorch: pip install "keras-vits[torch]"') from None
    import pickle

    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError) as e:
        raise ValueError(f"{file} is truncated, or holds more than tensors ({str(e).splitlines()[0]}).") from None
    for wrapper in ("state_dict", "model"):
        if isinstance(tensors, dict) and isinstance(tensors.get(wrapper), dict):
            tensors = tensors[wrapper]
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise ValueError(f"{file} does not hold a dictionary of tensors.")
    return {name: (t.float() if t.is_floating_point() else t).numpy() for name, t in tensors.items()}


def _image_size(config):
    """(height, width) in pixels that a checkpoint was made for, or `None`."""
    if size := config.get("pretrained_cfg", {}).get("input_size"):
        return tuple(size[1:])
    size = config.get("image_size")  # transformers
    return (size, size) if isinstance(size, int) else size and tuple(size)


def _class_names(config, classes):
    """K names, or `None` if the configuration does not name every class."""
    names = config.get("label_names") or config.get("id2label") or ()
    if isinstance(names, dict):
        names = [names.get(str(i)) for i in range(classes)]
    invented = names and names[0] == "LABEL_0"  # by transformers, where nobody named them
    return names if len(names) == classes and all(names) and not invented else None


def _settings(cls, config, source):
    """Fields of a family's Config, from the config.json of transformers."""
    given = {ours: config[theirs] for ours, theirs in SETTINGS.items() if theirs in config}
    if config.get("use_swiglu_ffn"):
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


def _preprocessing(processor, model_type, source):
    """Fields of `Preprocessing`, from the preprocessor_config.json of transformers."""
    mobile, stretched = model_type.startswith("mobilevit"), model_type in ("vit", "vit_mae", "vit_msn", "deit")
    square = lambda size: {"height": size, "width": size} if isinstance(size, int) else size or {}
    size = processor.get("size")
    size = {"shortest_edge": size} if isinstance(size, int) and not stretched else square(size)
    side = size.get("shortest_edge", size.get("height"))
    cropped = processor.get("do_center_crop", "crop_size" in processor)
    kept = square(processor.get("crop_size")) if cropped else size
    resample = processor.get("resample", 2)
    if not (
        processor.get("do_resize", True)
        and processor.get("do_rescale", True)
        and math.isclose(processor.get("rescale_factor", 1 / 255), 1 / 255)
        and size.get("width", side) == side
        and kept.get("height") == kept.get("width")
        and 0 < kept.get("height", 0) <= side
        and resample < len(INTERPOLATIONS)
    ):
        raise ValueError(f"{source} asks for steps that Preprocessing does not have: give another by `preprocessing=`.")
    crop = kept["height"] / side
    if math.floor(kept["height"] / crop) < side:  # so much for floating point
        crop = math.nextafter(crop, 0)
    normalized = processor.get("do_normalize", not mobile)
    return dict(
        mean=processor["image_mean"] if normalized else (0.0, 0.0, 0.0),
        std=processor["image_std"] if normalized else (1.0, 1.0, 1.0),
        interpolation=("nearest", "lanczos", "bilinear", "bicubic")[resample],  # PIL's numbers
        crop=crop,
        crop_mode="center" if "shortest_edge" in size else "squash",
        channel_order="bgr" if processor.get("do_flip_channel_order", mobile) else "rgb",
    )


# ---------------------------------------------------------------- tensors


def _table(names, format, model):
    """The weight table of a format."""
    if format not in names:
        raise ValueError(f"{model} has no weight table for {format!r}; it has: {', '.join(names)}.")
    return names[format]


def _resolved(table, tensors):
    """A table with those names of its lists that a file has, and the file's tensors without what precedes the names."""
    prefixes = tuple(f"{name}." for name in table.get("", ()))
    bare = lambda name: name[len(next((p for p in prefixes if name.startswith(p)), "")) :]
    tensors = {bare(name): tensor for name, tensor in tensors.items()}
    present = lambda target: any(map(_pattern(target, ".").match, tensors))
    chosen = {row: next(filter(present, t), t[0]) for row, t in table.items() if isinstance(t, list)}
    return {**table, **chosen}, tensors


def _find(tensors, table, layer, rank):
    """Name of the first source tensor of this rank in one of our layers or what is inside it, or `None`."""
    targets = [target for row, target in table.items() if isinstance(target, str) and row and _under(row, layer)]
    found = (name for target in targets for name in tensors if name.startswith(f"{target}."))
    return next((name for name in found if tensors[name].ndim == rank), None)


def assign(model, tensors, source, format, skip=(), image_size=None):
    """Sets every weight of the model from source tensors, or raises and sets none.

    Args:
        model: a `VisionModel`.
        tensors: name -> array, in PyTorch's layout.
        source: where they came from, for messages.
        format: whose names these are, a key of the family's `names`.
        skip: names of our layers that keep their weights.
        image_size: (height, width) in pixels that they were made for, or `None`.

    Raises:
        ValueError: every tensor that is missing, left over or of another shape is named.
    """
    table, tensors = _resolved(_table(model.names, format, model.name), tensors)
    ignored = [re.compile(r"(.*\.)?num_batches_tracked"), *(_pattern(name, ".") for name in table.get(None, ()))]
    for name in skip:
        ignored += [
            _pattern(target, ".")
            for row, target in table.items()
            if isinstance(target, str) and row and _under(row, name)
        ]
    values, missing, misshapen = [], [], []
    unused = {name for name in tensors if not any(pattern.match(name) for pattern in ignored)}

    def take(name):
        unused.discard(name)
        return tensors[name]

    take.image_size = image_size
    for variable in model.weights:
        path, shape = variable.path, tuple(variable.shape)
        if path.endswith("seed_generator_state"):
            continue
        row, numbers, rest = _row(table, path)
        target = table[row]
        sources = _sources(target, numbers, rest)
        if target is None or any(_under(path, name) for name in skip):
            unused -= set(sources)
            continue
        try:
            if callable(target):
                value = target(take, model, **numbers)
            else:
                parts = [take(name) for name in sources]
                value = parts[0] if len(parts) == 1 else np.concatenate(parts)
                value = _layout(value, shape) if path.endswith("kernel") else value
        except KeyError as e:
            missing += [name for name in sources if name not in tensors] or [e.args[0]]
            unused -= set(sources)
            continue
        if value.shape != shape:
            misshapen.append(f"{path} is {shape}, the file's {value.shape}")
        values.append((variable, value))

    faults = {"missing in the file": missing, "left over in the file": sorted(unused), "of another shape": misshapen}
    if any(faults.values()):
        listed = "".join(f"\n  {kind} ({len(names)}): {', '.join(names)}" for kind, names in faults.items() if names)
        raise ValueError(f"{source} does not fit {model.name}, which was left as it is.{listed}")
    for variable, value in values:
        set_value(variable, value.astype("float32"))


def _row(table, path):
    """The longest row (of two, the more literal) that a weight's path begins with, its numbers, and the path's rest."""
    found = []
    for row in filter(None, table):
        if match := _pattern(row, "/").match(path):
            numbers = {key: int(value) for key, value in match.groupdict().items()}
            found.append((match.end(), -len(numbers), row, numbers, path[match.end() + 1 :]))
    if not found:
        raise ValueError(f"The weight table has no row for {path}.")
    return max(found, key=lambda f: f[:2])[2:]


def _pattern(name, separator):
    """Regular expression of a layer's name and everything below it; `{i}` is a number."""
    return re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\d+)", re.escape(name)) + rf"(?=$|\{separator})")


def _under(path, name):
    return path == name or path.startswith(f"{name}/")


def _sources(target, numbers, rest):
    """Names of the source tensors that make one of our weights; `rest` is its path below the row."""
    if target is None or callable(target):
        return []
    *layers, leaf = rest.split("/")
    below = [*layers, LEAVES.get(leaf, leaf)] if rest else []
    numbers = numbers | {f"{key}+1": value + 1 for key, value in numbers.items()}
    return [".".join([name.format(**numbers), *below]) for name in ([target] if isinstance(target, str) else target)]


def _layout(kernel, shape):
    """PyTorch's kernel (out,in) or (out,in,h,w) in the layout of ours, which has this shape."""
    if len(shape) == 2 and kernel.shape[2:] in ((), (1, 1)):
        return kernel.reshape(kernel.shape[:2]).T
    if len(shape) == 4 and kernel.ndim == 4:
        depthwise = kernel.shape[1] == 1 and shape[2] > 1
        return kernel.transpose(2, 3, 0, 1) if depthwise else kernel.transpose(2, 3, 1, 0)
    return kernel
