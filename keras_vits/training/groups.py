"""Which variables share a learning rate and a weight decay, and an optimizer that applies them."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import keras

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
        model: a `VisionModel`; its frozen variables are in no group.
        layer_decay: ratio of a layer's learning rate to the next layer's, in (0, 1]; 1 gives all the same.
        weight_decay: weight decay of the variables that have one, a non-negative number.

    Returns:
        List of `ParameterGroup`, at most two for each depth, from the stem to the head.

    Raises:
        ValueError: a `layer_decay` or `weight_decay` outside of its range, or nothing that trains.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay is a factor in (0, 1]; received {layer_decay}.")
    if weight_decay < 0:
        raise ValueError(f"weight_decay must not be negative; received {weight_decay}.")
    if not model.trainable_variables:
        raise ValueError(f"{model.name} has no trainable variables: call model.unfreeze() or freeze less.")
    depth, depths = 0, {}
    for layer in model.layers:
        if names.BLOCK.fullmatch(layer.name) or layer.name == names.POOL:
            depth += 1
        depths[layer.name] = depth
    groups: dict[tuple[float, float], list[str]] = {}
    for variable in model.trainable_variables:
        layer, *_, leaf = variable.path.split("/")
        scale = layer_decay ** (depth - depths[layer])
        decays = len(variable.shape) > 1 and leaf not in UNDECAYED
        groups.setdefault((scale, weight_decay if decays else 0.0), []).append(variable.path)
    return [
        ParameterGroup(paths=tuple(paths), lr_scale=scale, weight_decay=decay)
        for (scale, decay), paths in groups.items()
    ]


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
        ValueError: no groups.
    """
    if not groups:
        raise ValueError("adamw needs the groups that parameter_groups(model) returns; received none.")
    schedule = schedule or float
    optimizers = {
        "|".join(map(re.escape, group.paths)): keras.optimizers.AdamW(
            schedule(learning_rate * group.lr_scale), weight_decay=group.weight_decay, **options
        )
        for group in groups
    }
    return keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(optimizers.popitem()[1], optimizers))
