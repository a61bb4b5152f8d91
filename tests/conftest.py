"""One backend for each test process, chosen by KERAS_BACKEND; timm importable beside a CPU build of PyTorch."""

import gc
import inspect
import os
import pathlib
import re
import signal
import sys
import types

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile far more than they compute: these halve the time of it.
FLAGS = ("backend_optimization_level=0", "cpu_use_fusion_emitters=false", "cpu_parallel_codegen_split_count=1")
os.environ.setdefault("XLA_FLAGS", " ".join(f"--xla_{flag}" for flag in FLAGS))
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores: threads of each would only wait for another
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
ROOT = pathlib.Path(__file__).parents[1]
# SlipCover takes its probes away again where they have counted often, and each time looks through all objects for the
# functions to replace: with the packages here that takes longer than all probes. A worker is not told --threshold.
coverage = getattr(sys.modules.get("slipcover.pytest_plugin"), "_slipcover_instance", None)
if coverage is not None:
    coverage.d_miss_threshold = 10**9
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path[:0] = map(str, (ROOT / "tests", ROOT / "tools", ROOT / "benchmarks"))
gc.set_threshold(50_000, 20, 50)  # imports and the rewriting of the tests' modules make much, and leave no garbage


def pytest_sessionstart():
    """On the built wheel (tools/on_wheel.py), the package under test is the wheel's and no other."""
    if wheel := os.environ.get("KERAS_VITS_WHEEL"):
        import keras_vits

        if not pathlib.Path(keras_vits.__file__).is_relative_to(wheel):
            raise pytest.UsageError(f"The tests were to run on the wheel in {wheel}, and import {keras_vits.__file__}.")


def pytest_ignore_collect(collection_path, config):
    """Where tests that run once are left out, the modules of such tests alone are not even imported."""
    if config.getoption("markexpr") == "not once" and collection_path.suffix == ".py":
        text = collection_path.read_text(encoding="utf-8")
        return bool(re.search(r"^pytestmark = \[?pytest\.mark\.once\b", text, re.MULTILINE)) or None
    return None


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("early") is None)


@pytest.fixture(scope="session", autouse=True)
def signatures_are_read_once():
    """Keras reads the signatures of a layer's class for every layer that it makes: a tenth of the time of a model."""
    from keras.src.layers import layer
    from keras.src.ops import operation

    def once(read):
        known = {}

        def reading(function):
            plain = getattr(function, "__func__", function)  # a method's is the same for all objects of the class
            of_object = plain is function and hasattr(plain, "__wrapped__")  # as Keras wraps each layer's `build`
            if of_object or not isinstance(plain, types.FunctionType) or "<locals>" in plain.__qualname__:
                return read(function)
            key = plain, plain is function
            return known[key] if key in known else known.setdefault(key, read(function))

        return reading

    names = vars(inspect) | {name: once(getattr(inspect, name)) for name in ("signature", "getfullargspec")}
    with pytest.MonkeyPatch.context() as patch:
        for module in (operation, layer):
            patch.setattr(module, "inspect", types.SimpleNamespace(**names))
        yield


@pytest.fixture(scope="session", autouse=True)
def plain_attributes_are_plain():
    """Keras asks of every attribute of a layer whether it is a variable, a layer or a list of them, and PyTorch asks
    again; a number, a string or a function is none of these: another tenth of the time of a model."""
    import keras
    from keras.src.layers import Layer

    if keras.backend.backend() == "tensorflow":  # whose own base class of layers takes notes, too
        yield
        return
    theirs, plain = Layer.__setattr__, {bool, int, float, str, type(None), types.FunctionType}
    registered = ("_parameters", "_modules", "_buffers")  # of PyTorch: such a name may be taken from there

    def assign(layer, name, value):
        held = layer.__dict__
        if type(value) in plain and "_tracker" in held and not any(name in held.get(kind, ()) for kind in registered):
            object.__setattr__(layer, name, value)
        else:
            theirs(layer, name, value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Layer, "__setattr__", assign)
        yield


@pytest.fixture(scope="module", autouse=True)
def cheap_garbage_collection():
    """Python does not look for garbage among what the imports left again and again: a tenth of all time was that."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed():
    """Initial weights, dropout and the order of the images are the same whatever ran before."""
    import keras

    keras.utils.set_random_seed(0)


@pytest.fixture(scope="session")
def timm():
    """The timm package, the numeric reference."""
    from timm_models import import_timm

    pytest.importorskip("torch")
    return import_timm()


@pytest.fixture
def short_timing(monkeypatch):
    """This machine measures in as many processes and at least as many runs as always, but for a tenth of the seconds.

    For tests that need a measurement and not its precision.
    """
    from keras_vits.edge.devices import host

    measured = host.in_turns

    def in_turns(children, device, min_runs, min_seconds, warmup_seconds, processes=1):
        return measured(children, device, min_runs, min_seconds / 10, warmup_seconds / 10, processes)

    monkeypatch.setattr(host, "in_turns", in_turns)


@pytest.fixture
def run(capsys):
    """Runs the command in this process; returns exit code, stdout and stderr."""
    from keras_vits import cli

    def run(*arguments):
        with pytest.raises(SystemExit) as stopped:
            cli.main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return stopped.value.code, out, err

    return run
