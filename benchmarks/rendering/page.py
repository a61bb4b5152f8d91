"""Markdown and figures as one HTML page, which needs no network and follows the reader's light or dark mode."""

import re
from html import escape

from markdown_it import MarkdownIt
from markdown_it.token import Token

from keras_vits.edge.evidence.report import STYLE as HOUSE

STYLE = """
h2 { margin-top: 3.5rem; padding-top: .6rem; border-top: 1px solid var(--line); font-size: 1.35rem; }
h3 { margin: 2.2rem 0 .4rem; font-size: 1.05rem; overflow-wrap: anywhere; }
p, li { font-size: .92rem; overflow-wrap: anywhere; }
nav a { margin-right: 1.2rem; white-space: nowrap; }
code { font-size: .88em; }
table { width: auto; margin: .9rem 0; }
th, td, td:first-child, th:first-child { text-align: left; color: var(--ink); }
td { white-space: normal; }
td[style] { white-space: nowrap; }
td:not([style]) { min-width: 4.6rem; }
td:last-child { min-width: 0; }
details td { white-space: nowrap; }
summary { cursor: pointer; color: var(--soft); font-size: .92rem; }
.plots {
  margin: .6rem 0 1.2rem; gap: 1.5rem 2rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(21.5rem, 100%), 1fr));
}
figcaption span { font-weight: 400; color: var(--soft); }
"""


def page(title, intro, sections, end=""):
    """The page.

    Args:
        title: of the page.
        intro: HTML below it.
        sections: list of (Markdown lines, figures as of `html`).
        end: HTML of the last section, with a heading of level 2.
    """
    body = "\n".join([*(html(lines, figures) for lines, figures in sections), end])
    links = " ".join(f'<a href="#{name}">{text}</a>' for name, text in re.findall('<h2 id="([^"]+)">(.*?)</h2>', body))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{HOUSE}{STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{intro}
<nav>{links}</nav>
{body}
</body>
</html>
"""


def html(lines, figures=None):
    """Markdown with tables as HTML; its headings have anchors, and its tables scroll by themselves.

    Args:
        lines: of Markdown.
        figures: heading of level 3, or None for that of level 2 -> list of (caption, SVG), which stand behind the first
            paragraph under the heading, or before the table that is there instead.
    """
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    markdown.add_render_rule("table_open", lambda *_: '<div class="scroll"><table>\n')
    markdown.add_render_rule("table_close", lambda *_: "</table></div>\n")
    tokens, waiting, found = markdown.parse("\n".join(lines)), [], []
    for i, token in enumerate(tokens):
        if token.type == "heading_open":
            title = tokens[i + 1].content
            token.attrSet("id", anchor(title))
            waiting = (figures or {}).get(title if token.tag == "h3" else None, [])
        here = [Token("html_block", "", 0, content=plots(waiting))] * bool(waiting)
        if token.type == "table_open":
            found += here
        found.append(token)
        if token.type == "paragraph_close" and not token.level:
            found += here
        if token.type in ("table_open", "paragraph_close"):
            waiting = []
    return markdown.renderer.render(found, markdown.options, {})


def anchor(title):
    return re.sub(r"\W+", "-", title.lower()).strip("-")


def plots(figures):
    """Figures beside each other: what follows the first ": " of a caption is less loud."""
    found = []
    for caption, drawing in figures:
        title, _, more = caption.partition(": ")
        found.append(f"<figure><figcaption>{escape(title)} <span>{escape(more)}</span></figcaption>{drawing}</figure>")
    return f'<div class="plots">{"".join(found)}</div>\n'


def rows_table(rows):
    """Rows as they are recorded, all fields that any of them has."""
    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if any(row.get(key) for row in rows)]
    head = "".join(f"<th>{escape(key)}</th>" for key in keys)
    body = "\n".join(f"<tr>{''.join(f'<td>{value(row.get(key))}</td>' for key in keys)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def value(found):
    """A value of a row as a cell."""
    if isinstance(found, float):
        return f"{found:.4g}" if abs(found) < 1e4 else f"{found:.0f}"
    if isinstance(found, list):  # of kernels, with names of 200 characters: the file has them
        return f"{len(found)} entries"
    return "" if found is None else escape(str(found), quote=False)
