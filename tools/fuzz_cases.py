"""What fuzz.py damages: a corpus of good files, and for every kind of file what is done with a damaged one."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import shutil
import struct

from fuzz_damage import damaged, damaged_archive, damaged_folder, damaged_json, overwrite

VARIANT = "vit_tiny_patch16_224"
TINY = dict(patch_size=16, width=32, depth=1, heads=2, mlp_hidden=64, image_size=32, num_classes=5)
NAMES = ("ant", "bee", "cat", "dog", "elk")

# ---------------------------------------------------------------- good files


def corpus(folder):
    """Writes one good file of every kind, of tiny models."""
    import keras_vits
    from keras_vits.training import fit

    fit.set_seed(0)
    model = keras_vits.create(VARIANT, class_names=NAMES, **TINY)
    _pictures(folder)
    _artifacts(folder, model)
    _checkpoints(folder, model)
    _training(folder, model)
    _reports(folder)


def _artifacts(folder, model):
    """A file of every target, quantized ones, a classifier, some of several inputs and outputs, and one that was
    fine-tuned for a recipe; a bundle of one."""
    import keras
    import numpy as np

    from keras_vits import edge
    from keras_vits._util.keras_private import without_tensorflow

    images = np.random.default_rng(1).uniform(-1, 1, (4, 32, 32, 3)).astype("float32")
    image, numbers = keras.Input((8, 8, 3), name="image"), keras.Input((4,), name="numbers")
    x = keras.layers.Flatten()(keras.layers.Conv2D(4, 3, name="stem")(image))
    scores = keras.layers.Dense(5, name="scores")(keras.layers.Concatenate()([x, numbers]))
    several = keras.Model([image, numbers], {"scores": scores, "features": keras.layers.Dense(3, name="more")(x)})
    with contextlib.suppress(ImportError):
        first = edge.litert.export(model, folder / "files", name="model")
        edge.litert.quantize(first, "static_int8", images)
        edge.litert.export(several, folder / "files", name="several")
        edge.litert.export(edge.qat(model, "static_int8", images), folder / "files", name="tuned")
        edge.bundle(first, folder / "bundle", "android")
    with contextlib.suppress(ImportError):
        edge.onnx.quantize(edge.onnx.export(model, folder / "files", name="model"), "static_int8", images)
        edge.onnx.export(several, folder / "files", name="several")
    with contextlib.suppress(ImportError):
        edge.coreml.quantize(edge.coreml.export(model, folder / "files", name="model"), "int8")
        edge.coreml.export(several, folder / "files", name="several")
        edge.coreml.export(model, folder / "files", name="classifier", image_input=True)
    edge.keras_file.export(model, folder / "files", name="model")
    with without_tensorflow():
        several.save(folder / "several.keras")


def _pictures(folder):
    """Pictures of every format, and a folder of them with a subfolder for each of two classes."""
    import numpy as np
    from PIL import Image

    (folder / "pictures").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (40, 50, 3), "uint8")
    for suffix in ("png", "jpg", "tif", "pgm", "gif", "bmp", "webp"):
        picture = Image.fromarray(pixels).convert("L" if suffix == "pgm" else "RGB")
        with contextlib.suppress(KeyError):  # a Pillow that cannot write it
            picture.save(folder / "pictures" / f"picture.{suffix}")
    Image.fromarray(pixels[..., 0].astype("uint16") * 200).save(folder / "pictures" / "deep.png")
    Image.fromarray(pixels).quantize(16).save(folder / "pictures" / "palette.png")
    for i, suffix in enumerate(("png", "jpg", "bmp", "png", "jpg", "gif")):
        (folder / "photos" / NAMES[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.roll(pixels, 7 * i, 0)).save(folder / "photos" / NAMES[i % 2] / f"{i}.{suffix}")


def _checkpoints(folder, model):
    """Folders in the layouts of timm and transformers, and a pickled file."""
    import keras
    import numpy as np
    import torch
    from safetensors.numpy import save_file

    from keras_vits.checkpoints import assign

    tensors = {}  # timm's names and layout
    for variable in model.weights:
        if not variable.path.endswith("seed_generator_state"):
            row, numbers, rest = assign._row(model.names["timm"], variable.path)
            target = "pos_embed" if variable.path == "position/table" else model.names["timm"][row]
            value = np.asarray(keras.ops.convert_to_numpy(variable))
            value = value.T if value.ndim == 2 else value.transpose(3, 2, 0, 1) if value.ndim == 4 else value
            tensors[assign._sources(target, numbers, rest)[0]] = np.ascontiguousarray(value)
    (folder / "timm").mkdir(parents=True)
    save_file(tensors, folder / "timm" / "model.safetensors")
    published = dict(
        input_size=[3, 32, 32], mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5], interpolation="bicubic", crop_pct=0.9
    ) | dict(crop_mode="center", tag="in1k", license="mit", num_classes=5, label_names=NAMES)
    args = dict(img_size=32, patch_size=16, embed_dim=32, depth=1, num_heads=2, mlp_ratio=2.0, act_layer="gelu")
    args |= dict(global_pool="token", fc_norm=False, class_token=True, reg_tokens=0, init_values=None, qkv_bias=True)
    config = dict(architecture=VARIANT, num_classes=5, global_pool="token", model_args=args, pretrained_cfg=published)
    (folder / "timm" / "config.json").write_text(json.dumps(config))
    torch.save(
        {"model": {name: torch.from_numpy(t.copy()) for name, t in tensors.items()}, "epoch": 3},
        folder / "timm" / "model.pt",
    )

    (folder / "transformers").mkdir()
    renamed = {_of_transformers(name): tensor for name, tensor in tensors.items() if ".qkv." not in name}
    for name, tensor in tensors.items():
        if ".qkv." in name:
            for part, value in zip(("query", "key", "value"), np.split(tensor, 3), strict=True):
                layer, leaf = name.split(".")[1], name.rpartition(".")[2]
                renamed[f"vit.encoder.layer.{layer}.attention.attention.{part}.{leaf}"] = np.ascontiguousarray(value)
    save_file(renamed, folder / "transformers" / "model.safetensors")
    config = dict(model_type="vit", image_size=32, patch_size=16, num_attention_heads=2, layer_norm_eps=1e-12)
    config |= dict(hidden_act="gelu", qkv_bias=True, id2label={str(i): name for i, name in enumerate(NAMES)})
    (folder / "transformers" / "config.json").write_text(json.dumps(config))
    processor = dict(do_resize=True, size=dict(height=32, width=32), do_rescale=True, rescale_factor=1 / 255)
    processor |= dict(resample=2, do_normalize=True, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_center_crop=False)
    (folder / "transformers" / "preprocessor_config.json").write_text(json.dumps(processor))


def _training(folder, model):
    """The checkpoint of a training of one epoch on the folder of pictures."""
    import keras_vits
    from keras_vits.training import data, fit

    net = keras_vits.create(VARIANT, **{**TINY, "num_classes": 2})
    (folder / "training").mkdir()
    read = data.load(folder / "photos", net.preprocessing)
    fit.fit(net, read.train, read.validation, epochs=1, checkpoint=folder / "training" / "v.checkpoint.keras")


def _reports(folder):
    """Xcode's report of a Core ML file, and one of ours."""
    part = lambda *samples: {"samples": samples, "startTime": 7e8}
    operation = {"deviceUsage": {"preferred": {"deviceType": {"gpu": {}}}}, "cost": {"weight": 0.5}, "blocks": []}
    block = {"operations": [operation | {"blocks": [{"operations": [operation]}]}, {"operatorName": "const"}]}
    results = {"predict": part(*[0.01] * 12), "load": part(0.2, 0.1), "compile": part(0.3)}
    results |= {"perfRunConfig": {"experimentIterations": 3}}
    results |= {"modelStructure": {"program": {"_0": {"functions": {"main": {"block": block}}}}}}
    beside = folder / "files" / "model_float16.mlpackage.json"
    size = json.loads(beside.read_text())["size_bytes"] if beside.is_file() else 1
    report = {"jsonVersion": 1, "modelMetadata": {"fileName": "model_float16", "size": size}, "computeUnit": 2}
    report |= {"deviceInfo": {"modelName": "iPhone 16 Pro", "osNameAndVersionWithoutBuildNumber": "iOS 26.5"}}
    (folder / "xcode" / "phone.mlperf").mkdir(parents=True)
    (folder / "xcode" / "phone.mlperf" / "report.json").write_text(json.dumps(report | {"deviceResults": results}))


