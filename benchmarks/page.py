"""Writes RESULTS.html from the recorded runs: the tables of RESULTS.md, with plots; no figure there is typed.

python benchmarks/page.py

The page is one file that needs no network and follows the reader's light or dark mode.
"""

import json
import math
import pathlib
import re
from html import escape

import readme
import results
import run
import train
from suite import CONTESTANTS, REFERENCE

PAGE = pathlib.Path(__file__).with_name("RESULTS.html")
PEER_THREADS = 2  # of the plots; the tables have the others
TITLE = "keras_vits: recorded benchmarks"
ROWS = "Every row"  # a heading
WIDTH = 560  # of a plot, in its own unit, about a pixel
FONT = 12  # the same
LINES = ("keras_vits, JAX", "timm", "keras_vits, TensorFlow", "keras_vits, PyTorch")  # have the same colours everywhere
STYLE = """
h2 { margin-top: 3.5rem; padding-top: .6rem; border-top: 1px solid var(--line); font-size: 1.35rem; }
h3 { margin: 2.2rem 0 .4rem; font-size: 1.05rem; overflow-wrap: anywhere; }
p, li { font-size: .92rem; overflow-wrap: anywhere; }
nav a { margin-right: 1.2rem; white-space: nowrap; }
code { font-size: .88em; }
table { width: auto; margin: .9rem 0; }
table .r { text-align: right; }
table .l { text-align: left; }
table td.r, table td.l { color: var(--ink); }
table .l { white-space: normal; }
details .l { white-space: nowrap; }
td:last-child { min-width: 0; }
summary { cursor: pointer; color: var(--soft); font-size: .92rem; }
.plots {
  margin: .6rem 0 1.2rem; gap: 1.5rem 2.5rem;
  grid-template-columns: repeat(auto-fill, minmax(min(26rem, 100%), 1fr));
}
figcaption span { font-weight: 400; color: var(--soft); }
svg .soft { fill: var(--soft); }
svg .ink { fill: var(--ink); }
svg .grid { stroke: var(--line); }
svg .axis { stroke: var(--soft); }
svg .spread { stroke: var(--ink); stroke-width: 1.5; }
""" + "".join(
    f"svg .fill{i} {{ fill: var(--series{i}); }}\n"
    f"svg .line{i} {{ stroke: var(--series{i}); stroke-width: 2; fill: none; }}\n"
    f"svg .hollow{i} {{ stroke: var(--series{i}); stroke-width: 2; fill: var(--paper); }}\n"
    for i in range(4)
)


# ---------------------------------------------------------------- the page


def text():
    from keras_vits.edge.evidence.report import STYLE as HOUSE

    sections = [(module, module.section()) for module in results.SECTIONS]
    demo = ["## On real images", "", "Written by `keras-vits demo`: trained, exported and measured in one run on "]
    demo[-1] += readme.demo()
    body = [html(lines, FIGURES.get(module.__name__)) for module, lines in sections] + [html(demo), every_row()]
    titles = [line[3:] for _, lines in [*sections, (None, demo)] for line in lines if line.startswith("## ")]
    titles.append(ROWS)
    links = " ".join(f'<a href="#{anchor(title)}">{escape(title)}</a>' for title in titles)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{TITLE}</title>
