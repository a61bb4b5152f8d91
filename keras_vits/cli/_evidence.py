"""Verbs of evidence: verify, benchmark, report, and the demo, which does all."""

import math
import pathlib
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from keras_vits._util.terminal import counted
from keras_vits.cli._app import (
    BackendOption,
    DataOption,
    HeldOutOption,
    LimitOption,
    OutOption,
    OverwriteOption,
    ResumeOption,
    SeedOption,
    SizeOption,
    app,
    console,
    inputs_for,
    keeping,
    pictures_for,
    table,
)

HALF_PICTURES = 8  # of `verify --half`, by default
HALF_LAYERS = 5  # that it names for each reason


@app.command(epilog="Example: `keras-vits verify out/vit_static_int8.tflite --against out/vit.keras --data photos/`")
def verify(
    files: Annotated[list[pathlib.Path], typer.Argument(help="Files that keras-vits export or quantize wrote.")],
    against: Annotated[str, typer.Option(help="The .keras file that they came from.")],
    data: HeldOutOption,
    limit: LimitOption = None,
    device: Annotated[
        str, typer.Option(help="What runs them: host, or arm64 (an emulated processor; .tflite only).")
    ] = "host",
    half: Annotated[
        bool,
        typer.Option(
            "--half",
            help="Run .tflite and .onnx files in half precision, as phones' GPUs do, and name the layers in which "
            "numbers overflow or that cost the outputs most. Some seconds for a picture: 8 of them, unless --limit says"
            " more.",
        ),
    ] = False,
    backend: BackendOption = None,
) -> None:
    """Compare files with the model they came from, on the held-out pictures."""
    options = {"device": device, "precision": "float16" if half else "float32"}
    rows = _verified(files, against, data, limit or (HALF_PICTURES if half else None), **options)
    _show(rows)
    for row in rows:
        _show_half(row)


@app.command(epilog="Example: `keras-vits benchmark out/*.tflite --threads 4`")
def benchmark(
    files: Annotated[list[pathlib.Path], typer.Argument(help="Files that keras-vits wrote.")],
    device: Annotated[
        str,
        typer.Option(
            help="Where to run: host, android or android:SERIAL, browser, browser:HOST:PORT for a phone "
            "that opens the page, macos, ios:FOLDER (Xcode's reports)."
        ),
    ] = "host",
    threads: Annotated[
        list[int] | None,
        typer.Option(
            min=1, help="Number of threads; may be repeated. Default: 2; in a browser 1 and 2, on a phone 1, 2 and 4."
        ),
    ] = None,
    accelerator: Annotated[
        list[str] | None,
        typer.Option(help="Accelerator, such as cpu or gpu; may be repeated. Default: all that are present."),
    ] = None,
    profile: Annotated[
        pathlib.Path | None,
        typer.Option(help="Folder for a plot of each .tflite file: where its time goes on the host, by layer."),
    ] = None,
    backend: BackendOption = None,
) -> None:
    """Measure latency, load time and memory of the files, in turns."""
    from keras_vits.edge import artifact
    from keras_vits.edge.devices import browser
    from keras_vits.edge.evidence.benchmark import benchmark
    from keras_vits.edge.evidence.profile import profile as profiled
    from keras_vits.edge.records import DeviceError
    from keras_vits.edge.targets._protocol import target

    artifacts = [artifact.load(file) for file in files]
    try:
        if device.startswith("browser:"):
            found = browser.serve(
                artifacts,
                *browser.address(device.partition(":")[2]),
                threads=tuple(threads or browser.THREADS),
                accelerators=tuple(accelerator or ()) or None,
                on_url=lambda url: console.print(f"Open {url}"),
            )
        else:
            found = benchmark(artifacts, device=device, threads=threads or None, accelerators=accelerator or None)
    except DeviceError as e:
        _speeds(e.results)
        raise
    _speeds(found)
    for file in artifacts:
        if profile and target(file.format).traits.profiled:
            drawn = profiled(file, threads=(threads or [2])[0]).plot(profile / f"{file.path.stem}.png")
            console.print(f"Where the time goes  {drawn}")


@app.command(
    epilog="Example: `keras-vits report out/*.tflite --against out/vit.keras --data photos/ --out out/report.html`"
)
def report(
    files: Annotated[list[pathlib.Path], typer.Argument(help="Files that keras-vits export or quantize wrote.")],
    against: Annotated[str, typer.Option(help="The .keras file that they came from.")],
    data: HeldOutOption,
    out: Annotated[pathlib.Path, typer.Option("--out", "-o", help="The page to write.")] = pathlib.Path(
        "out/report.html"
    ),
    limit: LimitOption = None,
    threads: Annotated[int, typer.Option(min=1, help="Number of threads of each file.")] = 2,
    backend: BackendOption = None,
) -> None:
    """Verify and benchmark files, and write a page with the evidence."""
    from keras_vits.cli.demo_job import measure
    from keras_vits.edge.evidence.report import report

    rows = measure(_verified(files, against, data, limit), threads=threads, min_seconds=2.0)
    written = report(rows, out)
    _show(rows)
    console.print(f"Report  {written.html}")