def _of_transformers(name):
    for theirs, ours in (
        ("cls_token", "vit.embeddings.cls_token"),
        ("pos_embed", "vit.embeddings.position_embeddings"),
        ("patch_embed.proj", "vit.embeddings.patch_embeddings.projection"),
        ("blocks.", "vit.encoder.layer."),
        (".attn.proj", ".attention.output.dense"),
        (".norm1.", ".layernorm_before."),
        (".norm2.", ".layernorm_after."),
        (".mlp.fc1", ".intermediate.dense"),
        (".mlp.fc2", ".output.dense"),
        ("head.", "classifier."),
    ):
        name = name.replace(theirs, ours)
    return name.replace("norm.", "vit.layernorm.", 1) if name.startswith("norm.") else name


# ---------------------------------------------------------------- what is done with a damaged one


class AcceptedError(Exception):
    """A file was accepted that is not the one described, or what is the user's was changed."""


def artifact(name, what):
    """A case of an artifact: its bytes with the old hash, its bytes with a hash that fits, or its description."""

    def case(random, given, folder):
        from keras_vits._util import files
        from keras_vits.edge import artifact

        path, beside = _copied(name, given, folder)
        before = files.sha256(path)
        if what == "description":
            overwrite(beside, lambda data: damaged_json(random, data.decode()))
        elif path.is_dir():
            part = random.choice([p for p in sorted(path.rglob("*")) if p.is_file()])
            change = damaged_json if part.suffix == ".json" else damaged
            overwrite(part, lambda data: change(random, data.decode() if part.suffix == ".json" else data))
        elif path.suffix == ".keras" and random.random() < 0.8:
            damaged_archive(random, path, random.choice(("config.json", "metadata", "weights")))
        else:
            overwrite(path, lambda data: damaged(random, data))
        if what == "bytes with their hash":
            described = json.loads(beside.read_text())
            beside.write_text(json.dumps(described | dict(sha256=files.sha256(path), size_bytes=files.size(path))))
        with told(folder):
            loaded = artifact.load(path)
            if files.sha256(path) != before and what == "bytes":
                raise AcceptedError("other bytes than those described were accepted")
            _used(random, loaded, folder)

    return case


