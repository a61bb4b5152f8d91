"""Which variables share a learning rate and a weight decay, and an optimizer that applies them."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras

from keras_vits._util.limits import number
from keras_vits.layers import _names as names

UNDECAYED = ("table", "class_token", "distill_token", "registers")  # embeddings: positions, prefix tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Variables with the same learning rate and weight decay.

    Attributes:
        paths: of the variables, such as `"block_0/attention/qkv/kernel"`.
        lr_scale: factor of their learning rate.
        weight_decay: fraction by which a step at learning rate 1 shrinks them.
    """

    paths: tuple[str, ...]
    lr_scale: float
    weight_decay: float


def parameter_groups(
    model: keras.Model, *, layer_decay: float = 0.75, weight_decay: float = 0.05
) -> list[ParameterGroup]:
    """Groups a model's trainable variables by depth and by whether they decay, as timm does.

    The head trains at the full learning rate, the last block (with the norm behind it) at `layer_decay` times that, the
    block before at `layer_decay ** 2`, and so on down to the stem (with tokens and positions). BEiT (arXiv 2106.08254),
    appendix. Biases, norms and all else of at most one dimension do not decay, nor do position tables and tokens.

    Args:
        model: a `VisionModel`, or a `Sequential` or functional model that holds one; frozen variables are in no group.
        layer_decay: ratio of a layer's learning rate to the next layer's, in (0, 1]; 1 gives all the same.
        weight_decay: weight decay of the variables that have one, a non-negative number.

    Returns:
        List of `ParameterGroup`, at most two for each depth, from the stem to the head.

    Raises:
        ValueError: a `layer_decay` or `weight_decay` outside of its range, nothing that trains, or two variables of one
            name.
    """
    layer_decay = number("layer_decay", layer_decay, 0, math.nextafter(1, 2), "a factor in (0, 1]", open_low=True)
    weight_decay = number("weight_decay", weight_decay, 0, math.inf, "a number that must not be negative")
    if not model.trainable_variables:
        raise ValueError(f"{model.name} has no trainable variables: call model.unfreeze() or freeze less.")
    depths: dict[str, int] = {}  # path of a variable -> of its layer
    depth = 0
    for layer in _in_order(model):
        if names.BLOCK.fullmatch(layer.name) or layer.name == names.POOL:
            depth += 1
        depths |= {variable.path: depth for variable in layer.variables}
    paths = [variable.path for variable in model.trainable_variables]
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ValueError(
            f"{model.name} has two variables called {twice}, as two models in one have, and an optimizer tells them by "
            "their names: train one model, or compile with an optimizer of Keras."
        )
    if missing := set(paths) - set(depths):
        raise ValueError(f"{model.name} has {min(missing)} in none of its layers, so it has no depth: put it into one.")
    groups: dict[tuple[float, float], list[str]] = {}
    for variable in model.trainable_variables:
        scale = layer_decay ** (depth - depths[variable.path])
        decays = len(variable.shape) > 1 and variable.path.rpartition("/")[2] not in UNDECAYED
        groups.setdefault((scale, weight_decay if decays else 0.0), []).append(variable.path)
    return [
        ParameterGroup(paths=tuple(paths), lr_scale=scale, weight_decay=decay)
        for (scale, decay), paths in groups.items()
    ]


def _in_order(model: keras.Model) -> Iterator[keras.Layer]:
    """The layers of a model in the order of its forward pass, with those of the models in it in their place."""
    for layer in model.layers:
        if isinstance(layer, keras.Model) and layer.layers:
            yield from _in_order(layer)
        else:
            yield layer


def adamw(
    groups: Sequence[ParameterGroup],
    learning_rate: float,
    *,
    schedule: Callable[[float], Any] | None = None,
    **options: Any,
) -> keras.optimizers.Optimizer:
    """AdamW that gives every group its learning rate and weight decay.

    Args:
        groups: what `parameter_groups` returned for the model to be trained.
        learning_rate: peak learning rate of a group whose `lr_scale` is 1.
        schedule: a function from a group's peak learning rate to a Keras learning-rate schedule; constant rates
            when `None`.
        **options: further arguments of `keras.optimizers.AdamW`, e.g. `clipnorm`.

    Returns:
        A `keras.optimizers.MultiOptimizer` of one `AdamW` for each group: what `model.compile` takes and a saved model
        keeps. Its optimizers are in `optimizers`, in the order of the groups.

    Raises:
        ValueError: no groups, or a learning rate that is no positive number.
    """
    if not groups:
        raise ValueError("adamw needs the groups that parameter_groups(model) returns; received none.")
    learning_rate = number("learning_rate", learning_rate, 0, math.inf, "a positive number", open_low=True)
    schedule = schedule or float
    optimizers = {
        "|".join(map(re.escape, group.paths)): keras.optimizers.AdamW(
            schedule(learning_rate * group.lr_scale), weight_decay=group.weight_decay, **options
        )
        for group in groups
    }
    return keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(optimizers.popitem()[1], optimizers))
