"""Every backend traces the same Graph: of the families, and of expressions with a tensor to the left of the image."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import keras
import pytest
from expressions import LEFT, left
from families import FAMILIES, signature

from keras_vits.edge import trace


def graphs():
    """Name -> what is traced."""
    families = {family.name: signature(trace(family.create())) for family in FAMILIES}
    return families | {name: signature(trace(left(name))) for name in LEFT}


@pytest.mark.once
def test_same_graph_on_every_backend(tmp_path):
    """Each other backend traces the same models in a process of its own."""
    program = "import json, sys; from test_backends import graphs; json.dump(graphs(), open(sys.argv[1], 'w'))"
    tests, running = pathlib.Path(__file__).parents[1], {}
    for backend in ("tensorflow", "jax", "torch"):
        if backend == keras.backend.backend() or importlib.util.find_spec(backend) is None:
            continue
        environment = {
            **os.environ,
            "KERAS_BACKEND": backend,
            "PYTHONPATH": os.pathsep.join([str(tests), str(tests / "graph")]),
        }
        out = tmp_path / f"{backend}.json"
        running[backend] = out, subprocess.Popen([sys.executable, "-c", program, str(out)], env=environment)
    assert running, "no second backend is installed: there is nothing to compare with"
    here = json.loads(json.dumps(graphs()))
    for backend, (out, process) in running.items():
        assert process.wait() == 0, backend
        there = json.loads(out.read_text())
        assert not [name for name in here if here[name] != there[name]], backend