def _used(random, loaded, folder):
    """Runs a file that was accepted, and gives some to the others who read them."""
    import numpy as np

    from keras_vits import edge
    from keras_vits.edge.targets import _protocol

    made = _protocol.target(loaded.format)
    runner = made.load(loaded)
    runner.histogram()
    inputs = {}
    for spec in loaded.inputs:
        if _affordable(spec.shape):
            inputs[spec.name] = np.zeros((2, *spec.shape[1:]), "uint8" if spec.takes_pixels else spec.dtype)
    if len(inputs) == len(loaded.inputs):
        runner.predict(inputs)
        made.traits.partitions(runner)
        made.traits.offenders(loaded)
        use = random.choice(("quantize", "half", "", "", "", ""))
        if use == "quantize" and made.quantize and loaded.recipe in ("float32", "float16"):
            recipe = "int8" if loaded.format == "coreml" else "dynamic_int8"
            made.quantize(loaded, recipe, None, folder / "quantized")
        elif use == "half" and loaded.format in ("litert", "onnx"):
            edge.verify(loaded, images=inputs, precision="float16")


def _affordable(shape):
    size = 1
    for n in shape:
        size *= max(n, 0)
    return size < 10**7


def tuned(random, given, folder):
    """A case of what a description tells of the ranges that a fine-tuning chose, which the quantizer takes."""
    from keras_vits import edge

    path, beside = _copied("tuned_float32.tflite", given, folder)
    described = json.loads(beside.read_text())
    text = damaged_json(random, json.dumps(described.pop("trained_for"))).decode(errors="replace")
    beside.write_text(json.dumps(described)[:-1] + f', "trained_for": {text}}}', encoding="utf-8")
    with told(folder):
        loaded = edge.artifact.load(path)
        if loaded.trained_for.get("recipe") != "static_int8":
            raise ClearError("it has no ranges for this recipe")
        edge.litert.quantize(loaded, "static_int8", None, folder / "quantized")


def bundle(random, given, folder):
    """A case of a bundle that is written again: its list of files, or files of it."""
    from keras_vits import edge

    app, mine = folder / "app", {"notes.txt": b"mine", "app/notes.txt": b"mine", "app/model/notes.txt": b"mine"}
    shutil.copytree(given / "bundle", app)
    for name, content in mine.items():
        (folder / name).write_bytes(content)
    if random.random() < 0.7:
        _json(random, app / "model" / "files.json")
    else:
        overwrite(random.choice(sorted(p for p in app.rglob("*.*") if p.is_file())), lambda data: damaged(random, data))
        mine = {name: (folder / name).read_bytes() for name in mine}
    try:
        with told(folder):
            platform = random.choice(("android", "web"))
            edge.bundle(edge.artifact.load(given / "files" / "model_float32.tflite"), app, platform)
    finally:
        found = {name: (folder / name).read_bytes() for name in mine if (folder / name).is_file()}
        if found != mine:
            raise AcceptedError("a bundle changed a file of the user's")


