"""Puts a model into one of the apps here, from a .keras file that `keras-vits train` wrote.

    python examples/make_bundle.py out/mobilevitv2_050.keras --platform android --pictures photos/

--smoke takes a tiny untrained model instead: a run of seconds that shows that everything works.
"""

import argparse
import pathlib
import shutil
import tempfile

import keras_vits
from keras_vits import edge

HERE = pathlib.Path(__file__).parent
PLATFORMS = {  # platform -> what writes its file, the app's folder, and where in it source and model go
    "android": (edge.litert.export, {}, HERE / "android/app/src/main", "java/imageclassifier", "assets/model"),
    "ios": (edge.coreml.export, {"image_input": True}, HERE / "ios/Classifier.swiftpm/App", "", "model"),
    "web": (edge.litert.export, {}, HERE / "web/bundle", "", "model"),
}

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model", nargs="?", help="a .keras file")
parser.add_argument("--platform", choices=PLATFORMS, required=True)
parser.add_argument("--pictures", help="a folder: ten of them are for the self-test")
parser.add_argument("--out", type=pathlib.Path, help="folder of the app's sources; that of the example by default")
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
export, options, folder, source, assets = PLATFORMS[args.platform]
source, assets = (args.out or folder) / source, (args.out or folder) / assets
with tempfile.TemporaryDirectory() as temporary:
    artifact = export(model, temporary, **options)
    bundle = edge.bundle(artifact, pathlib.Path(temporary) / "bundle", args.platform, images=args.pictures)
    # What a developer does by hand: the source to the sources, the model to the assets.
    source.mkdir(parents=True, exist_ok=True)
    shutil.copy(bundle.source, source)
    shutil.copytree(bundle.model, assets, dirs_exist_ok=True)  # what else lies there stays
print(f"{source / bundle.source.name} and {assets}/, with {bundle.pictures} pictures to test itself")
