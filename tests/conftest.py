"""One backend for each test process, chosen by KERAS_BACKEND; timm importable beside a CPU build of PyTorch."""

import gc
import importlib.util
import os
import pathlib
import sys

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile far more than they compute: these halve the time of it.
FLAGS = ("backend_optimization_level=0", "cpu_use_fusion_emitters=false", "cpu_parallel_codegen_split_count=1")
os.environ.setdefault("XLA_FLAGS", " ".join(f"--xla_{flag}" for flag in FLAGS))
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores: threads of each would only wait for another
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
sys.path[:0] = [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parents[1] / "tools")]


def pytest_sessionstart():
    """On the built wheel (tools/on_wheel.py), the package under test is the wheel's and no other."""
    if wheel := os.environ.get("KERAS_VITS_WHEEL"):
        import keras_vits

        if not pathlib.Path(keras_vits.__file__).is_relative_to(wheel):
            raise pytest.UsageError(f"The tests were to run on the wheel in {wheel}, and import {keras_vits.__file__}.")


@pytest.fixture(scope="module", autouse=True)
def cheap_garbage_collection():
    """Python does not look for garbage among what the imports left again and again: a tenth of all time was that."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(autouse=True)
def seed():
    """Initial weights, dropout and the order of the images are the same whatever ran before."""
    import keras

    keras.utils.set_random_seed(0)


_libraries = []  # their operators live as long as they do


def import_timm():
    """The timm package.

    It imports torchvision, which stops at the missing operator `nms` when its compiled part was built for another
    PyTorch (a CUDA one, say). Nothing here uses that operator: its name is enough.
    """
    torch = pytest.importorskip("torch")
    package = importlib.util.find_spec("torchvision")
    try:
        torch.ops.load_library(pathlib.Path(package.origin).with_name("_C.so"))
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")
        _libraries.append(library)
    import timm

    return timm


@pytest.fixture(scope="session")
def timm():
    """The timm package, the numeric reference."""
    return import_timm()