def checkpoint(source, file, change):
    """A case of a checkpoint's folder with one damaged file."""

    def case(random, given, folder):
        import keras_vits

        shutil.copytree(given / source, folder / source)
        change(random, folder / source / file)
        weights = folder / source / ("" if file.endswith((".json", ".safetensors")) else file)
        shape = {k: v for k, v in TINY.items() if k in ("width", "depth", "mlp_hidden", "patch_size")}
        if not weights.is_dir():
            shape = {k: v for k, v in TINY.items() if k != "num_classes"}
        with told(folder):
            keras_vits.create(VARIANT, weights=weights, allow_pickle=True, **shape)

    return case


def training(random, given, folder):
    """A case of a checkpoint that a training is continued from."""
    from keras_vits.training import fit

    path = folder / "v.checkpoint.keras"
    shutil.copy(given / "training" / path.name, path)
    part = random.choice(("training.json", "training.json", "training.json", "config.json", "metadata", "weights", ""))
    damaged_archive(random, path, part) if part else _bytes(random, path)
    before = path.read_bytes()
    net, read = _begun(given)
    try:
        with told(folder):
            fit.fit(net, read.train, read.validation, epochs=2, checkpoint=path, resume=True)
    except ValueError:
        if path.read_bytes() != before:
            raise AcceptedError("a checkpoint that was refused was replaced") from None
        raise


@functools.cache
def _begun(given):
    """The model and the pictures of the training that is continued."""
    import keras_vits
    from keras_vits.training import data

    net = keras_vits.create(VARIANT, **{**TINY, "num_classes": 2})
    return net, data.load(given / "photos", net.preprocessing)


def keras_model(name):
    """A case of a .keras file without a description."""

    def case(random, given, folder):
        import keras_vits

        path = folder / "model.keras"
        shutil.copy(given / name, path)
        if random.random() < 0.8:
            damaged_archive(random, path, random.choice(("config.json", "config.json", "metadata", "weights")))
        else:
            _bytes(random, path)
        with told(folder):
            keras_vits.load(path)

    return case


def picture(random, given, folder):
    """A case of a picture."""
    from keras_vits.preprocess import Preprocessing

    source = random.choice(sorted((given / "pictures").iterdir()))
    path = folder / source.name
    path.write_bytes(damaged(random, source.read_bytes()))
    with told(folder):
        Preprocessing(image_size=(32, 32))(path)


def photos(random, given, folder):
    """A case of a folder of pictures, for a training or for calibration."""
    from keras_vits.edge import artifact
    from keras_vits.edge.quantize.calibration import batches
    from keras_vits.preprocess import Preprocessing
    from keras_vits.training import data

    shutil.copytree(given / "photos", folder / "photos")
    damaged_folder(random, folder / "photos")
    with told(folder):
        if random.random() < 0.5:
            read = data.load(folder / "photos", Preprocessing(image_size=(32, 32)))
            read.warning()
            read.train.fingerprint()
        else:
            inputs = artifact.load(given / "files" / "model_float32.tflite").inputs
            list(batches(folder / "photos", inputs, "reading images"))


def xcode(random, given, folder):
    """A case of a report that Xcode exported."""
    from keras_vits.edge import artifact
    from keras_vits.edge.devices import ios

    shutil.copytree(given / "xcode", folder / "xcode")
    _json(random, folder / "xcode" / "phone.mlperf" / "report.json")
    with told(folder):
        measured = artifact.load(given / "files" / "model_float16.mlpackage")
        for found in ios.measure([measured], str(folder / "xcode"), accelerators=None):
            if not 0 <= found.p10_ms <= found.median_ms <= found.p99_ms < math.inf:
                raise AcceptedError(f"impossible times were accepted: {found}")


