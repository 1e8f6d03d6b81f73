"""Pieces of a self-contained HTML page. Text is escaped here and nowhere else."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MISSING = "–"
_CSS = """
:root { color-scheme: light dark; --text: #1b1b1b; --page: #fafafa; --line: #cfcfcf;
  --soft: #efefef; --link: #0b57a4; --caveat: #fff4d6; --edge: #b07a00; }
@media (prefers-color-scheme: dark) { :root { --text: #e8e8e8; --page: #16181b; --line: #44484e;
  --soft: #23262b; --link: #8ec5ff; --caveat: #352b10; --edge: #e0ad3c; } }
body { font: 1rem/1.5 system-ui, sans-serif; color: var(--text); background: var(--page);
  margin: 0 auto; max-width: 64rem; padding: 1rem 1.25rem 4rem; }
h1, h2, h3 { line-height: 1.25; } h2 { margin-top: 2.5rem; }
a { color: var(--link); } nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem;
  list-style: none; padding: 0; }
.outcome { font-size: 1.15rem; font-weight: 600; }
.caveat { background: var(--caveat); border-left: .3rem solid var(--edge); padding: .75rem 1rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .25rem 0; font-weight: 600; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .7rem .25rem 0; text-align: right;
  vertical-align: top; }
td { white-space: pre; } td.text { white-space: normal; min-width: 12rem; }
th:first-child, .text { text-align: left; } thead th { background: var(--soft); }
tr.average > * { font-weight: 600; }
figure { margin: 1rem 0; } .card { background: #fff; border: 1px solid var(--line);
  border-radius: .4rem; padding: .5rem; overflow-x: auto; }
.card svg { display: block; width: 100%; min-width: 36rem; height: auto; }
.card svg * { stroke-linejoin: round; stroke-linecap: butt; }
figcaption { font-size: .9rem; margin-top: .4rem; }
summary { cursor: pointer; padding: .25rem 0; }
:focus-visible { outline: .15rem solid var(--link); outline-offset: .1rem; }
pre { background: var(--soft); padding: .75rem; overflow-x: auto; font-size: .85rem; }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<main>
{body}
</main>{script}
</body>
</html>
"""


def text(value: Any) -> str:
    """`value` as HTML text, safe in attributes too."""
    return html.escape(str(value))


def page(title: str, header: str, sections: Mapping[str, str], script: str = "") -> str:
    """A whole page: header, links to the sections, and each section that has content.

    The browser is told to load nothing and to run nothing: no network, no script. With `script`
    it may run that one, known by its SHA-256, and show pictures that are in the page.

    Args:
        title, header: of the page; the header is HTML.
        sections: title -> HTML.
        script: JavaScript, run at the end of the page.

    Raises:
        ValueError: a script with text that would end its element.
    """
    ids = {name: name.lower().replace(" ", "-") for name, content in sections.items() if content}
    links = "".join(
        f'<li><a href="#{anchor}">{text(name)}</a></li>' for name, anchor in ids.items()
    )
    body = [
        f'<header>{header}<nav aria-label="Sections"><ul>{links}</ul></nav></header>',
        *(
            f'<section aria-labelledby="{anchor}"><h2 id="{anchor}">{text(name)}</h2>'
            f"{sections[name]}</section>"
            for name, anchor in ids.items()
        ),
    ]
    policy, element = _POLICY, ""
    if script:
        if "</script" in script.lower() or "<!--" in script:
            raise ValueError("script: expected JavaScript without '</script' and '<!--'.")
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy += f"; img-src data:; script-src 'sha256-{digest}'"
        element = f"\n<script>{script}</script>"
    return _PAGE.format(
        title=text(title), policy=policy, css=_CSS, body="\n".join(body), script=element
    )


def data_block(content: Any, name: str) -> str:
    """JSON that a script of the page reads, in an element with the id `name`.

    `<`, `>` and `&` are written as escapes of JSON, so that no text of it can end the element.
    """
    escaped = json.dumps(content, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        escaped = escaped.replace(character, f"\\u{ord(character):04x}")
    return f'<script type="application/json" id="{text(name)}">{escaped}</script>'


def table(
    caption: str, heading: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[int] = ()
) -> str:
    """A table whose first column is headings; the columns numbered in `left` are left-aligned."""
    align = [' class="text"' if i in left else "" for i in range(len(heading))]
    top = "".join(f'<th scope="col"{a}>{text(cell)}</th>' for a, cell in zip(align, heading))
    lines = []
    for row in rows:
        kind = ' class="average"' if row[0].endswith(" average") else ""
        cells = "".join(f"<td{a}>{text(cell)}</td>" for a, cell in zip(align[1:], row[1:]))
        lines.append(f'<tr{kind}><th scope="row">{text(row[0])}</th>{cells}</tr>')
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{text(caption)}">'
        f"<table><caption>{text(caption)}</caption><thead><tr>{top}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def figure(svg: str, caption: str, numbers: str) -> str:
    """A figure on a white card, and its numbers to unfold below."""
    below = (
        f"<figcaption>{text(caption)}</figcaption>{details('The numbers of this figure', numbers)}"
    )
    return f'<figure><div class="card">{svg}</div>{below}</figure>'


def details(summary: str, content: str) -> str:
    """Content to unfold; closed at first."""
    return f"<details><summary>{text(summary)}</summary>{content}</details>"


def fixed(value: Any, digits: int = 3) -> str:
    """A number with so many decimals; a dash for None, NaN and infinity."""
    return f"{value:.{digits}f}" if _finite(value) else MISSING


def general(value: Any) -> str:
    """A number with four significant digits, or a dash."""
    return f"{value:.4g}" if _finite(value) else MISSING


def option(value: Any) -> str:
    """The value of a recipe's option."""
    return general(value) if isinstance(value, float) else json.dumps(value)


def listed(values: Iterable[Any] | None) -> str:
    """Values with commas between, or a dash for none."""
    return ", ".join(map(str, values or [])) or MISSING


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
