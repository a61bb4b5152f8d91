"""What the files of this package share: names of options, and coremltools without the frameworks that it looks for."""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import io
import logging
import pathlib
import shutil
import sys
import threading
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

from keras_vits._util.scratch import redirected

from ...headers import METADATA

PRECISIONS = ("float16", "float32")
LAYOUTS = ("default", "ane")
COMPUTE_UNITS = ("all", "cpu_only", "cpu_and_gpu", "cpu_and_ne")
FLOAT32_LAYERS = f"{METADATA}.float32_layers"  # in the metadata of a file of half precision that has some
INSTALL = 'pip install -e ".[coreml]"'

MAKERS = ("coremltools.models.model", "coremltools.models.utils", "coremltools.converters.mil.converter")  # of packages

_import, _builder = threading.Lock(), threading.Lock()


def check_option(name: str, value: object, known: Iterable[str]) -> None:
    """Raises a `ValueError` that lists the known values, unless the value is one of them."""
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}; received {value!r}.")


@contextlib.contextmanager
def alone_and_quiet() -> Iterator[pathlib.Path]:
    """One thread at a time: coremltools' builder keeps names and scopes for the whole process. It draws a progress bar
    for every step of a second or less, and they are not shown. Every model that it makes has a package of its own in
    the temporary folder until the process ends: they are made in the folder that is yielded; see `tied`."""
    with _builder, contextlib.redirect_stderr(io.StringIO()), _checked_at_the_end(), redirected(*MAKERS) as folder:
        yield folder


@contextlib.contextmanager
def telling(path: pathlib.Path) -> Iterator[None]:
    """Says which package coremltools cannot read, and why, in place of its own errors of any class."""
    try:
        yield
    except ImportError:  # of a package that a recipe needs
        raise
    except Exception as e:  # of a damaged package, its C++ and its parser raise whatever they come to
        reason = " ".join(str(e).split())[:200] or type(e).__name__
        raise ValueError(f"{path} cannot be read by coremltools ({reason}): export the model again.") from e


@contextlib.contextmanager
def _checked_at_the_end() -> Iterator[None]:
    """coremltools checks the whole program after each of its hundred passes, which takes longer than the passes: here
    it does so once, after the last pass of a pipeline."""
    from coremltools.converters.mil.mil.passes.pass_pipeline import PASS_REGISTRY, PassPipelineManager

    def apply(program: Any, pipeline: Any) -> None:
        pipeline.validate()
        for name in pipeline.passes:
            graph_pass = PASS_REGISTRY[name]
            graph_pass.set_options(pipeline.get_options(name))
            graph_pass(program)
        program.validate(check_essential_scope="common::dead_code_elimination" in pipeline.passes)

    theirs = PassPipelineManager.apply_pipeline
    PassPipelineManager.apply_pipeline = staticmethod(apply)
    try:
        yield
    finally:
        PassPipelineManager.apply_pipeline = staticmethod(theirs)


def tied(model: Any, folder: pathlib.Path) -> Any:
    """The `MLModel`, with which the folder of its package goes; `release` removes it earlier."""
    model.keras_vits_folder = weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
    return model


def release(model: Any) -> None:
    """Removes the package that coremltools made of a model in the temporary folder: it is saved elsewhere by now."""
    model.keras_vits_folder()


class _Hidden(importlib.abc.MetaPathFinder):
    """Makes packages that are not imported yet look absent."""

    NAMES = (
        "tensorflow",
        "torch",
        "torchvision",
        "torchaudio",
        "torchao",
        "executorch",
        "transformers",
        "xgboost",
        "sklearn",
    )

    def __init__(self) -> None:
        self.names = {name for name in self.NAMES if name not in sys.modules}
        self.thread = threading.get_ident()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name in self.names and threading.get_ident() == self.thread:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def coremltools() -> Any:
    """The coremltools package, imported in half a second: it imports TensorFlow, PyTorch and more where it finds them
    (9 s), none of which is needed here. What is imported already stays visible to it, and nothing is hidden afterwards.

    Raises:
        ImportError: coremltools is not installed.
    """
    with _import:
        if sys.modules.get("coremltools"):
            return sys.modules["coremltools"]
        logging.getLogger("coremltools").setLevel(logging.ERROR)
        hidden = _Hidden()
        sys.meta_path.insert(0, hidden)
        try:
            return importlib.import_module("coremltools")
        except ImportError as e:
            raise ImportError(f"Core ML files need coremltools: {INSTALL}") from e
        finally:
            sys.meta_path.remove(hidden)
