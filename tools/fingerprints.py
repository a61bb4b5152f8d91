"""Hashes of the files of sixteen models, to show that a change of the code leaves every file as it was.

    KERAS_BACKEND=jax python tools/fingerprints.py before.json      # at the old commit
    KERAS_BACKEND=jax python tools/fingerprints.py after.json before.json

The second command names every file whose bytes differ and ends with 1 if there is one. Weights and calibration images
come from a seeded generator. Hashes hold for one machine and one set of packages: numpy's sums depend on both.
"""

import hashlib
import json
import os
import pathlib
import sys
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))

import numpy as np
from coremltools.proto import Model_pb2
from families import FAMILIES

from keras_vits import edge

VARIATIONS = (  # of the tiny ViT, beside one tiny model of every family
    dict(attention="relu_linear"),
    dict(attention="separable"),
    dict(attention="cross_covariance"),
    dict(gated=True, activation="silu", qk_norm=True),
    dict(layer_scale=0.1, registers=2, pool="mean", activation="gelu_tanh"),
)


def models():
    """Name -> a tiny model with seeded weights; sixteen of them."""
    found = {family.variant: family.create() for family in FAMILIES}
    vit = next(family for family in FAMILIES if family.name == "vit")
    for variation in VARIATIONS:
        found["vit_" + "_".join(map(str, variation.values()))] = vit.create(**variation)
    return found


def fingerprint(path):
    """SHA-256 of a file, or of a package's files without its manifest, whose identifiers are random."""
    digest = hashlib.sha256()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in files:
        if file.name != "Manifest.json":
            digest.update(file.name.encode())
            content = file.read_bytes()
            if file.suffix == ".mlmodel":  # protobuf writes maps in any order
                content = Model_pb2.Model.FromString(content).SerializeToString(deterministic=True)
            digest.update(content)
    return digest.hexdigest()


def fingerprints():
    """File name -> hash, for every model, target and recipe below."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, model in models().items():
            shape = model.input_shape[1:]
            images = np.random.default_rng(1).normal(size=(8, *shape)).astype("float32")
            f32 = edge.litert.export(model, folder, name=name)
            files = [f32]
            for recipe in ("float16", "dynamic_int8", "static_int8", "weight_int4"):
                files.append(edge.litert.quantize(f32, recipe, images))
            files.append(edge.litert.export(model, folder, name=f"{name}_u8", uint8_input=True, head="softmax"))
            for precision in ("float32", "float16"):
                files.append(edge.coreml.export(model, folder, name=name, precision=precision))
            files.append(edge.coreml.quantize(files[-2], "int8"))
            found |= {artifact.path.name: fingerprint(artifact.path) for artifact in files}
            print(name, len(found), file=sys.stderr)
    return found


if __name__ == "__main__":
    now = fingerprints()
    pathlib.Path(sys.argv[1]).write_text(json.dumps(now, indent=1) + "\n")
    if len(sys.argv) > 2:
        before = json.loads(pathlib.Path(sys.argv[2]).read_text())
        changed = sorted(name for name in now.keys() | before.keys() if now.get(name) != before.get(name))
        print(f"{len(now)} files, {len(changed)} differ", *changed, sep="\n  ")
        sys.exit(bool(changed))