<style>{HOUSE}{STYLE}</style>
</head>
<body>
<h1>{TITLE}</h1>
<p>Written by <code>benchmarks/page.py</code> from <code>benchmarks/results/</code>, as the tables of
<code>RESULTS.md</code> are. A figure tells of the machine, the day and the versions beside it: measure on yours.</p>
<nav>{links}</nav>
{chr(10).join(body)}
</body>
</html>
"""


def write():
    PAGE.write_text(text(), encoding="utf-8")


def html(lines, figures=None):
    """The Markdown that our sections are made of, as HTML.

    Args:
        lines: headings of levels 2 and 3, tables, lists of "- ", paragraphs; with `code` and [links](of them).
        figures: (heading of level 3, or none) -> HTML that stands behind the first paragraph under the heading, or
            before the table that is there instead.
    """
    found, waiting = [], None
    for block in re.split(r"\n{2,}", "\n".join(lines).strip()):
        if heading := re.match(r"(##+) (.*)", block):
            level, title = len(heading[1]), heading[2]
            found.append(f'<h{level} id="{anchor(title)}">{inline(title)}</h{level}>')
            waiting = figures and figures(title if level == 3 else None)
        elif block.startswith("|"):
            found.append((waiting or "") + table(block))
            waiting = None
        elif block.startswith("- "):
            found.append(f"<ul>{''.join(f'<li>{inline(item[2:])}</li>' for item in block.splitlines())}</ul>")
        else:
            found.append(f"<p>{inline(block)}</p>{waiting or ''}")
            waiting = None
    return "\n".join(found)


def anchor(title):
    return re.sub(r"\W+", "-", title.lower()).strip("-")


def inline(text):
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text, quote=False))
    return re.sub(r"\[([^]]+)\]\(([^)]+)\)", r'<a href="\2">\1</a>', text)


def table(block):
    header, rule, *body = ([cell.strip() for cell in line[1:-1].split("|")] for line in block.splitlines())
    side = ["r" if cell.endswith(":") else "l" for cell in rule]

    def row(cells, tag):
        pairs = zip(cells, side, strict=True)
        return f"<tr>{''.join(f'<{tag} class={s}>{inline(cell)}</{tag}>' for cell, s in pairs)}</tr>"

    head, rows = row(header, "th"), "\n".join(row(cells, "td") for cells in body)
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>\n{rows}\n</tbody></table></div>'


def every_row():
    """The files of rows as they are, with what each row was made by."""
    found = [f'<h2 id="{anchor(ROWS)}">{ROWS}</h2>']
    for path in sorted((results.RESULTS.parent / "results").glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        keys = [key for key in dict.fromkeys(key for row in rows for key in row) if any(row.get(key) for row in rows)]
        lines = [keys, ["---"] * len(keys), *([cell(row.get(key)) for key in keys] for row in rows)]
        block = table("\n".join(f"|{'|'.join(line)}|" for line in lines))
        found.append(f"<details><summary>{path.name}, {len(rows)} rows</summary>{block}</details>")
    return "\n".join(found)


def cell(value):
    """A value of a row as a table has it."""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    return "" if value is None else str(value).replace("|", "/")


def plots(*figures):
    """Figures beside each other: pairs of a caption, of which what follows its first ": " is less loud, and an SVG."""
    found = []
    for caption, drawing in figures:
        title, _, more = caption.partition(": ")
        found.append(f"<figure><figcaption>{escape(title)} <span>{escape(more)}</span></figcaption>{drawing}</figure>")
    return f'<div class="plots">{"".join(found)}</div>' if found else ""


# ---------------------------------------------------------------- drawings


def svg(height, parts, name):
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(name)}" font-size="{FONT}">'
        f"{''.join(parts)}</svg>"
    )


def words(x, y, said, style="ink", anchor="start"):
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{style}" text-anchor="{anchor}">{escape(said)}</text>'


def stroke(x1, y1, x2, y2, style):
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{style}"/>'


def short(value):
    """0.5 -> "0.5", 2048 -> "2,048", 20000 -> "20k"."""
    if value >= 10000 and value % 1000 == 0:
        return f"{value / 1000:g}k"
    return f"{value:,.0f}" if value >= 10 else f"{value:g}"


def ticks(low, high, most=8):
    """Round numbers of a logarithmic axis, within the limits."""
    for steps in ((1, 1.1, 1.2, 1.3, 1.5, 2, 3, 4, 5, 6, 7, 8, 9), (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [n * 10.0**power for power in powers for n in steps if low <= n * 10.0**power <= high]
        if len(found) <= most:
            break
    return found


def bars(items, name):
    """Ratios to 1 on a logarithmic axis, each with its label above it.

    Args:
        items: (label, ratio, low, high, number of the colour); without a ratio, `low` is the reason why.
    """
    known = [v for _, ratio, low, high, _ in items if ratio for v in (ratio, low, high)]
    low, high = min([*known, 0.8]) / 1.08, max([*known, 1.25]) * 1.08
    room, row, top = 52, 34, 22  # for the figure behind a bar; of a bar with its label; of the axis
    place = lambda v: 4 + (WIDTH - room - 8) * math.log(v / low) / math.log(high / low)
    bottom, parts = top + row * len(items) + 2, []
    for tick in ticks(low, high):
        parts.append(stroke(place(tick), top - 4, place(tick), bottom, "grid"))
        parts.append(words(place(tick), 12, short(tick), "soft", "middle"))
    for i, (label, ratio, first, last, colour) in enumerate(items):
        y = top + row * i
        parts.append(words(4, y + 12, clipped(label)))
        if not ratio:
            parts.append(words(4, y + 25, clipped(f"failed: {first}"), "soft"))
            continue
        left, right = sorted((place(ratio), place(1)))
        box = f'x="{left:.1f}" y="{y + 16}" width="{max(right - left, 2):.1f}" height="11"'
        parts.append(f'<rect {box} rx="2" class="fill{colour}"/>')
        parts.append(stroke(place(first), y + 21.5, place(last), y + 21.5, "spread"))
        parts.append(words(max(right, place(last)) + 5, y + 26, f"{ratio:.2f}"))
    parts.append(stroke(place(1), top - 4, place(1), bottom, "axis"))
    return svg(bottom + 2, parts, name)


def clipped(said):
    most = int(WIDTH / FONT / 0.53)
    return said if len(said) <= most else said[: most - 1] + "…"


def curves(series, x_label, y_label):
    """Lines on two logarithmic axes, each with its name at its end.

    Args:
        series: name -> x -> y.
    """
    left, right, top, bottom = 62, 150, 10, 300
    xs, ys = ([v for line in series.values() for v in values(line)] for values in (dict.keys, dict.values))
    (x0, x1), (y0, y1) = ((min(vs) / 1.1, max(vs) * 1.1) for vs in (xs, ys))
    place_x = lambda x: left + (WIDTH - left - right) * math.log(x / x0) / math.log(x1 / x0)
    place_y = lambda y: bottom - (bottom - top) * math.log(y / y0) / math.log(y1 / y0)
    parts = []
    for x in sorted(set(xs)):
        parts += [
            stroke(place_x(x), top, place_x(x), bottom, "grid"),
            words(place_x(x), bottom + 16, short(x), "soft", "middle"),
        ]
    for y in ticks(y0, y1):
        parts += [
            stroke(left, place_y(y), WIDTH - right, place_y(y), "grid"),
            words(left - 6, place_y(y) + 4, short(y), "soft", "end"),
        ]
    parts.append(words((left + WIDTH - right) / 2, bottom + 34, x_label, "soft", "middle"))
    turned = f'<g transform="translate(11 {(top + bottom) / 2}) rotate(-90)">'
    parts.append(f"{turned}{words(0, 0, y_label, 'soft', 'middle')}</g>")
    ends, free = sorted((place_y(list(line.values())[-1]), name) for name, line in series.items()), -math.inf
    for y, name in ends:
        line, i = series[name], LINES.index(name) if name in LINES else list(series).index(name)
        dash = ("", "6 3", "2 3")[i // 4 % 3]
        points = [(place_x(x), place_y(v)) for x, v in line.items()]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
        parts.append(f'<polyline points="{path}" class="line{i % 4}" stroke-dasharray="{dash}"/>')
        parts += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="2.6" class="fill{i % 4}"/>' for px, py in points]
        free = max(y + 4, free + FONT + 2)
        parts.append(words(points[-1][0] + 8, free, name, f"fill{i % 4}"))
    return svg(max(bottom + 40, free + 4), parts, f"{y_label} against {x_label}")


def rates(rows, styles):
    """Arithmetic rates, a line of the plot for each row.

    Args:
        rows: (label, name -> GFLOP/s).
        styles: name -> class of the style sheet: a dot, or a stroke where it begins with "line".
    """
    names = [name for name in styles if any(name in found for _, found in rows)]
    high = 1.08 * max(value for _, found in rows for value in found.values())
    place = lambda v: 8 + (WIDTH - 16) * v / high
    step = max(n * 10.0**p for p in range(-2, 6) for n in (1, 2, 5) if high / (n * 10.0**p) >= 4)
    top, row, parts = 20, 36, []
    bottom = top + row * len(rows)
    for i in range(int(high / step) + 1):
        parts.append(stroke(place(i * step), top - 4, place(i * step), bottom, "grid"))
        parts.append(words(place(i * step), 12, short(i * step), "soft", "middle"))
    for i, (label, found) in enumerate(rows):
        y = top + row * i + 23
        parts.append(words(4, y - 12, label))
        parts += [mark(place(found[name]), y, styles[name]) for name in names if name in found]
    x, y = 10, bottom + 22
    for name in names:
        width = 0.56 * FONT * len(name) + 30
        if x + width > WIDTH and x > 10:
            x, y = 10, y + 20
        parts += [mark(x, y - 4, styles[name]), words(x + 11, y, name, "soft")]
        x += width
    return svg(y + 8, parts, "arithmetic rates in GFLOP/s")


def mark(x, y, style):
    if style.startswith("line"):
        return stroke(x, y - 9, x, y + 9, style)
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" class="{style}"/>'


# ---------------------------------------------------------------- the plots of each section
# Of a section: (heading of level 3, or none) -> HTML.


def litert_graph_figures(title):
    import litert_graph

    if title is not None:
        return ""
    record, found = json.loads(litert_graph.RECORD.read_text(encoding="utf-8")), []
    for (model,), rows in train.grouped(record["rows"], "model").items():
        caption = f"{model}: time / ours, left is faster"
        items = [
            (
                litert_graph.CHOICES[row["choice"]][0],
                *[row["ratio_to_ours"]] * 3,
                PEER if row["choice"] == "keras_export" else OURS,
            )
            for row in rows
        ]
        found.append((caption, bars(items, caption)))
    return plots(*found)


def train_figures(title):
    """The plots of one part and model; before them the arithmetic rates of all models."""
    rows = [row for row in train.rows() if train.known(row)]
    if title is None:
        speed = train.grouped([row for row in rows if row["part"] == "speed"], "device")
        return plots(
            *(("Arithmetic rate in GFLOP/s: " + device, train_rates(found)) for (device,), found in speed.items())
        )
    parts = train.grouped(rows, "part", "model", "device").values()
    return plots(
        *(plot for found in parts if train.title(found) == title for plot in TRAIN_PLOTS[found[0]["part"]](found))
    )


def train_rates(rows):
    """The fastest runner of every library, and one matrix product where it was measured."""
    found = []
    for (model, mode), group in train.grouped(rows, "model", "mode").items():
        rate = {}
        for row in group:
            library = train.RUNNERS[row["runner"]][0].replace("_hub", "-hub")
            rate[library] = max(rate.get(library, 0), row["flops_per_second"] / 1e9)
            if row["gemm_flops_per_second"]:
                rate["one matrix product"] = row["gemm_flops_per_second"] / 1e9
        found.append((f"{model}, {'training' if mode == 'train' else 'inference'}", rate))
    return rates(found, {"one matrix product": "line2", "timm": "fill1", "keras-hub": "hollow1", "keras_vits": "fill0"})


def speed_plots(rows):
    for mode, what in (("train", "Training"), ("infer", "Inference")):
        these = [row for row in rows if row["mode"] == mode and row["ratio"]]
        items = [ratio_item(row["runner"], row, OURS if "keras_vits" in row["runner"] else PEER) for row in these]
        if items:
            yield f"{what}: speed / timm's, right is faster", bars(items, f"{what}, speed / timm's")


def tokens_plots(rows):
    lines = {}
    for row in rows:
        lines.setdefault(row["runner"], {})[row["tokens"]] = 1e3 / row["images_per_second"]
    what = "sample" if rows[0]["model"] == train.ATTENTION else "image"
    yield f"Time against tokens: ms for one {what}", curves(lines, "tokens N", f"ms for one {what}")


def batch_plots(rows):
    yield from against(rows, "batch", "runner", "batch size")


def devices_plots(rows):
    yield from against(rows, "devices", "runner", "devices")


def against(rows, x, name, label):
    """Speed of inference and of training against a field of the rows, a line for each value of another."""
    for mode, what in (("train", "Training"), ("infer", "Inference")):
        lines = {}
        for row in rows:
            if row["mode"] == mode:
                lines.setdefault(row[name], {})[row[x]] = row["images_per_second"]
        if lines:
            yield f"{what}: images per second", curves(lines, label, "images per second")


def peers_figures(title):
    """All contestants of one model against ours; before them the arithmetic rates of all models."""
    rows = [row for row in run.read(run.RECORD) if row["threads"] == PEER_THREADS]
    if title is None:
        found = [(model, peer_rates(group)) for (model,), group in train.grouped(rows, "model").items()]
        found = [(model, rate) for model, rate in found if rate]
        return (
            plots((f"Arithmetic rate in GFLOP/s: {PEER_THREADS} threads", rates(found, PEER_STYLES))) if found else ""
        )
    items = []
    for row in rows:
        contestant = CONTESTANTS[row["contestant"]]
        if row["model"] == title and contestant.role != "gemm":
            items.append(ratio_item(contestant.label, row, OURS if contestant.role == "ours" else PEER))
    items.sort(key=lambda item: item[1] or math.inf)
    caption = f"Time / {CONTESTANTS[REFERENCE].label}: {PEER_THREADS} threads, left is faster"
    return plots((caption, bars(items, f"{title}, {caption}"))) if items else ""


def peer_rates(rows):
    """The fastest of every role in `ROLES`, in float32 and in int8."""
    found = {}
    for row in rows:
        role = CONTESTANTS[row["contestant"]].role
        if row["gflops"] and role in ROLES:
            name = f"{ROLES[role]}, {'float32' if row['recipe'] == 'float32' else 'int8'}"
            found[name] = max(found.get(name, 0), row["gflops"])
    return found


PEER_STYLES = {
    "one matrix product, float32": "line2",
    "one matrix product, int8": "line3",
    "fastest peer, float32": "fill1",
    "fastest peer, int8": "hollow1",
    "keras_vits, float32": "fill0",
    "keras_vits, int8": "hollow0",
}
ROLES = {"ours": "keras_vits", "peer": "fastest peer", "gemm": "one matrix product"}
OURS, PEER = 0, 1  # colours


def ratio_item(label, row, colour):
    """What `bars` shows of a row."""
    if row["error"]:
        return label, None, row["error"], None, colour
    return label, row["ratio"], row["ratio_q1"], row["ratio_q3"], colour


TRAIN_PLOTS = {"speed": speed_plots, "tokens": tokens_plots, "batch": batch_plots, "devices": devices_plots}
FIGURES = {"litert_graph": litert_graph_figures, "train": train_figures, "run": peers_figures}

if __name__ == "__main__":
    write()
