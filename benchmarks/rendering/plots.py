"""The figures of the page as SVG elements, drawn by matplotlib in the colours of the edge report.

The same numbers give the same bytes. A label has a line of its own above its bar or its dots, and the grid is drawn
beside them only: no text stands on a line, whatever font the browser has.
"""

import contextlib
import dataclasses
import io
import math
import re
import textwrap

from keras_vits.edge.evidence.plots import COLOURS, themed

from .tables import short

WIDTH = 360  # of a figure, about a pixel on the page
FONT = 11
LINE = 14  # from one line of text to the next
WRAP = 50  # characters of a label
OURS, PEER = 0, 1  # colours
SERIES = (
    "keras_vits, JAX",
    "timm",
    "keras_vits, TensorFlow",
    "keras_vits, PyTorch",
)  # the same colours everywhere


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bar:
    """A ratio to 1.

    Attributes:
        label: above the bar.
        ratio: its length; `None` where there is none, and `error` says why.
        low: lower quartile of the ratio.
        high: upper quartile.
        series: number of its colour.
        error: why there is no ratio.
    """

    label: str
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    series: int = OURS
    error: str | None = None


def bars(items, name):
    """Ratios on a logarithmic axis, each with its label and its number above it, and its quartiles as a line.

    Args:
        items: list of `Bar`.
        name: of the figure, for who cannot see it.
    """
    known = [value for bar in items if bar.ratio for value in (bar.ratio, bar.low, bar.high)]
    low, high = min([*known, 0.8]) / 1.08, max([*known, 1.25]) * 1.08
    labels = [textwrap.wrap(bar.label, WRAP) for bar in items]
    reasons = [textwrap.wrap(f"failed: {bar.error}", WRAP)[:2] if not bar.ratio else [] for bar in items]
    heights = [LINE * len(label) + (LINE * len(why) or 15) + 8 for label, why in zip(labels, reasons, strict=True)]
    with _figure(20 + sum(heights), name) as (figure, axes):
        _rows(axes, sum(heights), 20)
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        marks = ticks(low, high)
        _ticks(axes, marks)
        _grid(axes, marks, one=True)
        y = 0
        for bar, label, why, height in zip(items, labels, reasons, heights, strict=True):
            _text(axes, y, label, COLOURS["ink"])
            if bar.ratio:
                middle = y + LINE * len(label) + 8
                axes.barh(middle, bar.ratio - 1, 10, left=1, color=COLOURS[f"series{bar.series}"], zorder=2)
                axes.hlines(middle, bar.low, bar.high, color=COLOURS["ink"], linewidth=1.5, zorder=3)
                _text(axes, y, [f"{bar.ratio:.2f}"], COLOURS["ink"], right=True)
            else:
                _text(axes, y + LINE * len(label), why, COLOURS["soft"])
            y += height
        return _svg(figure, name)


def rates(rows, styles):
    """Arithmetic rates, a line of dots for each row, and what they stand for below.

    Args:
        rows: list of (label, name -> GFLOP/s).
        styles: name -> (marker of matplotlib, number of the colour, whether it is filled).
    """
    names = [name for name in styles if any(name in found for _, found in rows)]
    high = 1.08 * max(value for _, found in rows for value in found.values())
    step = max(n * 10.0**p for p in range(-2, 6) for n in (1, 2, 5) if high / (n * 10.0**p) >= 4)
    marks = [i * step for i in range(int(high / step) + 1)]
    height, legend = 38 * len(rows), 18 * math.ceil(len(names) / 2)
    with _figure(20 + height + legend, name := "arithmetic rates in GFLOP/s") as (figure, axes):
        _rows(axes, height, 20, legend)
        axes.set_xlim(0, high)
        _ticks(axes, marks)
        _grid(axes, marks)
        lines = {}
        for i, (label, found) in enumerate(rows):
            middle = 38 * i + LINE + 10
            _text(axes, 38 * i, [label], COLOURS["ink"])
            for key in (key for key in names if key in found):
                marker, series, filled = styles[key]
                colour = COLOURS[f"series{series}"]
                inside = colour if filled else COLOURS["paper"]
                (lines[key],) = axes.plot(
                    found[key], middle, marker, color=colour, markerfacecolor=inside, markersize=8, markeredgewidth=1.5
                )
        figure.legend(
            [lines[key] for key in names], names, loc="lower left", ncols=2, labelcolor=COLOURS["soft"], **_LEGEND
        )
        return _svg(figure, name)


