"""Published weights into a model: a family's table maps layers, this file derives the tensors. All or nothing.

A table (`VisionModel.names["timm"]`) has one row for a layer, our name: the source's name, where `{i}` is a number. The
longest row that a weight's path begins with wins, and names below it are taken as equal. The right side may also be

    a tuple of names    their tensors are concatenated along the outputs (separate q, k, v into one qkv)
    a function          (take, model, **numbers) -> array in our layout; `take(name)` gives a source tensor
    None                our layer keeps its initial value

and the row `None: (name, ...)` lists layers of the source that are knowingly ignored.
"""

import json
import math
import pathlib
import re

import numpy as np

from keras_vits import checkpoints, registry

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
}  # of Preprocessing <- of timm


def load_weights(model, source, *, format="timm", skip=(), allow_pickle=False):
    """Gives a model published weights. Either every weight is set, or the model stays as it is.

    Args:
        model: a `VisionModel`.
        source: a Hugging Face hub id (`"timm/mobilevit_xs.cvnets_in1k"`), a local folder with `config.json` and
            `model.safetensors`, or a file.
        format: whose names the file uses, a key of the family's `names`.
        skip: names of our layers that keep their weights, e.g. `("head",)`.
        allow_pickle: whether a `.pt` or `.pth` file may be read, by PyTorch with `weights_only=True`.

    Returns:
        The model.

    Raises:
        ValueError: the file cannot be read, or does not fit: every tensor that is missing, left over or of another
            shape is named.
    """
    file, _ = _locate(source)
    _assign(model, _read(file, allow_pickle), source, format, skip)
    return model


def create_from_checkpoint(name, weights, overrides):
    """A model with the weights, classes, image size and preprocessing of a checkpoint; see `keras_vits.create`."""
    cls, hyperparameters = registry.lookup(name)
    file, config = _locate(weights)
    tensors = _read(file)
    published = config.get("pretrained_cfg", {})
    stem, head = (_find(tensors, cls.names["timm"][layer], rank) for layer, rank in (("stem", 4), ("head", 2)))
    classes = len(tensors[head]) if head else 0

    settings = {**hyperparameters, "num_classes": classes}
    if stem:
        settings["in_channels"] = tensors[stem].shape[1]
    if "input_size" in published:
        settings["image_size"] = tuple(published["input_size"][1:])
    settings.update(overrides)
    fields = {ours: published[theirs] for ours, theirs in FIELDS.items() if published.get(theirs) is not None}
    settings.setdefault("preprocessing", {**cls.preprocessing_defaults, **fields})
    if settings["num_classes"] == classes:
        settings.setdefault("class_names", _class_names({**published, **config}, classes))
    try:
        model = cls(name=name, **settings)
        if stem:
            tensors[stem] = adapt_channels(tensors[stem], model.cfg.in_channels)
        _assign(model, tensors, weights, "timm", () if model.cfg.num_classes == classes else ("head",))
    except ValueError as e:
        architecture = config.get("architecture", name)
        if architecture != name:
            raise ValueError(f"{weights} holds weights of {architecture!r}, not of {name!r}. {e}") from None
        raise
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


def resample_grid(table, old, new):
    """A table of vectors (old[0] * old[1], D) on a grid of another size (new[0] * new[1], D): antialiased bicubic."""

    def matrix(n, m):
        scale = n / m
        distance = np.abs((np.arange(n) + 0.5 - (np.arange(m)[:, None] + 0.5) * scale) / max(scale, 1))
        near = 1.5 * distance**3 - 2.5 * distance**2 + 1  # Keys' cubic convolution, a = -0.5
        far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
        weights = np.where(distance < 1, near, np.where(distance < 2, far, 0))
        return weights / weights.sum(1, keepdims=True)

    grid = np.asarray(table, "float64").reshape(*old, -1)
    grid = np.einsum("yh,hwd,xw->yxd", matrix(old[0], new[0]), grid, matrix(old[1], new[1]), optimize=True)
    return grid.reshape(new[0] * new[1], -1).astype("float32")


def resample_positions(table, grid, prefix=0):
    """A position table (1, prefix + n * n, D) for another grid (height, width); the first `prefix` vectors stay.

    A table of the right length is taken as it is, as in timm, and so is one that is no square: it will not fit.
    """
    old = math.isqrt(table.shape[1] - prefix)
    if table.shape[1] == prefix + math.prod(grid) or table.shape[1] != prefix + old**2:
        return table
    resampled = resample_grid(table[0, prefix:], (old, old), grid)
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
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        return path / "model.safetensors", dict(config)
    except (ValueError, TypeError) as e:
        raise ValueError(f"{path / 'config.json'} is not a JSON object ({e}).") from None


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


def _class_names(config, classes):
    """K names, or `None` if the configuration does not name every class."""
    names = config.get("label_names") or ()
    if isinstance(names, dict):
        names = [names.get(str(i)) for i in range(classes)]
    return names if len(names) == classes and all(names) else None


# ---------------------------------------------------------------- tensors


def _find(tensors, layer, rank):
    """Name of the first tensor of this rank in a layer of the source, or `None`."""
    return next((name for name, t in tensors.items() if name.startswith(f"{layer}.") and t.ndim == rank), None)


def _assign(model, tensors, source, format, skip):
    """Sets every weight of the model from source tensors, or raises and sets none."""
    if format not in model.names:
        raise ValueError(f"{model.name} has no weight table for {format!r}; it has: {', '.join(model.names)}.")
    table = model.names[format]
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
        variable.assign(value.astype("float32"))


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
    return [".".join([name.format(**numbers), *below]) for name in ([target] if isinstance(target, str) else target)]


def _layout(kernel, shape):
    """PyTorch's kernel (out,in) or (out,in,h,w) in the layout of ours, which has this shape."""
    if len(shape) == 2 and kernel.shape[2:] in ((), (1, 1)):
        return kernel.reshape(kernel.shape[:2]).T
    if len(shape) == 4 and kernel.ndim == 4:
        depthwise = kernel.shape[1] == 1 and shape[2] > 1
        return kernel.transpose(2, 3, 0, 1) if depthwise else kernel.transpose(2, 3, 1, 0)
    return kernel