def page(random, given, folder):
    """A case of what a browser's page posts."""
    import msgspec

    from keras_vits.edge.devices import browser_server

    about = dict(agent="x", browser="x", device="", platform="x", cores=4, isolated=True, gpu="", software_gpu=False)
    answers = {"load": {"load_ms": 3.5, "whole": True}, "check": {"errors": {"scores": 1e-5, "other": None}}}
    answers |= {"run": {"ms": [1.0, 2.5]}, "drop": {}, "open": about}
    task = random.choice(sorted(answers))
    sent = damaged_json(random, json.dumps(random.choice((answers[task], answers[task], {"error": "x"}))))
    try:
        if task == "open":
            msgspec.json.decode(sent, type=browser_server.About)
        else:
            browser_server._answered(task, sent)
    except (ValueError, RecursionError, msgspec.MsgspecError) as e:  # which the server answers
        raise ClearError(str(e)) from None


def replaced(random, given, folder):
    """A case of a file that tells whether its neighbours may be replaced: of a report, and of a demo."""
    from keras_vits.cli import demo_job
    from keras_vits.edge import artifact
    from keras_vits.edge.evidence.report import Row, report

    mine = folder / "vit.keras"
    mine.write_text("mine")
    listed = {
        "report.json": {"model": "v", "rows": [], "environment": {}},
        "demo.json": {"files": {mine.name: "0" * 64}},
    }
    for name, content in listed.items():
        (folder / name).write_bytes(damaged_json(random, json.dumps(content)))
    try:
        with told(folder):
            if random.random() < 0.5:
                demo_job._check_names(folder, "vit", resume=False, overwrite=False)
                raise AcceptedError("a demo would replace a file that no demo wrote")
            report(
                [Row(artifact.load(given / "files" / "model_float32.tflite"))], folder / "report.html", environment={}
            )
    finally:
        if mine.read_text() != "mine":
            raise AcceptedError("a file of the user's was changed")


def _header(random, path):
    """Damages the JSON at the head of a .safetensors file, whose length is put right again."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = damaged_json(random, data[8 : 8 + length].decode())
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])


def _bytes(random, path):
    overwrite(path, lambda data: damaged(random, data))


def _json(random, path):
    overwrite(path, lambda data: damaged_json(random, data.decode()))


def _pickle(random, path):
    damaged_archive(random, path, random.choice(("data.pkl", "data.pkl", "data/", "")))


def kinds(given):
    """Name -> case, for all that this machine can write."""
    found = {}
    for file in sorted(p.name for p in (given / "files").iterdir() if p.suffix != ".json" and p.name[0] != "."):
        for what in ("bytes", "bytes with their hash", "description"):
            if not (file.startswith("tuned") or (file.endswith(".keras") and what == "bytes")):
                found[f"{file}: {what}"] = artifact(file, what)
    if (given / "files" / "tuned_float32.tflite").is_file():
        found |= {"ranges of a fine-tuned file": tuned, "bundle": bundle}
    if (given / "files" / "model_float16.mlpackage").is_dir():
        found["Xcode's report"] = xcode
    _begun(given)  # before there are forks
    return {
        **found,
        "model.keras": keras_model("files/model.keras"),
        "another package's .keras": keras_model("several.keras"),
        "training's checkpoint": training,
        ".safetensors": checkpoint("timm", "model.safetensors", _bytes),
        ".safetensors: header": checkpoint("timm", "model.safetensors", _header),
        ".pt": checkpoint("timm", "model.pt", _bytes),
        ".pt: members": checkpoint("timm", "model.pt", _pickle),
        "timm's config.json": checkpoint("timm", "config.json", _json),
        "transformers' config.json": checkpoint("transformers", "config.json", _json),
        "preprocessor_config.json": checkpoint("transformers", "preprocessor_config.json", _json),
        "pictures": picture,
        "folders of pictures": photos,
        "a browser's answers": page,
        "report.json, demo.json": replaced,
    }


def _copied(name, given, folder):
    """The paths of copies of an artifact and of its description."""
    path, beside = folder / name, folder / f"{name}.json"
    _copy(given / "files" / name, path)
    shutil.copy(given / "files" / beside.name, beside)
    return path, beside


def _copy(source, target):
    (shutil.copytree if source.is_dir() else shutil.copy)(source, target)


class ClearError(Exception):
    """A refusal that names the file."""


@contextlib.contextmanager
def told(folder):
    """Turns a `ValueError` that names the folder, or a file in it, into `ClearError`."""
    try:
        yield
    except ValueError as e:
        names = {str(folder), *(path.name for path in folder.rglob("*"))}
        if any(name in str(e) for name in names):
            raise ClearError(str(e)) from None
        raise
