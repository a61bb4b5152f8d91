"""Trains a MobileViT v2 on a folder of images (one subfolder per class) and writes the file for an Android app.

    python examples/train_and_ship.py --data photos/ --out out/

Without --data it uses scikit-learn's handwritten digits; --smoke is a run of seconds that shows that everything works.
"""

import argparse

import keras_vits
from keras_vits import edge
from keras_vits.training import data, fit

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--data", default="digits", help="a folder with one subfolder per class, or 'digits'")
parser.add_argument("--out", default="out")
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--smoke", action="store_true", help="a tiny model, few pictures, one epoch")
args = parser.parse_args()

tiny = dict(stem_width=8, widths=(8, 8, 16, 16, 16), depths=(1,) * 5, token_widths=(8,) * 3, token_depths=(1,) * 3)
names = data.class_names(args.data)
model = keras_vits.create("mobilevitv2_050", num_classes=len(names), image_size=64, **(tiny if args.smoke else {}))

pictures = data.load(args.data, model.preprocessing, limit=32 if args.smoke else None)
trained = fit.fit(model, pictures.train, pictures.validation, epochs=1 if args.smoke else args.epochs)
print(f"{trained.top1:.1%} of the held-out pictures are right after {trained.epochs} epochs")

# A second run replaces the files of the first.
float32 = edge.litert.export(model, args.out, overwrite=True)
calibration = pictures.train.take(128).images()
int8 = edge.litert.quantize(float32, "static_int8", calibration=calibration, overwrite=True)

held_out = pictures.validation
for artifact in (float32, int8):
    check = edge.verify(artifact, against=model, images=held_out.images(), labels=held_out.labels)
    print(f"{artifact.path}  {artifact.size_bytes / 1e6:.2f} MB  top-1 {check.top1:.1%}  {check.sqnr_db:.0f} dB")
