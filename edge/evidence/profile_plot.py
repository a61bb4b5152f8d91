"""Where the time goes, drawn: a bar for each layer of a file, of its kinds of operations."""

from __future__ import annotations

import io
import pathlib
from collections.abc import Mapping
from typing import Any

from keras_vits._util.files import writing

from . import plots as report_plot
from .profile import Profile, shortened

KINDS = 4  # of operations that have colours of their own: the ones that take the longest
OTHER = "other operations"
LIGHT = {  # the report's page, in light mode
    "ink": "#1b1f24",
    "soft": "#59636e",
    "line": "#d8dee4",
    "paper": "#ffffff",
    "series0": "#0063a3",
    "series1": "#b34700",
    "series2": "#6b3fa0",
    "series3": "#00695c",
}


def plot(profile: Profile, path: str | pathlib.Path | None, depth: int) -> str | pathlib.Path:
    """See `Profile.plot`."""
    if path is None:
        return report_plot.themed(_svg(profile, depth, report_plot.COLOURS), "Where the time goes, ms by layer")
    path = pathlib.Path(path)
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"A profile is drawn as a .png or .svg file; received {path.name!r}.")
    if path.suffix == ".svg":
        content = _svg(profile, depth, LIGHT).encode()
    else:
        drawing = io.BytesIO()
        _figure(profile, depth, LIGHT).savefig(drawing, format="png", dpi=150, metadata={"Software": None})
        content = drawing.getvalue()
    with writing(path) as temporary:
        temporary.write_bytes(content)
    return path


def _svg(profile: Profile, depth: int, colours: Mapping[str, str]) -> str:
    figure = _figure(profile, depth, colours)
    import matplotlib  # which the figure has shown to be there

    drawing, salt = io.StringIO(), f"{profile.artifact_path} {profile.threads} {depth}"
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(drawing, format="svg", transparent=True, metadata=metadata)
    return drawing.getvalue()


def _figure(profile: Profile, depth: int, colours: Mapping[str, str]) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError('matplotlib is needed for a plot: pip install -e ".[report]"') from None
    layers = list(profile.by_layer(depth))
    kinds = list(profile.by_op())
    series = {kind: kind if i < KINDS else OTHER for i, kind in enumerate(kinds)}
    widths = {name: [0.0] * len(layers) for name in dict.fromkeys(series.values())}
    for operation in profile.operations:
        widths[series[operation.op]][layers.index(shortened(operation.layer, depth))] += operation.ms
    figure = Figure(figsize=(6.2, 1.0 + 0.17 * len(layers)), dpi=72, layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(layers)
    for i, (name, width) in enumerate(widths.items()):
        colour = colours["soft"] if name == OTHER else colours[f"series{i}"]
        axes.barh(range(len(layers)), width, left=left, height=0.72, color=colour, label=name)
        left = [a + b for a, b in zip(left, width, strict=True)]
    axes.set_yticks(range(len(layers)), layers)
    axes.set_ylim(len(layers) - 0.4, -0.6)
    threads = f"{profile.threads} thread{'s' * (profile.threads > 1)}"
    label = f"ms, {profile.operations_ms:.3g} in all, {threads}, {profile.runtime}"
    axes.set_xlabel(label, color=colours["soft"], fontsize=8, parse_math=False)
    axes.grid(axis="x", color=colours["line"], linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=7, labelcolor=colours["soft"])
    axes.spines[:].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, fontsize=7, frameon=False, labelcolor=colours["ink"])
    return figure
