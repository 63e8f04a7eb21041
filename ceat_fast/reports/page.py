"""A self-contained HTML page: text is escaped, pictures are embedded, nothing is loaded from elsewhere."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape

from ceat_fast.reports.canvas import Picture

STYLE = """
:root { color-scheme: light; --ink: #1d2733; --soft: #5b6775; --line: #dde3ea; --bad: #b3360b; --good: #1a6e46; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem 1rem 4rem; max-width: 68rem; font: 16px/1.5 system-ui, sans-serif; }
body { color: var(--ink); background: #fff; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .2rem 0 .6rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
p { max-width: 46rem; margin: .5rem 0; } .soft { color: var(--soft); font-size: .9rem; }
.wide { overflow-x: auto; margin: .6rem 0; background: linear-gradient(to left, #fff 1.5rem, #fff0 3rem) local,
  linear-gradient(to left, #8a96a355, #fff0 1rem); } /* a shadow on the right while there is more to scroll to */
/* Whole pixels: a browser rounds the rows of the sticky column for themselves. */
table { border-collapse: separate; border-spacing: 0; font: 15px/22px system-ui, sans-serif; }
.caption { color: var(--soft); font-size: .9rem; margin: 1rem 0 0; }
th, td { padding: 5px 10px; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
thead th { border-bottom: 2px solid var(--ink); white-space: nowrap; overflow-wrap: normal; }
th[scope=row] { font-weight: 500; overflow-wrap: normal; min-width: 6.6rem; }
th:first-child { position: sticky; left: 0; background: #fff; }
th + th[scope=row] { font-weight: 400; min-width: 15rem; }
th[scope=rowgroup] { font-weight: 600; padding-top: 11px; } th[scope=rowgroup] span { position: sticky; left: 10px; }
td.text { min-width: 6rem; } thead th.text { white-space: normal; min-width: 6rem; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td small { color: var(--soft); font-weight: 400; display: block; font-size: 12px; line-height: 15px; }
tbody + tbody > tr:first-child > * { border-top: 2px solid #9aa5b1; } td.best { font-weight: 700; }
.row { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
.tile { border: 1px solid var(--line); border-radius: .5rem; padding: .5rem .9rem; min-width: 7.2rem; }
.tile b { display: block; font-size: 1.5rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .82rem; display: block; }
.flag { border-left: 4px solid var(--bad); padding: .3rem .8rem; margin: .6rem 0; background: #fdf3ee; }
.ok { border-left: 4px solid var(--good); padding: .3rem .8rem; margin: .6rem 0; background: #eef7f2; }
figure { margin: 0; } img { max-width: 100%; height: auto; display: block; }
figcaption { color: var(--soft); font-size: .85rem; }
.example { border: 1px solid var(--line); border-radius: .5rem; padding: .5rem; }
.example div { display: flex; gap: .3rem; }
.example img { width: 84px; height: 84px; image-rendering: pixelated; outline: 1px solid var(--line); }
.example figcaption { padding-top: .3rem; } .wrong { color: var(--bad); font-weight: 600; }
details { margin: .5rem 0; } summary { cursor: pointer; }
pre { overflow-x: auto; padding: .7rem; background: #f4f6f8; font-size: .82rem; white-space: pre-wrap; }
@media (max-width: 30rem) { body { padding: .8rem .7rem 3rem; } h1 { font-size: 1.35rem; } .tile { flex: 1 1 7rem; } }
@media print { details { display: none; } section { break-inside: avoid-page; } }
"""

Cell = str | tuple[str, str]  # text, or text and a small line below it


def paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def section(title: str, *parts: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def subsection(title: str, *parts: str) -> str:
    return f"<h3>{escape(title)}</h3>\n" + "\n".join(parts)


def box(kind: str, title: str, *lines: str) -> str:
    """A coloured box of kind "flag" or "ok"."""
    text = "".join(f"<br>{escape(line)}" for line in lines if line)
    return f'<div class="{kind}"><strong>{escape(title)}</strong>{text}</div>'


def tiles(values: Mapping[str, tuple[str, str]]) -> str:
    """Name -> (large text, small text), as tiles that wrap."""
    inner = "".join(
        f'<div class="tile"><span>{escape(name)}</span><b>{escape(large)}</b><span>{escape(small)}</span></div>'
        for name, (large, small) in values.items()
    )
    return f'<div class="row">{inner}</div>'


def figure(picture: Picture, alt: str, caption: str = "") -> str:
    below = f"\n<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure>\n<img src="{_data(picture.png)}" width="{picture.width}" alt="{escape(alt)}">{below}\n</figure>'


def row(*parts: str) -> str:
    """Parts side by side where there is room."""
    return '<div class="row">' + "\n".join(parts) + "</div>"


def example(images: Mapping[str, bytes], caption: str, verdict: str) -> str:
    """Small pictures side by side, by alternative text; `verdict` is set off."""
    inner = "".join(f'<img src="{_data(png)}" alt="{escape(name)}">' for name, png in images.items())
    text = f'{escape(caption)} <span class="wrong">{escape(verdict)}</span>'
    return f'<figure class="example"><div>{inner}</div><figcaption>{text}</figcaption></figure>'


def table(
    caption: str,
    header: Sequence[str],
    groups: Sequence[Sequence[Sequence[Cell]]],
    text_columns: int,
    best: frozenset[tuple[int, int, int]] = frozenset(),
    labels: Sequence[str] = (),
    kind: str = "number",
) -> str:
    """Rows in groups, which a line separates; the first `text_columns` cells of a row are headings, then values.

    `best` holds (group, row, column) of the cells to set in bold; `labels` head the groups, if there are any; `kind` is
    that of the values, "number" or "text".
    """
    bodies = []
    for at, group in enumerate(groups):
        rows = []
        if labels:
            rows.append(f'<tr><th scope="rowgroup" colspan="{len(header)}"><span>{escape(labels[at])}</span></th></tr>')
        for number, row in enumerate(group):
            cells = [f'<th scope="row">{_cell(cell, _breakable)}</th>' for cell in row[:text_columns]]
            for column, cell in enumerate(row[text_columns:], start=text_columns):
                bold = " best" if (at, number, column) in best else ""
                cells.append(f'<td class="{kind}{bold}">{_cell(cell)}</td>')
            rows.append("<tr>" + "".join(cells) + "</tr>")
        bodies.append("<tbody>\n" + "\n".join(rows) + "\n</tbody>")
    kinds = ["" if column < text_columns else f' class="{kind}"' for column in range(len(header))]
    head = "".join(f'<th scope="col"{of}>{escape(name)}</th>' for of, name in zip(kinds, header, strict=True))
    body = "\n".join(bodies)
    # Not a caption element: that would be as wide as the table, wider than a phone.
    title = paragraph(caption, "caption") if caption else ""
    return (
        f'{title}<div class="wide"><table aria-label="{escape(caption)}">\n<thead><tr>{head}</tr></thead>\n'
        f"{body}\n</table></div>"
    )


def details(summary: str, text: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>\n<pre>{escape(text)}</pre></details>"


def page(title: str, *parts: str) -> str:
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<h1>{escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def _cell(cell: Cell, text: Callable[[str], str] = escape) -> str:
    return text(cell) if isinstance(cell, str) else f"{text(cell[0])}<small>{escape(cell[1])}</small>"


def _breakable(text: str) -> str:
    """Escaped; paths and names of settings may go on in the next line."""
    return re.sub(r"([/_])(?=\w)", r"\1<wbr>", escape(text))


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
