"""Puts a model into this app, from a .keras file that `keras-vits train` wrote.

    python examples/ios/make_bundle.py out/mobilevitv2_050.keras --pictures photos/

--smoke takes a tiny untrained model instead: a run of seconds that shows that everything works.
"""

import argparse
import pathlib
import shutil
import tempfile

import keras_vits
from keras_vits import edge

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model", nargs="?", help="a .keras file")
parser.add_argument("--pictures", help="a folder: ten of them are for the self-test")
parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "Classifier.swiftpm/App")
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
    artifact = edge.coreml.export(model, folder, image_input=True)
    bundle = edge.bundle(artifact, pathlib.Path(folder) / "bundle", "ios", images=args.pictures)
    # What a developer does by hand: the source to the sources, the model beside them as a folder.
    args.out.mkdir(parents=True, exist_ok=True)
    shutil.copy(bundle.source, args.out)
    shutil.rmtree(args.out / "model", ignore_errors=True)
    shutil.copytree(bundle.model, args.out / "model")
print(f"{args.out}/: {bundle.source.name}, and model/ with {bundle.pictures} pictures to test itself")
