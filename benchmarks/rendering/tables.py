"""Markdown tables, and numbers as their cells."""


def table(header, rows, left=1):
    """A Markdown table as lines.

    Args:
        header: the columns' names.
        rows: lists of strings.
        left: how many columns are text; the others are numbers, on the right.
    """
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(cells)} |" for cells in (header, rule, *escaped)]


def grouped(rows, *keys):
    """Values of the keys -> rows that have them, in the order of the rows."""
    found = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


def number(value, spec):
    """A number, or nothing where it is not known."""
    return "" if value is None else format(value, spec)


def megabytes(size_bytes):
    return "" if size_bytes is None else f"{size_bytes / 1e6:.0f}"


def spread(row):
    """The ratio of a row, and its quartiles."""
    return "" if row["ratio"] is None else f"{row['ratio']:.2f} ({row['ratio_q1']:.2f} to {row['ratio_q3']:.2f})"


def short(value):
    """0.5 -> "0.5", 2048 -> "2,048", 20000 -> "20k"."""
    if value >= 10000 and value % 1000 == 0:
        return f"{value / 1000:g}k"
    return f"{value:,.0f}" if value >= 10 else f"{value:g}"
