"""A scatter plot as a piece of SVG for the report: every point is labelled, and its colours are those of the page."""

from __future__ import annotations

import dataclasses
import io
import math
import re
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

Box = tuple[float, float, float, float]  # (left, bottom, right, top) in pixels

MARKER_SIZES = {True: 9, False: 6}  # half the width of what a label keeps clear of: a chosen point has a ring
WIDTH, HEIGHT = 360, 300  # pixels, of a figure on a phone; a wide page enlarges it, and its text with it
FONT = 10  # pixels, of all text
LETTERS = 24  # of a label, at most

# matplotlib draws in these colours, and the page's style sheet says what they are in light and dark mode.
COLOURS = {name: f"#0101{i:02}" for i, name in enumerate(["ink", "soft", "line", "paper", "mark"])}
COLOURS |= {f"series{i}": f"#0202{i:02}" for i in range(4)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """A point of the plot.

    Attributes:
        x: in the unit of the axis, positive.
        y: in the unit of the axis.
        label: a word beside it.
        marker: matplotlib's, see `Traits.marker`.
        series: number of the series it belongs to, or `None` where there is only one.
        chosen: whether it stands out.
        spread: (low, high) between which x lies, drawn as a line, or `None`.
    """

    x: float
    y: float
    label: str
    marker: str
    series: int | None = None
    chosen: bool = False
    spread: tuple[float, float] | None = None


def plot(points: Sequence[Point], x_label: str, y_label: str) -> str:
    """An `<svg>` element with the points; x is logarithmic where it spans more than a factor of five."""
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError('matplotlib is needed for a report: pip install -e ".[report]"') from None

    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": x_label, "font.size": FONT, "text.parse_math": False}
    ):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), dpi=72, layout="constrained")  # the dpi that SVG has
        canvas = FigureCanvasAgg(figure)
        axes = figure.subplots()
        axes.set_xlabel(x_label, color=COLOURS["soft"])
        axes.set_ylabel(y_label, color=COLOURS["soft"])
        _scale(axes, [p.x for p in points], [p.y for p in points])
        limits = axes.get_xlim()
        for p in points:
            colour = _colour(p)
            if p.spread:
                low, high = (min(max(end, limits[0]), limits[1]) for end in p.spread)
                axes.hlines(p.y, low, high, color=colour, linewidth=1.5, alpha=0.45, zorder=2)
            inside = (
                COLOURS["paper"] if (p.series or 0) % 2 else colour
            )  # hollow: two series differ without colours too
            axes.plot(
                p.x, p.y, p.marker, color=colour, markerfacecolor=inside, markersize=6.5, markeredgewidth=1.5, zorder=3
            )
            if p.chosen:
                axes.plot(
                    p.x, p.y, "o", color=COLOURS["mark"], markerfacecolor="none", markersize=14, markeredgewidth=1.5
                )
        _label(figure, canvas, axes, points)
        drawing = io.StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(drawing, format="svg", transparent=True, metadata=metadata)
    return themed(drawing.getvalue(), f"{y_label}, {x_label}")


def _colour(point: Point) -> str:
    return COLOURS["series0"] if point.series is None else COLOURS[f"series{point.series % 4}"]


