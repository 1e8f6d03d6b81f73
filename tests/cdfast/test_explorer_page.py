"""The attention explorer's page: its markup, and what a real browser makes of it."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from cdfast import geometry
from cdfast.analysis.explorer import explorer_data
from cdfast.analysis.explorer_page import SCRIPT, explorer_section
from cdfast.maps import batch_attention_maps
from cdfast.page import data_block, page
from tests.cdfast.browser import Browser
from tests.cdfast.test_explorer import EVIL, MATCHES, cases, models_of
from tests.cdfast.test_report import VOID
from tests.cdfast.tiny_families import llava, llava_onevision, llava_pad, qwen, smolvlm


class Blocks(HTMLParser):
    """Elements of a page, and the text of its scripts."""

    def __init__(self, markup):
        super().__init__()
        self.tags, self.ids, self.scripts, self.open = [], [], [], []
        self.feed(markup)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            attributes, text = self.scripts[-1]
            self.scripts[-1] = (attributes, text + data)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def made():
    """Models, the data, and a page with the explorer."""
    models, processor = models_of()
    models["baseline"] = llava(seed=2)[0]
    data = explorer_data(models, processor, cases(), matches=MATCHES)
    return models, processor, data, whole_page(data)


def whole_page(data, script=SCRIPT):
    sections = {"Attention explorer": explorer_section(data), "Other figures": "<p>none</p>"}
    return page("A report", "<h1>A report</h1>", sections, script)


def test_texts_cannot_leave_the_data(made):
    _, _, data, markup = made
    blocks = Blocks(markup)
    assert "img" not in blocks.tags
    (attributes, content), (_, script) = blocks.scripts
    assert attributes == {"type": "application/json", "id": "explorer-data"}
    assert json.loads(content) == json.loads(json.dumps(data))
    assert json.loads(content)["samples"][1]["question"] == EVIL
    assert not re.search("[<>&\u2028]", content)
    assert script == SCRIPT
    assert Blocks(data_block("<!--<script>", 'a"b')).scripts[0][0]["id"] == 'a"b'


def test_policy_names_the_script_and_nothing_else(made):
    markup = made[3]
    [policy] = re.findall('Policy" content="([^"]*)"', markup)
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules.pop("script-src").startswith("'sha256-")
    assert rules == {"default-src": "'none'", "style-src": "'unsafe-inline'", "img-src": "data:"}
    plain = page("A report", "<h1>A report</h1>", {"a": "<p>b</p>"})
    assert "content=\"default-src 'none'; style-src 'unsafe-inline'\"" in plain
    assert "<script" not in plain
    assert "</main>\n</body>" in plain
    for broken in ("a = '</Script>'", "<!-- a"):
        with pytest.raises(ValueError, match="script: expected JavaScript without"):
            page("", "", {}, broken)


def test_page_nests_and_says_what_needs_the_script(made):
    blocks = Blocks(made[3])
    assert blocks.open == []
    assert len(blocks.ids) == len(set(blocks.ids))
    assert "noscript" in blocks.tags


# -- in a browser ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    running = Browser(tmp_path_factory.mktemp("browser"))
    yield running
    running.close()


@pytest.fixture(scope="module")
def shown(made, browser, tmp_path_factory):
    """Opens the page, or one made of other data, at a place; nothing may complain meanwhile."""
    folder = tmp_path_factory.mktemp("page")

    def visit(place="", data=None, script=SCRIPT, name="page"):
        path = folder / f"{name}.html"
        path.write_text(made[3] if data is None else whole_page(data, script), encoding="utf-8")
        browser.open(f"{path.as_uri()}{place}")
        # The summary is the last thing that is said after a change.
        until(browser, f"{SUMMARY} || !{ERROR}.hidden")
        return browser

    return visit


SUMMARY = "document.querySelector('[data-part=summary]').textContent"
ERROR = "document.querySelector('[data-part=error]')"
CANVASES = "[...document.querySelectorAll('canvas')].map(c => c.getAttribute('aria-label'))"
CAPTIONS = "[...document.querySelectorAll('.explorer figcaption')].map(c => c.innerText)"
TABLE = """[...document.querySelectorAll('.explorer table tr')].map(
  row => [...row.children].map(cell => cell.textContent))"""


def until(browser, condition):
    """Wait until a JavaScript expression is true."""
    waited = browser.run(
        f"""new Promise(done => {{ const end = Date.now() + 20000;
        const wait = () => ({condition}) ? done('')
          : Date.now() > end ? done('not within 20 s') : setTimeout(wait, 20); wait(); }})"""
    )
    assert not waited, f"{condition}: {waited}"


def percent(value):
    digits = 3 if value < 0.00995 else 2 if value < 0.0995 else 1
    return f"{100 * value:.{digits}f}%"


def near(shown, value, top):
    """Whether a percentage that is shown is `value`, within what one byte keeps."""
    return abs(float(shown.split("%")[0]) / 100 - value) <= top / 254 + 6e-5


def text_of(browser, part):
    return browser.run(f"document.querySelector('[data-part={part}]').textContent")


STATES = {
    "start": ("", 0, "answer", {"teacher": [0, 1], "student": [0], "baseline": [0]}),
    "matched": (
        "#sample=1&layer=1&token=20",
        *(0, 20, {"teacher": [1, 2], "student": [1], "baseline": [1]}),
    ),
    "depth": (
        "#sample=3&layer=2&token=12&mode=depth",
        *(2, 12, {"teacher": [3], "student": [2], "baseline": [2]}),
    ),
    "own": (
        "#sample=2&token=answer&mode=own&layers=3,0,1",
        *(1, "answer", {"teacher": [3], "student": [0], "baseline": [1]}),
    ),
    "impossible": (
        "#sample=9&layer=7&token=nine&mode=other&opacity=x",
        *(0, "answer", {"teacher": [0, 1], "student": [0], "baseline": [0]}),
    ),
}


@pytest.mark.parametrize("state", STATES)
def test_what_is_shown_are_the_numbers_of_the_maps(made, shown, state):
    place, number, token, layers = STATES[state]
    models, processor, data, _ = made
    browser = shown(place)
    assert browser.complaints() == []
    prompt = cases()[number].prompt(processor)
    select = {} if token == "answer" else {"token": token}
    labels, captions = browser.run(CANVASES), browser.run(CAPTIONS)[1:]
    rows = browser.run(TABLE)[1:]
    vectors = {}
    for name, model in models.items():
        [maps] = batch_attention_maps(model, processor, [prompt])
        vectors[name] = maps.vector(layers[name], **select)
        images = len(prompt.images)
        arrays = [maps.array(layers[name], image=i, **select) for i in range(images)]
        sinks = [maps.grids[i].mask(maps.sinks(layers[name], image=i)) for i in range(images)]
        top = vectors[name].max()
        caption = captions.pop(0).splitlines()
        assert caption[0] == name
        wanted = ("layers " if len(layers[name]) > 1 else "layer ") + ", ".join(
            map(str, layers[name])
        )
        assert caption[1] == f"{wanted}; {percent(vectors[name].sum())} on the image"
        if name != "teacher":
            a, b = vectors[name], vectors["teacher"]
            cosine = float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
            assert float(caption.pop(2).split(": ")[1]) == pytest.approx(cosine, abs=0.011)
        marked = int(sum(maps.sinks(layers[name])))
        assert caption[2] == f"sinks: {marked} of {len(vectors[name])} visual tokens"
        answer = data["samples"][number]["models"][name]
        assert f"answers {'right' if answer['right'] else 'wrong'}" in caption[3]
        assert caption[3].endswith(f"{answer['probability']:.3f}")
        for i, array in enumerate(arrays):
            label = labels.pop(0)
            assert label.startswith(f"{name}, {wanted}: {percent(vectors[name].sum())} on the")
            row, column = map(int, re.search(r"row (\d+), column (\d+)", label).groups())
            assert array[row - 1, column - 1] >= array.max() - top / 127
            assert near(label.split(": ")[-1], array.max(), top)
            assert label.endswith("(sink)") == sinks[i][row - 1, column - 1]
            assert (f"image {i + 1}" in label) == (images > 1)
        for cells in rows:
            image = int((re.search(r"image (\d+)", cells[0]) or ["", "1"])[1]) - 1
            row, column = map(int, re.search(r"row (\d+), column (\d+)", cells[0]).groups())
            cell = cells[1 + list(models).index(name)]
            assert near(cell, arrays[image][row - 1, column - 1], top)
            assert cell.endswith("(sink)") == sinks[image][row - 1, column - 1]
    assert labels == captions == []
    assert 8 <= len(rows) <= 24


@pytest.mark.parametrize(
    ("family", "known"),
    [
        (llava_pad, True),
        (qwen, True),
        (smolvlm, True),
        (llava_onevision, True),
        (llava_onevision, False),  # as if its places were not known
    ],
)
def test_every_family_is_drawn(shown, family, known, monkeypatch):
    if not known:
        monkeypatch.setattr(geometry, "ANYRES", ())
    models, processor = models_of(family)
    data = explorer_data(models, processor, cases()[:1], matches={1: (1,)})
    browser = shown("#sample=1&layer=1&token=answer", data, name=f"{family.__name__}{known}")
    assert browser.complaints() == []
    assert known == (data["samples"][0]["geometry"] == "")
    assert ("it is not known" in text_of(browser, "geometry")) == (not known)
    sizes = browser.run("[...document.querySelectorAll('canvas')].map(c => [c.width, c.height])")
    # Two pictures of 100 x 60 and 50 x 90: padded ones are shown with their padding (several
    # pictures in a prompt are padded by LLaVA-OneVision). Unknown places: lines of 32 tokens.
    ratios = [1, 1] if family in (llava_pad, llava_onevision) else [100 / 60, 50 / 90]
    if not known:
        ratios = [32 / -(-data["samples"][0]["visual"] // 32)]
    assert [w / h for w, h in sizes] == pytest.approx(ratios * 2, rel=0.01)
    [maps] = batch_attention_maps(models["teacher"], processor, [cases()[0].prompt(processor)])
    assert f"{percent(maps.vector(1).sum())} on the image" in browser.run(CANVASES)[0]


def test_colours_are_those_of_the_scale(made, shown):
    models, processor, _, _ = made
    browser = shown("#sample=3&layer=1&token=answer&scale=own&opacity=1&sinks=0")
    [maps] = batch_attention_maps(models["student"], processor, [cases()[2].prompt(processor)])
    sinks = maps.grids[0].mask(maps.sinks(1))
    array = np.where(sinks, 0, maps.array(1))
    height, width = array.shape
    pixels = browser.run(
        f"""(() => {{ const c = document.querySelectorAll('canvas')[1], pen = c.getContext('2d');
        const found = [];
        for (let row = 0; row < {height}; row++) for (let column = 0; column < {width}; column++)
          found.push([...pen.getImageData(Math.floor((column + .5) * c.width / {width}),
            Math.floor((row + .5) * c.height / {height}), 1, 1).data].slice(0, 3));
        return found; }})()"""
    )
    pixels = np.array(pixels).reshape(height, width, 3)
    top = np.unravel_index(array.argmax(), array.shape)
    np.testing.assert_allclose(pixels[top], (0xFC, 0xFF, 0xA4), atol=8)
    # Where there is little attention the picture stays: grey.
    low = np.unravel_index(np.where(sinks, 1, array).argmin(), array.shape)
    assert array[low] < 0.5 * array.max()
    assert np.ptp(pixels[low].astype(int)) < np.ptp(pixels[top].astype(int))


def test_keys_move_tokens_layers_and_samples(shown):
    browser = shown()
    focus = "document.querySelector('{}').focus()"
    browser.run(focus.format("[data-part=tokens] :checked"))
    browser.press("ArrowLeft")  # from the whole answer to its last token
    until(browser, f"{SUMMARY}.includes('g, of the answer')")
    [last] = re.findall("token=([0-9]+)", browser.run("location.hash"))
    browser.run(focus.format("[data-control=layer]"))
    browser.press("ArrowRight")
    until(browser, f"{SUMMARY}.includes('student, layer 1:')")
    assert browser.run("location.hash") == f"#sample=1&layer=1&token={last}"
    assert text_of(browser, "layer") == "1, matched with teacher 1, 2"
    before = browser.run(CANVASES)
    browser.run(focus.format('[data-step="-1"]'))
    browser.press(" ")  # before the first one comes the last one
    until(browser, "location.hash.includes('sample=3&')")
    # The address leads to the same place.
    assert shown(f"#sample=1&layer=1&token={last}").run(CANVASES) == before
    assert browser.complaints() == []


def test_a_patch_is_read_by_number_and_by_pointer(made, shown):
    models, processor, _, _ = made
    browser = shown("#sample=3&layer=1&token=answer")
    change = "(() => {{ const input = document.querySelector('[data-control={}]'); "
    change += "input.value = {}; input.dispatchEvent(new Event('input')); }})()"
    browser.run(change.format("row", 4))
    browser.run(change.format("column", 2))
    browser.run(change.format("column", 99))  # there is none: the last one stays
    said = text_of(browser, "patch")
    until(browser, f"{SUMMARY}.includes('Patch: {said}.')")
    for name, layers in (("teacher", [1, 2]), ("student", [1])):
        model = models[name]
        [maps] = batch_attention_maps(model, processor, [cases()[2].prompt(processor)])
        [value] = re.findall(rf"{name} ([0-9.]+%)", said)
        assert near(value, maps.array(layers)[3, 1], maps.vector(layers).max())
    place = "(() => {{ const box = document.querySelector('canvas').getBoundingClientRect(); "
    place += "scrollBy(0, box.top); return [box.left + box.width * {}, box.height * {}]; }})()"
    x, y = browser.run(place.format(5.5 / 6, 0.5 / 6))
    browser.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    row, column = (f"document.querySelector('[data-control={n}]').value" for n in ("row", "column"))
    assert browser.run(f"[{row}, {column}]") == ["1", "6"]


def test_the_page_runs_and_loads_nothing_else(shown):
    browser = shown("#sample=2&layer=1&token=answer")
    assert browser.complaints() == []
    assert EVIL.split("<!--")[0] in text_of(browser, "asked")
    for tag, source in (
        ("script", "textContent = 'window.hacked = 1'"),
        ("img", "src = 'http://192.0.2.1/a.png'"),
        ("iframe", "src = 'file:///etc/hostname'"),
    ):
        refused = browser.run(
            f"""new Promise(done => {{
            document.onsecuritypolicyviolation = event => done(event.effectiveDirective);
            setTimeout(() => done('nothing was refused'), 3000);
            const made = document.createElement('{tag}'); made.{source};
            document.body.append(made); }})"""
        )
        assert refused.startswith({"script": "script-src", "img": "img-src"}.get(tag, "frame-src"))
    assert browser.run("window.hacked") is None
    assert browser.run("document.querySelectorAll('.explorer [onerror]').length") == 0


def test_an_error_is_told_on_the_page(made, shown):
    data = json.loads(json.dumps(made[2]))
    data["samples"][0]["models"]["student"]["layers"]["0"]["values"][-1] = "%"
    browser = shown("", data, name="broken")
    assert "The attention explorer stopped" in text_of(browser, "error")
    assert browser.run("document.querySelector('[data-part=error]').checkVisibility()")


def test_without_scripts_the_page_says_so(shown):
    browser = shown()
    browser.send("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(browser.run("location.href"))
        said = browser.run("document.body.innerText")
    finally:
        browser.send("Emulation.setScriptExecutionDisabled", value=False)
    assert "needs JavaScript" in said
    assert "Colour scale" not in said


CONTRAST = """(() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(
    v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const behind = (one) => { for (let e = one; e; e = e.parentElement) {
    const colour = rgb(getComputedStyle(e).backgroundColor);
    if (colour.length < 4 || colour[3] > 0) return colour; } return [255, 255, 255]; };
  const texts = [...document.querySelectorAll('main *')].filter(e => e.checkVisibility()
    && [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()));
  return texts.map(e => { const pair = [light(rgb(getComputedStyle(e).color)), light(behind(e))];
    return [(Math.max(...pair) + .05) / (Math.min(...pair) + .05), e.outerHTML.slice(0, 90)]; })
    .sort((a, b) => a[0] - b[0]).slice(0, 3); })()"""
SMALL = """[...document.querySelectorAll('.explorer button, .explorer select, ' +
  '.explorer input[type=range], .explorer label:has([type=checkbox])')]
  .filter(e => e.checkVisibility()).map(e => [e.getBoundingClientRect().height, e.outerHTML])
  .filter(([height]) => height < 43.9)"""
WIDE = """[...document.querySelectorAll('.explorer *')].filter(e => e.checkVisibility() &&
  !e.closest('.scroll') && e.getBoundingClientRect().right > innerWidth + 1)
  .map(e => e.outerHTML.slice(0, 90))"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [320, 1200])
