"""Loads published ImageNet weights, and tells what is on a picture.

    python examples/load_published_weights.py photo.jpg

--smoke needs no network: it builds the same model with random weights and looks at a picture of noise.
"""

import argparse

import numpy as np

import keras_vits

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("picture", nargs="?")
parser.add_argument("--model", default="mobilevit_xxs")
parser.add_argument(
    "--weights", default="timm/mobilevit_xxs.cvnets_in1k", help="a hub id, a folder or a .safetensors file"
)
parser.add_argument("--smoke", action="store_true", help="random weights and a picture of noise")
args = parser.parse_args()
if not args.picture and not args.smoke:
    parser.error("give a picture, or --smoke")

model = keras_vits.create(args.model, weights=None if args.smoke else args.weights)
noise = np.random.default_rng(0).integers(0, 256, (480, 640, 3)).astype("uint8")
for guess in keras_vits.predict(model, noise if args.smoke else args.picture):
    print(f"{guess.probability:6.1%}  {guess.label}")