def _scale(axes: Any, xs: Sequence[float], ys: Sequence[float]) -> None:
    """Limits and ticks with room for the labels; y is in percent."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    if max(xs) > 5 * min(xs):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(min(xs) / 1.6, max(xs) * 1.6)
    else:
        margin = 0.25 * ((max(xs) - min(xs)) or max(xs))
        axes.set_xlim(max(0, min(xs) - margin), max(xs) + margin)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    margin = max(0.5, 0.2 * (max(ys) - min(ys)))
    axes.set_ylim(min(ys) - margin, max(ys) + margin)
    axes.set_yticks(
        [tick for tick in axes.get_yticks() if min(ys) - margin <= tick <= min(100 + 1e-6, max(ys) + margin)]
    )
    axes.grid(color=COLOURS["line"], linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelcolor=COLOURS["soft"])
    axes.spines[:].set_visible(False)


# ---------------------------------------------------------------- labels


def _label(figure: Any, canvas: Any, axes: Any, points: Sequence[Point]) -> None:
    """Writes each label at the nearest free place; a line joins it to its point where that is not beside it."""
    figure.draw_without_rendering()
    area = axes.get_window_extent().extents
    centres = [tuple(axes.transData.transform((p.x, p.y))) for p in points]
    markers = [_square(*centre, MARKER_SIZES[p.chosen]) for p, centre in zip(points, centres, strict=True)]
    taken: list[Box] = []
    for p in points:
        if p.spread:
            (left, y), (right, _) = (axes.transData.transform((x, p.y)) for x in p.spread)
            taken.append((left, y - 1, right, y + 1))
    for i, (p, (x, y)) in enumerate(zip(points, centres, strict=True)):
        text = axes.annotate(
            p.label if len(p.label) <= LETTERS else f"{p.label[: LETTERS - 1]}…",
            (p.x, p.y),
            (0, 0),
            textcoords="offset pixels",
            ha="center",
            va="center",
            fontsize=FONT,
            weight="bold" if p.chosen else "normal",
            color=COLOURS["ink"] if p.series is None else _colour(p),
            arrowprops=dict(arrowstyle="-", color=COLOURS["soft"], linewidth=0.7, shrinkA=0, shrinkB=5),
        )
        text.set_in_layout(False)
        extent = text.get_window_extent(canvas.get_renderer())
        size = extent.width + 4, extent.height
        others = taken + markers[:i] + markers[i + 1 :]
        places = _places((x, y), size, MARKER_SIZES[p.chosen] + 3)
        _, box, line = min(places, key=lambda place: _cost(place, area, others))
        text.set_position(((box[0] + box[2]) / 2 - x, (box[1] + box[3]) / 2 - y))
        text.arrow_patch.set_visible(bool(line))
        taken += [box, *line]


def _places(
    centre: tuple[float, float], size: tuple[float, float], nearest: float
) -> Iterator[tuple[float, Box, list[Box]]]:
    """Where a label of a size could stand: (distance, its box, small boxes along the line from the point to it)."""
    (x, y), (width, height) = centre, size
    for step, distance in enumerate(nearest + gap for gap in (0, 4, 12, 22, 34, 48, 64, 82)):
        for angle in (i * math.pi / 8 for i in range(16)):
            cx, cy = x + math.cos(angle) * (distance + width / 2), y + math.sin(angle) * (distance + height / 2)
            box = (cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
            end = min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3])
            stops = (0.3, 0.45, 0.6, 0.75, 0.9) if step > 1 else ()
            yield distance, box, [_square(x + (end[0] - x) * t, y + (end[1] - y) * t, 1) for t in stops]


def _cost(place: tuple[float, Box, list[Box]], area: Box, taken: Sequence[Box]) -> float:
    distance, box, line = place
    outside = box[0] < area[0] or box[1] < area[1] or box[2] > area[2] or box[3] > area[3]
    hits = sum(_meet(piece, other) for piece in (box, *line) for other in taken)
    return 1000 * outside + 100 * hits + distance


def _square(x: float, y: float, half: float) -> Box:
    return (x - half, y - half, x + half, y + half)


def _meet(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def themed(svg: str, name: str) -> str:
    """matplotlib's file as an element of the page: no prologue, no fixed size, no needless ids, the page's colours."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.S)
    svg = re.sub(
        r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{escape(name)}">', svg, count=1
    )
    svg = re.sub(r' id="(figure|axes|patch|line2d|text|matplotlib)[^"]*"', "", svg)
    for name, code in COLOURS.items():
        svg = svg.replace(code, f"var(--{name})")
    return svg
