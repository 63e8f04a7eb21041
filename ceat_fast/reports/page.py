"""A self-contained HTML page: text is escaped, figures are embedded, nothing is loaded from elsewhere."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

STYLE = """
body { margin: 0 auto; padding: 1rem; max-width: 64rem; font: 16px/1.5 system-ui, sans-serif; }
body { color: #222; background: #fff; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin-top: 2rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; } caption { text-align: left; color: #555; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #ddd; text-align: left; white-space: nowrap; }
td.number { text-align: right; font-variant-numeric: tabular-nums; } tr.first > * { border-top: 2px solid #999; }
figure { margin: 0; } img { max-width: 100%; height: auto; } figcaption { color: #555; font-size: .9rem; }
pre { overflow-x: auto; padding: .7rem; background: #f4f4f4; font-size: .85rem; }
"""


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def section(title: str, *parts: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def figure(png: bytes, alt: str, caption: str) -> str:
    data = base64.b64encode(png).decode()
    image = f'<img src="data:image/png;base64,{data}" alt="{escape(alt)}">'
    return f"<figure>\n{image}\n<figcaption>{escape(caption)}</figcaption>\n</figure>"


def table(caption: str, header: Sequence[str], groups: Sequence[Sequence[Sequence[str]]], text_columns: int) -> str:
    """Rows in groups, which a line separates; the first `text_columns` cells of a row are headings, then numbers."""
    rows = []
    for group in groups:
        for number, row in enumerate(group):
            cells = [f'<th scope="row">{escape(cell)}</th>' for cell in row[:text_columns]]
            cells += [f'<td class="number">{escape(cell)}</td>' for cell in row[text_columns:]]
            rows.append(("<tr>" if number else '<tr class="first">') + "".join(cells) + "</tr>")
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "\n".join(rows)
    return (
        f'<div class="wide"><table>\n<caption>{escape(caption)}</caption>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def details(summary: str, text: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>\n<pre>{escape(text)}</pre></details>"


def page(title: str, *parts: str) -> str:
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<h1>{escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )
