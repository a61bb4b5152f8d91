"""Writes the bundle that this page runs, from a .keras file that `keras-vits train` wrote.

    python examples/web/make_bundle.py out/mobilevitv2_050.keras --pictures photos/

--smoke takes a tiny untrained model instead: a run of seconds that shows that everything works.
"""

import argparse
import pathlib
import tempfile

import keras_vits
from keras_vits import edge

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model", nargs="?", help="a .keras file")
parser.add_argument("--pictures", help="a folder: ten of them are for the self-test")
parser.add_argument("--out", default=pathlib.Path(__file__).with_name("bundle"), help="folder of the bundle")
parser.add_argument("--smoke", action="store_true", help="a tiny untrained model")
args = parser.parse_args()
if not args.model and not args.smoke:
    parser.error("give a .keras file, or --smoke")

if args.smoke:
    tiny = dict(image_size=32, patch_size=8, width=24, depth=1, heads=2, mlp_hidden=48)
    model = keras_vits.create("vit_tiny_patch16_224", num_classes=3, **tiny)
    model.class_names = ("cat", "dog", "tree")
else:
    model = keras_vits.load(args.model)
with tempfile.TemporaryDirectory() as folder:
    artifact = edge.litert.export(model, folder)
    bundle = edge.bundle(artifact, args.out, "web", images=args.pictures)
print(f"{bundle.path}: {bundle.source.name}, and {bundle.model.name}/ with {bundle.pictures} pictures to test itself")
