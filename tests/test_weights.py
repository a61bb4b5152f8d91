"""Published weights: every way in, every way a file does not fit, and the model untouched when it does not."""

import contextlib
import json
import re
import shutil
import subprocess
import sys

import families
import keras
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import keras_vits
from keras_vits import checkpoints
from keras_vits._util import keras_private
from keras_vits.checkpoints import assign as weights
from keras_vits.models import _registry as registry

FAMILY = next(f for f in families.FAMILIES if f.name == "vit")  # the table's mechanism is the same for all


def exported(model, table=None):
    """The model's weights under timm's names and in PyTorch's layout: the inverse of loading, written out by hand."""
    tensors = {}
    for variable in model.weights:
        if variable.path.endswith("seed_generator_state"):
            continue
        value = keras.ops.convert_to_numpy(variable)
        row, numbers, rest = weights._row(model.names["timm"], variable.path)
        target = "pos_embed" if variable.path == "position/table" else model.names["timm"][row]
        (name,) = weights._sources(target, numbers, rest)
        if name.endswith("weight") and value.ndim > 1:
            value = value.T if value.ndim == 2 else value.transpose(3, 2, 0, 1)
        tensors[name] = np.ascontiguousarray(value)
    return tensors


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder in the hub's layout and the model whose weights it holds."""
    folder = tmp_path_factory.mktemp("vit_tiny")
    model = FAMILY.create()
    save_file(exported(model), folder / "model.safetensors")
    config = {
        "architecture": FAMILY.variant,
        "num_classes": 5,
        "label_names": ["ant", "bee", "cat", "dog", "elk"],
        "pretrained_cfg": {
            "input_size": [3, 32, 32],
            "mean": [0.1, 0.2, 0.3],
            "std": [0.4, 0.5, 0.6],
            "interpolation": "bilinear",
            "crop_pct": 0.75,
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder, model


SHAPE = {k: v for k, v in FAMILY.tiny.items() if k not in ("num_classes", "image_size")}


def create(source, **overrides):
    return keras_vits.create(FAMILY.variant, weights=source, **{**SHAPE, **overrides})


def arrays(model):
    return {v.path: keras.ops.convert_to_numpy(v) for v in model.weights if not v.path.endswith("seed_generator_state")}


def same(a, b, without=()):
    assert a.keys() == b.keys()
    return all(np.array_equal(a[path], b[path]) for path in a if not path.startswith(tuple(without) or "/"))


def test_folder_sets_everything(published):
    folder, original = published
    model = create(folder)
    assert same(arrays(model), arrays(original))
    assert model.cfg == original.cfg
    assert model.class_names == ["ant", "bee", "cat", "dog", "elk"]
    p = model.preprocessing
    assert (p.image_size, p.mean, p.std) == ((32, 32), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (p.interpolation, p.crop, p.channel_order) == ("bilinear", 0.75, "rgb")


def test_file_and_hub_id(published, monkeypatch):
    folder, original = published
    model = create(folder / "model.safetensors", image_size=32)
    assert same(arrays(model), arrays(original))
    assert model.class_names is None
    asked = []
    monkeypatch.setattr(checkpoints.files, "download", lambda hub_id: asked.append(hub_id) or folder)
    assert same(arrays(create("somebody/vit.mine_in1k")), arrays(original))
    assert asked == ["somebody/vit.mine_in1k"]


def test_other_number_of_classes_leaves_a_random_head(published):
    folder, original = published
    model = create(folder, num_classes=7)
    assert model.cfg.num_classes == 7 and model.class_names is None
    assert model.get_layer("head").kernel.shape == (24, 7)
    ours, theirs = arrays(model), arrays(original)
    for path in ours.keys() - {"head/kernel", "head/bias"}:
        np.testing.assert_array_equal(ours[path], theirs[path])
    headless = create(folder, num_classes=0)
    assert headless.output_shape == (None, 24)


def test_load_weights_into_an_existing_model(published):
    folder, original = published
    model = FAMILY.create()
    families.randomize(model, seed=7)
    head = arrays(model)["head/kernel"]
    assert keras_vits.load_weights(model, folder, skip=("head",)) is model
    assert same(arrays(model), arrays(original), without=["head"])
    np.testing.assert_array_equal(arrays(model)["head/kernel"], head)
    keras_vits.load_weights(model, folder)
    assert same(arrays(model), arrays(original))


def test_every_misfit_is_named_and_nothing_is_changed(published, tmp_path):
    folder, _ = published
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("blocks.0.norm1.weight")
    tensors.pop("cls_token")
    tensors["blocks.2.norm1.weight"] = np.ones(24, "float32")
    tensors["surplus"] = np.ones(3, "float32")
    tensors["norm.bias"] = np.ones(23, "float32")
    tensors["blocks.1.mlp.fc1.weight"] = np.ones((24, 47), "float32")
    save_file(tensors, tmp_path / "misfit.safetensors")
    model = families.randomize(FAMILY.create(), seed=3)
    before = arrays(model)
    with pytest.raises(ValueError) as error:
        keras_vits.load_weights(model, tmp_path / "misfit.safetensors")
    first, *lines = str(error.value).splitlines()
    assert "misfit.safetensors does not fit vit_tiny_patch16_224" in first
    listed = {line.split(":")[0].strip(): line for line in lines}
    missing, left, shapes = (
        listed[k] for k in ("missing in the file (2)", "left over in the file (2)", "of another shape (2)")
    )
    assert "blocks.0.norm1.weight" in missing and "cls_token" in missing
    assert "blocks.2.norm1.weight" in left and "surplus" in left
    assert "norm/beta" in shapes and "(23,)" in shapes and "block_1/mlp/fc1/kernel" in shapes and "(47, 24)" in shapes
    assert same(before, arrays(model))


def test_another_variant_is_said_first(published):
    folder, _ = published
    with pytest.raises(ValueError, match=r"holds weights of 'vit_tiny_patch16_224', not of 'mixer_s32_224'") as error:
        keras_vits.create("mixer_s32_224", weights=folder)
    assert "cls_token" in str(error.value) and "blocks.0.mlp_tokens.fc1.weight" in str(error.value)
    with pytest.raises(ValueError, match=r"not of 'mobilevitv2_050'.*multiples of 64"):
        keras_vits.create("mobilevitv2_050", weights=folder)


@pytest.mark.parametrize("kept", [0, 7, 100, 0.5, -1])
def test_truncated_safetensors(published, tmp_path, kept):
    content = (published[0] / "model.safetensors").read_bytes()
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(content[: int(len(content) * kept) if isinstance(kept, float) else kept])
    model = FAMILY.create()
    before = arrays(model)
    with pytest.raises(ValueError, match=r"broken\.safetensors is truncated or not a safetensors file") as error:
        keras_vits.load_weights(model, broken)
    assert "\n" not in str(error.value)
    assert same(before, arrays(model))


def test_folder_with_parts_missing(published, tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        create(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"has no model\.safetensors"):
        create(tmp_path)
    shutil.copy(published[0] / "model.safetensors", tmp_path)
    with pytest.raises(ValueError, match=r"config\.json is not a JSON object"):
        create(tmp_path)
    with pytest.raises(ValueError, match=r"No such file or folder: \./nowhere\.safetensors"):
        create("./nowhere.safetensors")


def test_pickles_need_permission(published, tmp_path):
    torch = pytest.importorskip("torch")
    folder, original = published
    tensors = {k: torch.from_numpy(v) for k, v in load_file(folder / "model.safetensors").items()}
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "plain.pth")
    model = families.randomize(FAMILY.create(), seed=5)
    with pytest.raises(ValueError, match="allow_pickle=True"):
        keras_vits.load_weights(model, tmp_path / "plain.pth")
    with pytest.raises(ValueError, match="allow_pickle=True"):
        create(tmp_path / "plain.pth")
    keras_vits.load_weights(model, tmp_path / "plain.pth", allow_pickle=True)
    assert same(arrays(model), arrays(original))

    torch.save(Malicious(), tmp_path / "code.pt")
    with pytest.raises(ValueError, match=r"code\.pt is truncated, or holds more than tensors"):
        keras_vits.load_weights(model, tmp_path / "code.pt", allow_pickle=True)
    assert not Malicious.ran


class Malicious:
    """An object that runs code when it is unpickled."""

    ran = False

    def __reduce__(self):
        return setattr, (Malicious, "ran", True)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_files(published, tmp_path, dtype):
    import ml_dtypes  # noqa: F401

    tensors = {k: v.astype(dtype) for k, v in load_file(published[0] / "model.safetensors").items()}
    save_file(tensors, tmp_path / "half.safetensors")
    model = create(tmp_path / "half.safetensors", image_size=48)
    kernel = arrays(model)["block_1/mlp/fc1/kernel"]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel, tensors["blocks.1.mlp.fc1.weight"].T.astype("float32"))


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_input_channels_are_adapted_as_in_timm(timm, published, channels):
    import torch

    folder, _ = published
    given = load_file(folder / "model.safetensors")["patch_embed.proj.weight"]
    expected = timm.models._manipulate.adapt_input_conv(channels, torch.from_numpy(given)).numpy()
    kernel = arrays(create(folder, in_channels=channels))["stem/kernel"]
    np.testing.assert_allclose(kernel, expected.transpose(2, 3, 1, 0), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("size", [(64, 64), (16, 16), (24, 40), (104, 8)])
def test_positions_are_resampled_as_in_timm(timm, published, size):
    import torch

    folder, original = published
    given = torch.from_numpy(arrays(original)["position/table"])
    expected = timm.layers.resample_abs_pos_embed(given, [s // 8 for s in size]).numpy()
    model = create(folder, image_size=size)
    assert model.preprocessing.image_size == size
    np.testing.assert_allclose(arrays(model)["position/table"], expected, atol=1e-6)


def test_positions_of_no_square_grid_do_not_fit(published, tmp_path):
    tensors = load_file(published[0] / "model.safetensors")
    tensors["pos_embed"] = tensors["pos_embed"][:, :15]
    save_file(tensors, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match=r"position/table is \(1, 17, 24\), the file's \(1, 15, 24\)"):
        create(tmp_path / "odd.safetensors", image_size=32)


class Table(keras.Model):
    """Two layers behind a table that uses every kind of row."""

    def __init__(self):
        image = keras.Input((4,))
        x = keras.layers.Dense(6, name="block_0")(image)
        x = keras.layers.Dense(6, name="block_1")(x)
        super().__init__(image, keras.layers.Dense(2, name="head")(x))

    names = {
        "timm": {
            "block_{i}": ("layer{i}.q", "layer{i}.k", "layer{i}.v"),
            "block_1": "second",
            "block_1/bias": lambda take, model: take("shift") * 2,
            "head": None,
            None: ("teacher",),
        }
    }


def test_every_kind_of_row(tmp_path):
    random = np.random.default_rng(0)
    tensors = {f"layer0.{part}.weight": random.normal(size=(2, 4)).astype("float32") for part in "qkv"}
    tensors |= {f"layer0.{part}.bias": random.normal(size=2).astype("float32") for part in "qkv"}
    tensors |= {"second.weight": random.normal(size=(6, 6, 1, 1)).astype("float32"), "shift": np.ones(6, "float32")}
    tensors |= {"teacher.weight": np.ones(1, "float32"), "bn.num_batches_tracked": np.array(3)}
    save_file(tensors, tmp_path / "table.safetensors")
    model = Table()
    head = arrays(model)["head/kernel"]
    keras_vits.load_weights(model, tmp_path / "table.safetensors")
    found = arrays(model)
    joint = {leaf: np.concatenate([tensors[f"layer0.{part}.{leaf}"] for part in "qkv"]) for leaf in ("weight", "bias")}
    np.testing.assert_array_equal(found["block_0/kernel"], joint["weight"].T)
    np.testing.assert_array_equal(found["block_0/bias"], joint["bias"])
    np.testing.assert_array_equal(found["block_1/kernel"], tensors["second.weight"][..., 0, 0].T)
    np.testing.assert_array_equal(found["block_1/bias"], np.full(6, 2.0))
    np.testing.assert_array_equal(found["head/kernel"], head)
    with pytest.raises(ValueError, match="no weight table for 'cvnets'; it has: timm"):
        keras_vits.load_weights(model, tmp_path / "table.safetensors", format="cvnets")


@pytest.mark.once
def test_no_row_of_a_table_is_dead():
    """Every row of every table is the one that some variant, made small, takes for one of its weights."""
    variants = [(registry.lookup(v)[0], v, family.small) for family in families.FAMILIES for v in family.variants]
    rows = lambda cls: {(f, row, str(target)) for f, table in cls.names.items() for row, target in table.items() if row}
    dead = set().union(*(rows(cls) for cls, _, _ in variants))
    for cls, variant, small in variants:
        if dead.isdisjoint(rows(cls)):
            continue
        with keras_private.values_later():
            model = keras_vits.create(variant, **small)
        for format, table in cls.names.items():
            for variable in model.weights:
                with contextlib.suppress(ValueError):  # a variant that this source does not have
                    row, _, _ = weights._row(table, variable.path)
                    dead.discard((format, row, str(table[row])))
    assert not dead


MODEL_ARGS = [  # of timm -> fields of our Config
    (dict(global_pool="avg"), dict(pool="mean", norm="pooled")),
    (dict(global_pool="avg", fc_norm=False), dict(pool="mean", norm="tokens")),
    (dict(act_layer="silu"), dict(activation="silu")),
    (dict(act_layer="gelu_tanh", drop_path_rate=0.1), dict(activation="gelu_tanh")),
    (dict(num_heads=3), dict(heads=3)),
]


def shrunk(timm, args):
    return timm.create_model(
        FAMILY.variant,
        img_size=32,
        patch_size=8,
        embed_dim=24,
        depth=2,
        mlp_ratio=2,
        num_classes=5,
        **{"num_heads": 2, **args},
    ).eval()


def timm_folder(timm, folder, args):
    """A folder as timm writes it, of a model whose arguments are written in its configuration; and that model."""
    import torch

    torch.manual_seed(0)
    model = shrunk(timm, args)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_file({name: value.numpy() for name, value in model.state_dict().items()}, folder / "model.safetensors")
    given = dict(patch_size=8, embed_dim=24, depth=2, num_heads=2, mlp_ratio=2) | args
    config = {
        "architecture": FAMILY.variant,
        "num_classes": 5,
        "global_pool": model.global_pool,
        "model_args": given,
        "pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0, 0, 0], "std": [1, 1, 1]},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return model


@pytest.mark.once
@pytest.mark.parametrize(("args", "fields"), MODEL_ARGS, ids=lambda v: "-".join(v))
def test_what_no_shape_tells_is_read_from_timms_model_args(timm, tmp_path, args, fields):
    import torch

    theirs = timm_folder(timm, tmp_path, args)
    model = keras_vits.create(FAMILY.variant, weights=tmp_path)
    assert fields.items() <= vars(model.cfg).items()
    images = families.images(model)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    found = families.predict(model, images)
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.once
def test_model_args_that_nobody_knows_are_refused(published, tmp_path):
    folder, _ = published
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    for change, words in [
        (dict(model_args=dict(swirl=2)), "model_args that ViT does not know: swirl"),
        (dict(model_args=dict(norm_layer="rmsnorm")), "does not know: norm_layer"),
        (dict(model_args=dict(global_pool="map")), "global_pool 'map'; ViT has token and avg only"),
        (dict(architecture=7), r"config\.json has another type in architecture: expected `str \| null`, got `int`"),
        (dict(pretrained_cfg=dict(crop_pct="much")), r"config\.json has another type in pretrained_cfg\.crop_pct"),
        (dict(pretrained_cfg=dict(input_size=[3, "32", 32])), r"another type in pretrained_cfg\.input_size"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=words):
            create(tmp_path)


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="PyTorch is the backend")
def test_no_torch_is_needed_for_safetensors(published):
    code = f"""
import pathlib, sys
from keras_vits.checkpoints import files
tensors = files.read(pathlib.Path({str(published[0] / "model.safetensors")!r}))
assert tensors["cls_token"].shape == (1, 1, 24)
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_offline_download_says_what_to_do(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def offline(*args, **kwargs):
        raise hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(hub, "hf_hub_download", offline)
    with pytest.raises(ValueError, match=re.escape("timm/vit_tiny_patch16_224.x could not be downloaded")) as error:
        create("timm/vit_tiny_patch16_224.x")
    assert "give a local folder" in str(error.value)
