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

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from keras_vits._util.keras_private import set_value

Table = dict[Any, Any]  # one of `VisionModel.names`
LEAVES = {  # of Keras -> of PyTorch; a name that is not here is the same in both
    "kernel": "weight",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}


def is_float(dtype: np.dtype[Any]) -> bool:
    """Whether numbers of this type are weights themselves: whole numbers and 8-bit floats have a scale elsewhere."""
    return dtype.name in ("float16", "bfloat16", "float32", "float64")


def adapt_channels(kernel: np.ndarray, channels: int) -> np.ndarray:
    """A first convolution's kernel (O,I,h,w) for images of another number of channels, of about the same response.

    One channel gets the sum of the kernels; several get them in turn, scaled by I / channels. As timm does it.
    """
    given = kernel.shape[1]
    if channels == given or not given:
        return kernel
    if channels == 1:
        return kernel.sum(1, keepdims=True, dtype="float32")
    return np.tile(kernel, (1, math.ceil(channels / given), 1, 1))[:, :channels].astype("float32") * (given / channels)


def table_of(names: Mapping[str, Table], format: str, model: str) -> Table:
    """The weight table of a format."""
    if format not in names:
        raise ValueError(f"{model} has no weight table for {format!r}; it has: {', '.join(names)}.")
    return names[format]


def resolved(table: Table, tensors: Mapping[str, np.ndarray]) -> tuple[Table, dict[str, np.ndarray]]:
    """A table with those names of its lists that a file has, and the file's tensors without what precedes the names."""
    prefixes = tuple(f"{name}." for name in table.get("", ()))
    bare = lambda name: name[len(next((p for p in prefixes if name.startswith(p)), "")) :]
    tensors = {bare(name): tensor for name, tensor in tensors.items()}
    present = lambda target: any(map(layer_pattern(target).match, tensors))
    chosen = {row: next(filter(present, t), t[0]) for row, t in table.items() if isinstance(t, list)}
    return {**table, **chosen}, tensors


def layer_pattern(name: str) -> re.Pattern[str]:
    """Regular expression of the source's name of a layer and of everything in it."""
    return _pattern(name, ".")


def find(tensors: Mapping[str, np.ndarray], table: Table, layer: str, rank: int) -> str | None:
    """Name of the first source tensor of this rank in one of our layers or what is inside it, or `None`."""
    targets = [target for row, target in table.items() if isinstance(target, str) and row and _under(row, layer)]
    found = (name for target in targets for name in tensors if name.startswith(f"{target}."))
    return next((name for name in found if tensors[name].ndim == rank), None)


def assign(
    model: Any,
    tensors: Mapping[str, np.ndarray],
    source: Any,
    format: str,
    skip: Sequence[str] = (),
    image_size: tuple[int, int] | None = None,
) -> None:
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
    table, tensors = resolved(table_of(model.names, format, model.name), tensors)
    ignored = [re.compile(r"(.*\.)?num_batches_tracked"), *map(layer_pattern, table.get(None, ()))]
    for name in skip:
        ignored += [
            layer_pattern(target)
            for row, target in table.items()
            if isinstance(target, str) and row and _under(row, name)
        ]
    values, missing, misshapen = [], [], []
    wrong: dict[str, str] = {}
    unused = {name for name in tensors if not any(pattern.match(name) for pattern in ignored)}

    def take(name: str) -> np.ndarray:
        unused.discard(name)
        tensor = tensors[name]
        if not is_float(tensor.dtype):
            wrong[name] = f"of {tensor.dtype}, which is no floating-point number"
        elif not np.isfinite(_float32(tensor)).all():
            wrong[name] = "NaN or infinite"
        return tensor

    cast(Any, take).image_size = image_size
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
        except (ValueError, IndexError, ZeroDivisionError):  # of numpy, on shapes that the layer cannot have
            shapes = [tensors[name].shape for name in sources if name in tensors]
            misshapen.append(f"{path} is {shape}, the file's {', '.join(map(str, shapes)) or 'of another form'}")
            continue
        if value.shape != shape:
            misshapen.append(f"{path} is {shape}, the file's {value.shape}")
        values.append((variable, value))

    faults = {
        "missing in the file": missing,
        "left over in the file": sorted(unused),
        "of another shape": misshapen,
        "impossible in the file": [f"{name} is {reason}" for name, reason in wrong.items()],
    }
    if any(faults.values()):
        listed = "".join(f"\n  {kind} ({len(names)}): {', '.join(names)}" for kind, names in faults.items() if names)
        raise ValueError(f"{source} does not fit {model.name}, which was left as it is.{listed}")
    for variable, value in values:
        set_value(variable, _float32(value))


def _float32(tensor: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # of float64: the infinite ones are named
        return tensor.astype("float32")


def _row(table: Table, path: str) -> tuple[str, dict[str, int], str]:
    """The longest row (of two, the more literal) that a weight's path begins with, its numbers, and the path's rest."""
    found = []
    for row in filter(None, table):
        if match := _pattern(row, "/").match(path):
            numbers = {key: int(value) for key, value in match.groupdict().items()}
            found.append((match.end(), -len(numbers), row, numbers, path[match.end() + 1 :]))
    if not found:
        raise ValueError(f"The weight table has no row for {path}.")
    return max(found, key=lambda f: f[:2])[2:]


def _pattern(name: str, separator: str) -> re.Pattern[str]:
    """Regular expression of a layer's name and everything below it; `{i}` is a number."""
    return re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\d+)", re.escape(name)) + rf"(?=$|\{separator})")


def _under(path: str, name: str) -> bool:
    return path == name or path.startswith(f"{name}/")


def _sources(target: Any, numbers: dict[str, int], rest: str) -> list[str]:
    """Names of the source tensors that make one of our weights; `rest` is its path below the row."""
    if target is None or callable(target):
        return []
    *layers, leaf = rest.split("/")
    below = [*layers, LEAVES.get(leaf, leaf)] if rest else []
    numbers = numbers | {f"{key}+1": value + 1 for key, value in numbers.items()}
    return [".".join([name.format(**numbers), *below]) for name in ([target] if isinstance(target, str) else target)]


def _layout(kernel: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """PyTorch's kernel (out,in) or (out,in,h,w) in the layout of ours, which has this shape."""
    if len(shape) == 2 and kernel.shape[2:] in ((), (1, 1)):
        return kernel.reshape(kernel.shape[:2]).T
    if len(shape) == 4 and kernel.ndim == 4:
        depthwise = kernel.shape[1] == 1 and shape[2] > 1
        return kernel.transpose(2, 3, 0, 1) if depthwise else kernel.transpose(2, 3, 1, 0)
    return kernel
