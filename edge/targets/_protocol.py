"""What a target is, and which there are: a new one is a package beside this file and one line in `HOMES`.

Nothing outside a target's own package asks for its name: what differs is a trait.
"""

from __future__ import annotations

import dataclasses
import importlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np

    from ..artifact import Artifact
    from ._steps import Steps

Scale = Mapping[str, float]  # {"scale": of an integer, "zero_point": the integer that stands for 0}

HOMES = {  # name -> the module of this package that has its `TARGET`
    "litert": "litert",
    "coreml": "coreml",
    "keras": "keras_file",
    "onnx": "onnx",
}


@runtime_checkable
class Runner(Protocol):
    """Runs an artifact.

    Attributes:
        runtime: name and version of what runs it.
        verified_by: what a check by this runner rests on.
    """

    runtime: str
    verified_by: str

    def predict(self, inputs: np.ndarray | Mapping[str, np.ndarray]) -> np.ndarray | dict[str, np.ndarray]:
        """Any number N of examples -> what the artifact gives for them.

        Args:
            inputs: the array (N,...) of the one input, or name -> array where there are several.

        Returns:
            The array (N,...) of the one output, or name -> array where there are several.
        """
        ...

    def histogram(self) -> dict[str, int]:
        """Number of operations in the file by name, most frequent first."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traits:
    """What distinguishes one target from another, for code that knows no target by name.

    Attributes:
        title: for people: `"LiteRT"`.
        phone: for whose phones the files are: `"Android"`, `"iPhone"`, or "".
        about: for a report, what its files run on: `"LiteRT runs on Android and small boards"`; or "".
        marker: matplotlib's, in plots.
        sign: the same as a character, in text.
        extra: of pyproject.toml, that brings what it needs.
        pixels: dtype of an input that takes pixels, `"uint8"` or `"image"`; "" where it has none.
        pixel_option: keyword of `export` that makes the file take pixels; "" where there is none.
        precisions: what `export` takes as `precision`; () where a file is always float32.
        float_recipe: recipe of the file that the others are quantized from.
        restarts: whether each measuring process lays out the file's weights anew, so that several of them are measured.
        exact_floats: whether the CPU computes a float32 file's sums in float32, so that a device may differ by their
            order only.
        unavailable: () -> why its files cannot run on this machine, or "".
        environment: (artifact, threads) -> environment variables of a process that measures it.
        order: (artifact) -> what the measuring process has to be told beside path, threads, shapes and dtypes.
        profiled: whether `edge.profile` can show where a file's time goes.
        partitions: (runner) -> number of partitions of the delegate, or `None`.
        outside: (runner) -> number of operations by name that no partition of the delegate computes.
        offenders: (artifact) -> why a phone's GPU would refuse it, () if it would not; `None` if that is not known.
        checked: (`Runner.verified_by` of the files of a report) -> a sentence on how they were checked, or "".
        steps: (artifact) -> its operations one by one, for a check in half precision; `None` where it cannot be taken
            apart.
        quantized: (runner) -> scale and zero point of each input and of each output that holds integers, otherwise
            `None`; `None` where no file of the target has such ones.
    """

    title: str
    phone: str = ""
    about: str = ""
    marker: str = "o"
    sign: str = "●"
    extra: str = ""
    pixels: str = ""
    pixel_option: str = ""
    precisions: tuple[str, ...] = ()
    float_recipe: str = "float32"
    restarts: bool = False
    profiled: bool = False
    exact_floats: bool = True
    unavailable: Callable[[], str] = lambda: ""
    environment: Callable[[Artifact, int], Mapping[str, str]] = lambda artifact, threads: {}
    order: Callable[[Artifact], Mapping[str, Any]] = lambda artifact: {}
    partitions: Callable[[Any], int | None] = lambda runner: None
    outside: Callable[[Any], Mapping[str, int]] = lambda runner: {}
    offenders: Callable[[Artifact], tuple[str, ...] | None] = lambda artifact: None
    checked: Callable[[Sequence[str]], str] = lambda verified_by: ""
    steps: Callable[[Artifact], Steps] | None = None
    quantized: Callable[[Any], tuple[Sequence[Scale | None], Sequence[Scale | None]] | None] = lambda runner: None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A format that a model is written in.

    Attributes:
        name: `"litert"`; the `format` of its artifacts, and of recipes.
        suffix: of its files, with the dot.
        export: (model, folder, **options) -> Artifact. `name` and `overwrite` are options of every target,
            whose file has the name that `artifact.file_name` gives.
        quantize: (artifact, recipe, calibration, folder, **options) -> Artifact; `None` where nothing is quantized.
            `overwrite` is an option of every target, whose file is called in the same way.
        load: (artifact, **options) -> Runner.
        run: (order) -> load() -> (run(inputs), runtime), for the process that measures: see devices/host_worker.py. It
            imports no Keras unless the target is Keras.
        traits: what distinguishes it from the others.
    """

    name: str
    suffix: str
    export: Callable[..., Artifact]
    quantize: Callable[..., Artifact] | None
    load: Callable[..., Runner]
    run: Callable[[Mapping[str, Any]], Callable[[], tuple[Callable[[Any], Any], str]]]
    traits: Traits


def names() -> tuple[str, ...]:
    """Names of all targets."""
    return tuple(HOMES)


def target(name: str) -> Target:
    """The target of a name; what it needs is imported when it is used.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in HOMES:
        raise ValueError(f"There is no target {name!r}. There are: {', '.join(HOMES)}.")
    return importlib.import_module(f".{HOMES[name]}", __package__).TARGET


def target_of(path: str | pathlib.Path) -> Target:
    """The target of a file, by its suffix.

    Raises:
        ValueError: a file of another kind.
    """
    suffix = pathlib.Path(path).suffix
    for name in HOMES:
        if target(name).suffix == suffix:
            return target(name)
    known = ", ".join(target(name).suffix for name in HOMES)
    raise ValueError(f"{path} is of no known kind: known are {known}.")
