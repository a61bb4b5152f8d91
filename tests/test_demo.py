"""The main job in small: every file of every model is written, checked and reported."""

import functools
import json
import shutil

import pytest

from keras_vits.cli import demo_job as demo
from keras_vits.edge import artifact
from keras_vits.edge.devices import host

pytestmark = pytest.mark.once  # the tests of training, exporting and quantizing are for every backend

JOBS = (
    demo.Job(
        variant="vit_tiny_patch16_224",
        name="small_vit",
        hyperparameters=dict(width=24, depth=1, heads=2, mlp_hidden=48),
        epochs=2,
    ),
)
FILES = {
    ".keras": ("keras", "float32"),
    "_float32.tflite": ("litert", "float32"),
    "_float16.tflite": ("litert", "float16"),
    "_dynamic_int8.tflite": ("litert", "dynamic_int8"),
    "_static_int8.tflite": ("litert", "static_int8"),
    "_float16.mlpackage": ("coreml", "float16"),
    "_int8.mlpackage": ("coreml", "int8"),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "JOBS", JOBS)
        patch.setattr(demo, "measure", functools.partial(demo.measure, min_seconds=0.1))
        patch.setattr(host, "PROCESSES", 1)
        result = demo.demo(tmp_path_factory.mktemp("out"), limit=40, say=said.append)
    return result, said


def test_every_file_is_there_and_verified(found):
    result, _ = found
    expected = [(f"{job.name}{end}", *kind) for job in JOBS for end, kind in FILES.items()]
    assert [(r.artifact.path.name, r.artifact.format, r.artifact.recipe) for r in result.rows] == expected
    for row in result.rows:
        assert artifact.load(row.artifact.path) == row.artifact
        assert row.verification.images == 40 and row.verification.top1 is not None
        assert row.artifact.class_names == tuple("0123456789")
        if row.artifact.recipe in ("float32", "float16"):
            assert row.verification.sqnr_db > 30 and row.verification.top1_agreement >= 0.95
        assert row.verification.partitions == (1 if row.artifact.format == "litert" else None)


def test_the_report_has_the_documented_shape(found):
    result, _ = found
    report = json.loads(result.report.json.read_text())
    assert set(report) >= {"model", "backend", "rows", "environment"} and len(report["rows"]) == len(result.rows)
    keys = "artifact format recipe size_bytes top1 top1_agreement sqnr_db latency_median_ms latency_p90_ms partitions"
    for row in report["rows"]:
        assert set(row) >= {*keys.split(), "verified_by"}
        assert (result.report.json.parent / row["artifact"]).exists()
        assert row["format"] == "coreml" or row["latency_median_ms"] > 0
    assert result.report.html.stat().st_size > 10_000


def test_it_says_what_it_does_and_leaves_no_checkpoint(found):
    result, said = found
    assert sum("epoch" in line for line in said) == sum(job.epochs for job in JOBS)
    assert not list(result.report.html.parent.glob("*.checkpoint.keras"))
    assert set(result.fits) == {job.name for job in JOBS}


def test_a_demo_replaces_what_a_demo_wrote_and_nothing_else(found, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(found[0].report.html.parent, out)
    again = lambda **options: demo._check_names(out, "small_vit", **{"resume": False, "overwrite": False, **options})
    written = {f"small_vit{end}" for end in FILES}
    assert set(json.loads((out / "demo.json").read_text())["files"]) == written
    again()
    for name in sorted(written):
        whole = out / name
        shutil.move(whole, tmp_path / name)
        again()  # what is gone is free
        whole.write_text("mine")
        with pytest.raises(ValueError, match=rf"{name} is there already: --overwrite replaces it"):
            again()
        again(overwrite=True)
        whole.unlink()
        shutil.move(tmp_path / name, whole)
    (out / "demo.json").unlink()  # as where a training and an export wrote them
    with pytest.raises(ValueError, match=r"small_vit\.keras is there already"):
        again()
    (out / "demo.json").write_text("[]")
    with pytest.raises(ValueError, match="is no list of what a demo wrote"):
        again()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "small_vit.checkpoint.keras").write_text("of a training")
    with pytest.raises(ValueError, match="keeps the last epoch of a training that was not finished"):
        demo._check_names(mine, "small_vit", resume=False, overwrite=False)
    demo._check_names(mine, "small_vit", resume=True, overwrite=False)


@pytest.mark.parametrize(
    ("variant", "size"), [("vit_base_patch16_224", 64), ("vit_huge_patch14_224", 70), ("mobilevit_xxs", 64)]
)
def test_a_model_gets_the_next_size_that_it_can_take(variant, size):
    assert demo.image_size(demo.Job(variant=variant)) == size
