"""The contents of checkpoints.csv and imagenet_classes.txt in keras_vits/checkpoints/, from the installed timm.

`tools/generate.py` writes them, after a family or a new timm brought variants that have published weights. The
accuracies are those of timm's results, as tests/data/variants.csv has them. Left out are weights that are not on the
hub: timm fetches some I-JEPA encoders as pickles from their publisher.
"""

import csv
import io
import pathlib

import keras_vits
from keras_vits.checkpoints.catalogue import SPDX

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "keras_vits" / "checkpoints"
SHARED_LEMMAS = {"n02012849": "crane (bird)", "n03126707": "crane (machine)"}  # WordNet gives both the one name


def checkpoints(timm):
    """Content of checkpoints.csv: a row for each checkpoint of a registered variant that timm has on the hub."""
    known, top1 = set(keras_vits.list_models()), accuracies()
    rows = []
    for name in timm.list_pretrained():
        variant, _, tag = name.partition(".")
        cfg = timm.get_pretrained_cfg(name)
        if variant not in known or not cfg.hf_hub_id:
            continue
        data = timm.data.resolve_data_config(pretrained_cfg=cfg.to_dict())
        _, height, width = data["input_size"]
        rows.append(
            dict(
                variant=variant,
                tag=tag,
                hub_id=cfg.hf_hub_id,
                license=SPDX.get(cfg.license, cfg.license),
                num_classes=cfg.num_classes,
                top1=top1.get((variant, f"{tag}@{width}")),
                image_size=f"{height} {width}",
                mean=" ".join(map(str, data["mean"])),
                std=" ".join(map(str, data["std"])),
                crop=data["crop_pct"],
                crop_mode=data["crop_mode"],
                interpolation=data["interpolation"],
                channel_order="rgb",  # timm feeds RGB to every model, and knows no other order
            )
        )
    rows.sort(key=lambda row: (row["variant"], row["tag"]))
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def accuracies():
    """(variant, "tag@size") -> top-1 in percent; a row of timm's has tag@size=percent;tag@size=percent."""
    with open(ROOT / "tests" / "data" / "variants.csv", newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["source"].startswith("timm")]
    results = [(row["name"], result.split("=")) for row in rows for result in row["top1_timm"].split(";") if result]
    return {(variant, key): float(percent) for variant, (key, percent) in results}


def imagenet_classes(timm):
    """Content of imagenet_classes.txt: a class's first lemma, or all of them where two classes share the first."""
    info = timm.data.ImageNetInfo("imagenet-1k")
    synsets = info.label_names()
    lemmas = [info.label_name_to_description(synset, detailed=False) for synset in synsets]
    first = [text.partition(",")[0] for text in lemmas]
    names = [
        SHARED_LEMMAS.get(synset, short if first.count(short) == 1 else text)
        for synset, short, text in zip(synsets, first, lemmas, strict=True)
    ]
    return "".join(f"{name}\n" for name in names)