def test_layout_at_both_ends(shown, width, dark):
    browser = shown("#sample=1&layer=1&token=20")
    try:
        browser.size(width)
        browser.dark(dark)
        browser.run("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert browser.run("document.documentElement.scrollWidth") <= width
        assert browser.run(WIDE) == []
        assert browser.run(SMALL) == []
        assert browser.run(CONTRAST)[0][0] >= 4.5
    finally:
        browser.size(1200)
        browser.dark(False)


def test_screen_readers_find_names_and_values(made, shown):
    browser = shown("#sample=1&layer=1&token=20")
    found, statuses, checked = {}, [], []
    for node in browser.send("Accessibility.getFullAXTree")["nodes"]:
        if not node.get("ignored"):
            name = node.get("name", {}).get("value", "")
            properties = {p["name"]: p["value"].get("value") for p in node.get("properties", [])}
            if node["role"]["value"] in ("status", "alert", "log"):
                statuses.append(properties)
            if node["role"]["value"] == "radio" and properties["checked"] == "true":
                checked.append(name)
            properties["description"] = node.get("description", {}).get("value")
            found.setdefault(node["role"]["value"], {})[name] = properties
    assert {"Sample", "Layers", "Colour scale"} <= found["combobox"].keys()
    assert {"Previous", "Next"} <= found["button"].keys()
    assert found["slider"].keys() == {"Layer of student", "Opacity"}
    layer = "document.querySelector('[data-control=layer]')"
    text = "1, matched with teacher 1, 2"
    assert browser.run(f"{layer}.getAttribute('aria-valuetext')") == text
    assert found["slider"]["Layer of student"]["description"] == text
    assert found["checkbox"]["mark sinks"]["checked"] == "true"
    assert "Token (in a frame: the answer)" in found["group"]
    tokens = found["radio"]
    assert {"space", "new line", "W", "d, of the answer", "the whole answer"} <= tokens.keys()
    [token] = [t for t in made[2]["samples"][0]["tokens"] if t["number"] == 20]
    assert checked == [token["text"]]
    images = {**found.get("image", {}), **found.get("img", {})}
    assert {*browser.run(CANVASES)} <= images.keys()
    assert {"row", "column", "image"} <= found["spinbutton"].keys()
    assert not any(
        name == "" for role in ("button", "image", "radio") for name in found.get(role, {})
    )
    # One place that speaks, and politely.
    assert [status["live"] for status in statuses] == ["polite"]


def test_two_explorers_keep_apart(made, shown, browser, tmp_path):
    data = made[2]
    sections = {"One": explorer_section(data), "Two": explorer_section(data, "second")}
    (tmp_path / "two.html").write_text(page("t", "", sections, SCRIPT), encoding="utf-8")
    place = "#sample=2&layer=1&token=answer&in=second"
    browser.open((tmp_path / "two.html").as_uri() + place)
    every = "[...document.querySelectorAll('[data-part=summary]')].map(e => e.textContent)"
    until(browser, f"{every}.every(text => text)")
    said = [text.split(",")[0] for text in browser.run(every)]
    assert said == ["Sample 1 of 3", "Sample 2 of 3"]
    assert browser.complaints() == []
