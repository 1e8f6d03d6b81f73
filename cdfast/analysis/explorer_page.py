"""The attention explorer as a part of a page: its controls, its data, and the script."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cdfast.page import data_block, text


def _asset(name: str) -> str:
    return (Path(__file__).parents[1] / "assets" / name).read_text("utf-8")


# The script sets the style too: without a script there is nothing to style, and pages that have no
# explorer stay as they are.
SCRIPT = "\n".join(
    [
        '"use strict";',
        f"const EXPLORER_STYLE = {json.dumps(_asset('explorer.css'))};",
        _asset("explorer_maps.js"),
        _asset("explorer.js"),
    ]
)
_SECTION = """
<p>Where the models look when they read a token or write the answer: attention on the image, mean
over heads. A token of the question is read in its own row, a token of the answer in the row that
predicts it. Values are shares of all attention of the row, text included.</p>
{left_out}
<noscript><p class="caveat">The attention explorer needs JavaScript, which is switched off here.
Missing are the attention maps of single samples, layers and tokens; all other figures and tables of
this page need no script.</p></noscript>
<div class="explorer" id="{name}" data-from="{name}-data" hidden>
<p class="caveat" data-part="error" role="alert" hidden></p>
<div class="explorer-bar">
<label>Sample <select data-control="sample"></select></label>
<button type="button" data-step="-1">Previous</button>
<button type="button" data-step="1">Next</button>
</div>
<p data-part="asked"></p>
<div class="explorer-bar">
<label>Layers <select data-control="mode">
<option value="matched">matched</option>
<option value="depth">same relative depth</option>
<option value="own">chosen for each model</option>
</select></label>
<div data-part="slider"><label>Layer of {student}
<input type="range" data-control="layer" min="0" step="1" aria-describedby="{name}-layer"></label>
<span data-part="layer" id="{name}-layer"></span></div>
</div>
<div class="explorer-bar" data-part="own" role="group" aria-label="Layer of each model"></div>
<fieldset><legend>Token (in a frame: the answer)</legend>
<div class="explorer-tokens" data-part="tokens"></div></fieldset>
<div class="explorer-bar">
<label>Colour scale <select data-control="scale">
<option value="shared">shared by the models</option>
<option value="own">each model its own</option>
</select></label>
<label>Opacity <input type="range" data-control="opacity" min="0" max="1" step="0.05"></label>
<label><input type="checkbox" data-control="sinks"> mark sinks</label>
</div>
<p role="status" aria-live="polite" data-part="summary"></p>
<p class="caveat" data-part="geometry" hidden></p>
<div class="explorer-figures" data-part="figures"></div>
<div class="explorer-bar" role="group" aria-label="One patch">
<span>One patch:</span>
<label data-part="image">image <input type="number" data-control="image" min="1"></label>
<label>row <input type="number" data-control="row" min="1"></label>
<label>column <input type="number" data-control="column" min="1"></label>
<span data-part="patch"></span>
</div>
<details><summary>The patches with the most attention, as a table</summary>
<div class="scroll" role="region" tabindex="0" aria-label="The patches with the most attention">
<table data-part="table"></table></div></details>
<details><summary>What the numbers mean</summary>
<p>Layers count from 0. Matched: a layer of the student beside the mean map of the teacher layers it
was aligned with; other models in the layer at the same relative depth. Cosine: of the two maps over
all visual tokens, in the chosen row. P(right answer): probability of its first token; a model
answers right if that is the most likely of the choices' first tokens, or, without choices, of all
tokens.</p>
<p>A cross marks a sink: a patch that is above mean + std of the map in more than half of the text
rows. Sinks do not set the end of the colour scale.</p>
<p>Patches are shown on the picture as the model was given it, with its padding; what it never saw
is dark. Rows and columns count patches. Shares of the image are exact. The value of a patch is
stored in one byte, so it may be off by up to 0.4% of the largest one in its row.</p></details>
{data}
</div>
"""


def explorer_section(data: Mapping[str, Any], name: str = "explorer") -> str:
    """The explorer as HTML for a section of `cdfast.page.page`, which also needs `SCRIPT`.

    Args:
        data: of `cdfast.analysis.explorer.explorer_data`.
        name: id of its element; another one for each explorer on a page. The part of the address
            behind `#` says what is shown (`#sample=2&layer=5&token=12`, and `in=name` where the
            name is not the default).
    """
    left_out = f'<p class="caveat">{text(data["left_out"])}</p>' if data["left_out"] else ""
    if not data["samples"]:
        return left_out or "<p>There are no samples to show.</p>"
    return _SECTION.format(
        name=text(name),
        left_out=left_out,
        student=text(data["student"]),
        data=data_block(data, f"{name}-data"),
    )
