"""Recorded runs as Markdown and figures, a module for each section of RESULTS.md and RESULTS.html.

Each has

    read()             what is recorded, or something empty
    section(recorded)  its Markdown, a list of lines from a heading of level 2 on; none where nothing is recorded
    figures(recorded)  heading of level 3, or None for the section's own -> list of (caption, SVG)

They import the tables of the scripts that record; no script that records imports them.
"""