@app.command(
    epilog="Examples: `keras-vits demo`; `keras-vits demo --data photos/ --model mobilevitv2_100 --image-size 128`"
)
def demo(
    data: DataOption = "digits",
    model: Annotated[
        str | None,
        typer.Option(help="Name of a model. Default: a small MobileViT v2 and a small ViT.", show_default=False),
    ] = None,
    out: OutOption = pathlib.Path("out"),
    image_size: SizeOption = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Passes over the pictures. Default: each model's own.", show_default=False)
    ] = None,
    limit: LimitOption = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    seed: SeedOption = 0,
    backend: BackendOption = None,
) -> None:
    """Run all steps: train, export, quantize, verify, benchmark, report.

    Without options it trains two small models on 1,297 real handwritten digits, in some minutes on two cores.

    Files of an earlier demo are replaced; other files of the same names are not without --overwrite.
    """
    from keras_vits.cli.demo_job import demo as run
    from keras_vits.edge.evidence.report import recommend, withheld
    from keras_vits.edge.targets._protocol import target

    with keeping(out):
        found = run(
            out,
            source=data,
            model=model,
            size=image_size,
            epochs=epochs,
            limit=limit,
            resume=resume,
            overwrite=overwrite,
            seed=seed,
            say=console.print,
        )
    _show(found.rows)
    for format in dict.fromkeys(row.artifact.format for row in found.rows):
        if phone := target(format).traits.phone:
            if answer := recommend(found.rows, format):
                console.print(f"{phone:8}{answer[0].artifact.path}  ({answer[1]})")
            else:
                console.print(f"{phone:8}{withheld(found.rows, format)}")
    console.print(f"{'Report':8}{found.report.html}  (everything took {found.seconds:.0f} s)")


def _verified(files: list[pathlib.Path], against: str, source: str, limit: int | None, **options: Any) -> list[Any]:
    """A `Row` for each file, verified on the held-out pictures as this file takes them."""
    import keras_vits
    from keras_vits._util.progress import progress
    from keras_vits.edge import artifact
    from keras_vits.edge.evidence.report import Row
    from keras_vits.edge.evidence.verify import same_classes
    from keras_vits.edge.evidence.verify import verify as check

    given = [artifact.load(file) for file in files]
    model = keras_vits.load(against)
    read: dict[Any, Any] = {}  # preprocessing -> the pictures: most files have the same
    for one in given:
        if (prepared := one.image.prepared) not in read:
            read[prepared] = pictures_for(one, source, limit).validation
        same_classes(one, model, read[prepared].class_names)
    rows = []
    for one in progress(given, "Verifying"):
        held_out = read[one.image.prepared]
        rows.append(Row(one, check(one, model, inputs_for(one, held_out), held_out.labels, **options)))
    return rows


def _show(rows: Sequence[Any]) -> None:
    """The table of files."""
    shown = table("File", "MB", "Top-1", "Agrees", "SQNR dB", "ms")
    for row in rows:
        check, speed = row.verification, row.latency
        shown.add_row(
            row.artifact.path.name,
            f"{row.artifact.size_bytes / 1e6:.2f}",
            "" if check.top1 is None else f"{check.top1:.1%}",
            "" if check.top1_agreement is None else f"{check.top1_agreement:.1%}",
            "exact" if check.sqnr_db == math.inf else f"{check.sqnr_db:z.1f}",
            f"{speed.median_ms:.2f}" if speed else "",
        )
    console.print(shown, soft_wrap=False)
    for format in dict.fromkeys(row.artifact.format for row in rows):
        check = next(row.verification for row in rows if row.artifact.format == format)
        simplified = "{} operations rewritten as {}, ".format(*check.operations) if check.operations else ""
        console.print(f"{format}: {simplified}on {counted(check.images, 'picture')}, {check.verified_by}")
    for row in rows:
        for offence in row.verification.gpu_offenders or ():
            console.print(f"{row.artifact.path.name}: a phone's GPU refuses {offence}", style="yellow")


def _show_half(row: Any) -> None:
    """What a file loses in half precision, by its layers."""
    found = row.verification.half
    if found is None:
        return
    shown = table("Layer in half precision", "Largest", "Overflow", "Vanish", "Loses dB", "Costs dB")
    db = lambda value: {math.inf: "exact", -math.inf: "lost"}.get(value) or f"{value:.1f}"
    for step in dict.fromkeys([*found.overflows[:HALF_LAYERS], *found.worst(HALF_LAYERS)]):
        shares = (f"{share:.1%}" if share else "" for share in (step.overflowing, step.vanishing))
        decibels = "" if step.output_db is None else db(step.output_db)
        shown.add_row(f"{step.layer} ({step.operation})", f"{step.largest:.3g}", *shares, db(step.own_db), decibels)
    console.print(row.artifact.path.name)
    console.print(shown, soft_wrap=False)


def _speeds(found: Sequence[Any]) -> None:
    """Prints what was measured."""
    if not found:
        return
    shown = table("File", "On, threads", "Median ms", "p10 ms", "p90 ms", "p99 ms", "Load ms", "Memory MB", "Runs")
    for speed in found:
        times = (speed.median_ms, speed.p10_ms, speed.p90_ms, speed.p99_ms, speed.load_ms)
        memory = "" if speed.peak_memory_bytes is None else f"{speed.peak_memory_bytes / 1e6:.0f}"
        shown.add_row(
            speed.artifact_path.name,
            f"{speed.accelerator}, {speed.threads}" if speed.threads else speed.accelerator,
            *("" if t is None else f"{t:.2f}" for t in times),
            memory,
            str(speed.runs),
        )
    console.print(shown, soft_wrap=False)
    known = "".join(f", {name} {value}" for name, value in found[0].environment.items() if name != "user_agent")
    console.print(f"{found[0].device}: {found[0].cpu}, {found[0].runtime}{known}")