def curves(series, x_label, y_label):
    """Lines on two logarithmic axes, and their names above, the highest end first.

    Args:
        series: name -> x -> y.
    """
    xs = sorted({x for line in series.values() for x in line})
    ys = [y for line in series.values() for y in line.values()]
    order = sorted(series, key=lambda name: -list(series[name].values())[-1])
    name, height = f"{y_label} against {x_label}", 270 + 18 * math.ceil(len(order) / 2)
    with _figure(height, name) as (figure, axes):
        axes.set_position([58 / WIDTH, 44 / height, (WIDTH - 74) / WIDTH, 216 / height])
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_ylim(min(ys) / 1.15, max(ys) * 1.15)
        axes.set_xlim(min(xs) / 1.1, max(xs) * 1.1)
        _ticks(axes, xs, top=False)
        _ticks(axes, ticks(min(ys) / 1.15, max(ys) * 1.15), x=False)
        axes.grid(color=COLOURS["line"], linewidth=1)
        axes.set_axisbelow(True)
        axes.set_xlabel(x_label, color=COLOURS["soft"])
        axes.set_ylabel(y_label, color=COLOURS["soft"])
        lines = []
        for key in order:
            i = SERIES.index(key) if key in SERIES else list(series).index(key)
            dash, marker = ("-", "--", ":")[i // 4 % 3], "os^D"[i % 4]
            colour = COLOURS[f"series{i % 4}"]
            lines += axes.plot(
                *zip(*series[key].items(), strict=True), marker + dash, color=colour, markersize=5, linewidth=1.8
            )
        figure.legend(lines, order, loc="upper left", ncols=2, labelcolor=COLOURS["ink"], **_LEGEND)
        return _svg(figure, name)


def ticks(low, high, most=8):
    """Round numbers of a logarithmic axis, within the limits."""
    for steps in ((1, 1.1, 1.2, 1.3, 1.5, 2, 3, 4, 5, 6, 7, 8, 9), (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [n * 10.0**power for power in powers for n in steps if low <= n * 10.0**power <= high]
        if len(found) <= most:
            break
    return found


# ---------------------------------------------------------------- matplotlib

_LEGEND = dict(frameon=False, borderpad=0.2, handlelength=1.8, handletextpad=0.5, columnspacing=1.5, fontsize=FONT)


@contextlib.contextmanager
def _figure(height, name):
    """A figure of a height, about pixels, and its axes; its file depends on nothing but what is drawn."""
    import matplotlib
    from matplotlib.figure import Figure

    settings = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": FONT, "text.parse_math": False}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72)  # the dpi that SVG has
        axes = figure.subplots()
        axes.spines[:].set_visible(False)
        yield figure, axes


def _rows(axes, height, top, bottom=0):
    """Makes y count pixels downwards from the first row, over the whole width of the figure but for a margin."""
    whole = height + top + bottom
    axes.set_position([6 / WIDTH, bottom / whole, 1 - 12 / WIDTH, height / whole])
    axes.set_ylim(height, 0)
    axes.set_yticks([])


def _ticks(axes, marks, *, x=True, top=True):
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    axis = axes.xaxis if x else axes.yaxis
    axis.set_major_locator(FixedLocator(marks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FixedFormatter([short(mark) for mark in marks]))
    axis.set_tick_params(length=0, pad=4, labelcolor=COLOURS["soft"])
    if x and top:
        axes.xaxis.tick_top()


def _grid(axes, marks, one=False):
    """Lines at the marks, and a stronger one at 1 where it is what all is compared with."""
    for mark in marks:
        axes.axvline(mark, color=COLOURS["line"], linewidth=1, zorder=0)
    if one:
        axes.axvline(1, color=COLOURS["soft"], linewidth=1, zorder=0)


def _text(axes, y, lines, colour, right=False):
    """Lines of text below y, at an edge of the figure; the grid has a gap there."""
    if not right:
        axes.axhspan(y, y + LINE * len(lines), color=COLOURS["paper"], linewidth=0, zorder=1)
    for i, line in enumerate(lines):
        axes.text(
            float(right),
            y + LINE * i + LINE - 3,
            line,
            color=colour,
            ha="right" if right else "left",
            va="baseline",
            transform=axes.get_yaxis_transform(),
        )


def _svg(figure, name):
    drawing = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(drawing, format="svg", transparent=True, metadata=metadata)
    svg = themed(drawing.getvalue(), name)
    svg = re.sub(r"font: (\d+)px [^;\"]*", r"font-size: \1px", svg)  # the family is the page's
    svg = re.sub(r' (id="(LineCollection|legend|xtick|ytick)[^"]*"|clip-path="[^"]*")', "", svg)  # nothing is cut off
    return re.sub(r"\s+", " ", svg).replace("> <", "><")
