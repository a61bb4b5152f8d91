"""Verbs of models: list, train."""

import json
import pathlib
from typing import Annotated, Any

import typer

from keras_vits._util.terminal import counted
from keras_vits.cli._app import (
    BackendOption,
    DataOption,
    LimitOption,
    OutOption,
    OverwriteOption,
    ResumeOption,
    SeedOption,
    SizeOption,
    app,
    console,
    keeping,
    refuse_taken,
    refuse_unfinished,
    say,
    size,
    table,
)


@app.command("list", epilog="Examples: `keras-vits list 'mobilevit*'`; `keras-vits list 'mobilevit*' --pretrained`")
def list_(
    pattern: Annotated[str, typer.Argument(help="Shell pattern of names.")] = "*",
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Published weights with their ImageNet accuracy and licence.")
    ] = False,
    backend: BackendOption = None,
) -> None:
    """List the models that can be created, with their published weights."""
    import keras_vits
    from keras_vits import checkpoints
    from keras_vits.models import _registry as registry

    names = keras_vits.list_models(pattern, pretrained)
    if pretrained:
        shown = table("Published weights", "Top-1 %", "Image", "Licence")
        for checkpoint in (c for name in names for c in checkpoints.published(name)):
            shown.add_row(*_published(checkpoint))
    else:
        shown = table("Model", "Family", "Image", "Published weights")
        for name in names:
            cls, hyperparameters = registry.lookup(name)
            side = size(cls.Config(**hyperparameters).image_size)
            shown.add_row(name, cls.__name__, side, [c.hub_id for c in checkpoints.published(name)])
    if not shown.rows:
        raise ValueError(f"No model fits {pattern!r}. See keras-vits list.")
    console.print(shown, soft_wrap=False)


@app.command(
    epilog="Examples: `keras-vits train mobilevitv2_050 --data photos/ --image-size 192 --epochs 30`; after Ctrl-C, "
    "the same command with `--resume`"
)
def train(
    model: Annotated[str, typer.Argument(help="Name of a model; see keras-vits list.")],
    data: DataOption = "digits",
    out: OutOption = pathlib.Path("out"),
    weights: Annotated[
        str | None, typer.Option(help="Start from a hub id, a folder or a .safetensors file.", show_default=False)
    ] = None,
    image_size: SizeOption = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="A hyper-parameter of the family, such as depth=4; may be repeated.", show_default=False
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the pictures.")] = 30,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures in a step.")] = 32,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of AdamW.")] = 1e-3,
    flip: Annotated[
        bool, typer.Option("--flip", help="Mirror half of the pictures; not for digits or letters.")
    ] = False,
    limit: LimitOption = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    seed: SeedOption = 0,
    backend: BackendOption = None,
) -> None:
    """Train a model on pictures; writes a .keras file.

    Pictures are turned, shifted and scaled a little in training. A fifth of every class is held out to
    measure the accuracy.

    The last finished epoch is kept in a checkpoint for --resume until the .keras file is written. Neither of the two
    is replaced by another training without --overwrite.
    """
    import keras_vits
    from keras_vits.edge import keras_file
    from keras_vits.training import data as pictures
    from keras_vits.training import fit

    overrides = _settings(settings) | ({"image_size": image_size} if image_size else {})
    written, checkpoint = out / f"{overrides.get('name', model)}.keras", fit.checkpoint_path(out, model)
    if not (resume or overwrite):  # what goes on was allowed its names when it began
        refuse_taken(written, False, "another --out")
        refuse_unfinished(checkpoint)
    names = pictures.class_names(data)
    fit.set_seed(seed)
    net = keras_vits.create(model, weights=weights, num_classes=len(names), **overrides)
    read = pictures.load(data, net.preprocessing, limit=limit)
    if warning := read.warning():
        say(warning)
    console.print(f"Training {model} on {counted(len(read.train), 'picture')}, {len(read.validation)} held out")
    with keeping(out):
        found = fit.fit(
            net,
            read.train,
            read.validation,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            augmentation=pictures.Augmentation(flip=flip),
            checkpoint=checkpoint,
            resume=resume,
            seed=seed,
            callbacks=[fit.Say(console.print, epochs)],
        )
    made = keras_file.export(net, out, overwrite=overwrite or resume)
    checkpoint.unlink(missing_ok=True)  # the model is in the file now
    epochs_done = counted(found.epochs, "epoch")
    console.print(f"{made.path}  {found.top1:.1%} top-1 on held-out pictures after {epochs_done}")


def _settings(pairs: list[str] | None) -> dict[str, Any]:
    """["depth=4", "widths=[8, 16]"] -> hyper-parameters; a value is JSON, or else text."""
    found = {}
    for pair in pairs or ():
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--set takes name=value, such as depth=4; received {pair!r}.")
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            pass
        found[name] = tuple(value) if isinstance(value, list) else value
    return found


def _published(checkpoint: Any) -> tuple[str, str, str, str]:
    """A row of the table of published weights."""
    name = checkpoint.hub_id
    if name != f"timm/{checkpoint.variant}.{checkpoint.tag}":  # one file may serve two models
        name += f" (for {checkpoint.variant})"
    top1 = "" if checkpoint.top1 is None else f"{checkpoint.top1:.1f}"
    return name, top1, size(checkpoint.preprocessing.image_size), checkpoint.license or ""
