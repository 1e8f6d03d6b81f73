// The attention explorer of a report: see cdfast/explorer.py for the data.
"use strict";

// Inferno without its darkest part, as in the overlays of cdfast.maps.
const COLOURS = ("2b0b57 440a68 59106e 6f196e 84206b 9a2865 b0315b c33b4f d54a41 e45a31 f06f20 " +
  "f8870e fc9f07 fbba1f f7d340 f1ed71 fcffa4").split(" ").map(
  (hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16)));
const STRIP = 32; // tokens in a line where their places in the picture are not known
const LONGER = 448; // pixels of a picture's longer side on its canvas, at least
const TOP = 8; // patches of each model in the table
const SAY_AFTER = 400; // milliseconds without a change, before it is told to screen readers

function colour(share, alpha) {
  const at = Math.min(1, Math.max(0, share)) * (COLOURS.length - 1);
  const low = Math.min(Math.floor(at), COLOURS.length - 2);
  const mixed = COLOURS[low].map((c, i) => Math.round(c + (COLOURS[low + 1][i] - c) * (at - low)));
  return `rgba(${mixed.join(",")},${alpha})`;
}

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

const bytes = (base64) => Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
const floats = (base64) => new Float32Array(bytes(base64).buffer);
const percent = (value) => `${(100 * value).toFixed(value < 0.0995 ? 2 : 1)}%`;
const sum = (values) => values.reduce((total, value) => total + value, 0);
const named = (layers) => (layers.length > 1 ? "layers " : "layer ") + layers.join(", ");

function cosine(a, b) {
  const dot = (x, y) => x.reduce((total, value, i) => total + value * y[i], 0);
  const norm = Math.sqrt(dot(a, a) * dot(b, b));
  return norm > 0 ? dot(a, b) / norm : 1;
}

// The finest grid of an image: which part of which token each of its cells shows.
function cells(planes) {
  const [height, width] = planes[0].shape;
  const shares = Array.from({ length: height * width }, () => []);
  for (const { shape, tokens } of planes) {
    const [down, across] = [height / shape[0], width / shape[1]];
    shares.forEach((parts, cell) => {
      const row = Math.floor(Math.floor(cell / width) / down);
      const token = tokens[row * shape[1] + Math.floor((cell % width) / across)];
      if (token >= 0) parts.push([token, 1 / (down * across)]);
    });
  }
  return { height, width, box: planes[0].box, parts: shares };
}

// One grid per image, or, where places are not known, one strip of all visual tokens.
function gridsOf(sample) {
  if (!sample.geometry) {
    return sample.images.map((image) => ({ ...cells(image.planes), image }));
  }
  const width = Math.min(STRIP, sample.visual);
  const height = Math.ceil(sample.visual / width);
  const tokens = Array.from({ length: height * width }, (_, i) => (i < sample.visual ? i : -1));
  const side = LONGER / STRIP;
  const box = [0, 0, width * side, height * side];
  const image = { width: width * side, height: height * side };
  return [{ ...cells([{ shape: [height, width], tokens, box }]), image }];
}

function greyPicture(image, picture) {
  const zoom = Math.max(1, Math.ceil(LONGER / Math.max(image.width, image.height)));
  const scale = Math.min(zoom, 2 * LONGER / Math.max(image.width, image.height));
  const canvas = element("canvas", {
    width: Math.round(image.width * scale), height: Math.round(image.height * scale) });
  const pen = canvas.getContext("2d");
  pen.fillStyle = "#555";
  pen.fillRect(0, 0, canvas.width, canvas.height);
  if (picture) {
    pen.imageSmoothingEnabled = zoom < 3;
    pen.drawImage(picture, 0, 0, canvas.width, canvas.height);
    const pixels = pen.getImageData(0, 0, canvas.width, canvas.height);
    for (let i = 0; i < pixels.data.length; i += 4) {
      const [red, green, blue] = pixels.data.subarray(i, i + 3);
      pixels.data.fill(51 + 0.8 * (0.299 * red + 0.587 * green + 0.114 * blue), i, i + 3);
    }
    pen.putImageData(pixels, 0, 0);
  }
  return canvas;
}

// Draw a map over its grey picture; `look`: opacity, whether sinks are marked, the patch chosen.
function draw(canvas, grey, grid, values, sinks, limit, look) {
  const pen = canvas.getContext("2d");
  const scale = canvas.width / grid.image.width;
  const [left, top, right, bottom] = grid.box.map((edge) => edge * scale);
  const edgeX = (column) => Math.round(left + (right - left) * column / grid.width);
  const edgeY = (row) => Math.round(top + (bottom - top) * row / grid.height);
  pen.drawImage(grey, 0, 0);
  pen.fillStyle = "rgba(0,0,0,.75)"; // what the model never saw
  pen.beginPath();
  pen.rect(0, 0, canvas.width, canvas.height);
  pen.rect(left, top, right - left, bottom - top);
  pen.fill("evenodd");
  values.forEach((value, cell) => {
    const [row, column] = [Math.floor(cell / grid.width), cell % grid.width];
    const box = [edgeX(column), edgeY(row)];
    box.push(edgeX(column + 1) - box[0], edgeY(row + 1) - box[1]);
    const share = limit > 0 ? Math.min(1, value / limit) : 0;
    pen.fillStyle = colour(share, look.opacity * share);
    pen.fillRect(...box);
    if (look.sinks && sinks[cell]) cross(pen, ...box);
    if (cell === look.cell) {
      pen.lineWidth = 3;
      pen.strokeStyle = "#000";
      pen.strokeRect(...box);
      pen.lineWidth = 1;
      pen.strokeStyle = "#fff";
      pen.strokeRect(...box);
    }
  });
}

function cross(pen, x, y, width, height) {
  const arm = 0.3 * Math.min(width, height);
  const [middle, centre] = [x + width / 2, y + height / 2];
  for (const [style, line] of [["#000", 4], ["#fff", 2]]) { // seen on any background
    pen.strokeStyle = style;
    pen.lineWidth = line;
    pen.beginPath();
    for (const slope of [1, -1]) {
      pen.moveTo(middle - arm, centre - slope * arm);
      pen.lineTo(middle + arm, centre + slope * arm);
    }
    pen.stroke();
  }
}


function drawBar(canvas, opacity) {
  const pen = canvas.getContext("2d");
  for (let x = 0; x < canvas.width; x++) {
    const share = x / (canvas.width - 1);
    for (const style of ["#888", colour(share, opacity * share)]) {
      pen.fillStyle = style;
      pen.fillRect(x, 0, 1, canvas.height);
    }
  }
}

function explorer(root) {
  const data = JSON.parse(document.getElementById(root.dataset.from).textContent);
  const part = (name) => root.querySelector(`[data-part="${name}"]`);
  const control = (name) => root.querySelector(`[data-control="${name}"]`);
  const student = data.models.find((model) => model.name === data.student);
  const kept = data.models.find((model) => model.name === data.reference).layers;
  const matched = student.layers.filter(
    (layer) => data.matches[layer]?.every((other) => kept.includes(other)));
  const start = { sample: 1, mode: matched.length ? "matched" : "depth", token: "",
    layer: matched[0] ?? student.layers[0], scale: "shared", opacity: 0.75, sinks: 1 };
  const state = { ...start, own: {}, image: 1, row: 1, column: 1 };
  let grids = []; // of the sample that is shown
  let greys = []; // its pictures in grey
  let figures = []; // of each model: its canvases and texts
  let shown = []; // of each model: layers, values, share, sinks; its maps and marks per grid
  let saying = 0;

  const sampleNow = () => data.samples[state.sample - 1];
  const choices = () => (state.mode === "matched" ? matched : student.layers);
  const reference = () => shown.find((one) => one.name === data.reference);

  function layersOf(model) {
    if (state.mode === "own") return [state.own[model.name]];
    if (model === student) return [state.layer];
    if (state.mode === "matched" && model.name === data.reference) return data.matches[state.layer];
    // The layer at the same relative place (l + 0.5) / depth, as in cdfast/explorer.py.
    const away = (layer) => Math.abs(
      (2 * layer + 1) * student.depth - (2 * state.layer + 1) * model.depth);
    return [model.layers.reduce((best, layer) => (away(layer) < away(best) ? layer : best))];
  }

  function rowsNow() {
    const whole = state.token === "answer";
    return sampleNow().tokens.filter((token) => token.row !== null &&
      (whole ? token.answer : String(token.number) === state.token)).map((token) => token.row);
  }

  // The mean row of the chosen tokens over layers, and the exact share of it on the image.
  function read(model, layers) {
    const { visual, models } = sampleNow();
    const rows = rowsNow();
    const values = new Array(visual).fill(0);
    let share = 0;
    for (const layer of layers) {
      const stored = models[model.name].layers[layer];
      const codes = bytes(stored.values);
      const [scales, shares] = [floats(stored.scales), floats(stored.shares)];
      for (const row of rows) {
        const weight = 1 / (layers.length * rows.length);
        share += weight * shares[row];
        for (let i = 0; i < visual; i++) {
          values[i] += weight * scales[row] * (codes[row * visual + i] / 255) ** 2;
        }
      }
    }
    const sinks = new Set(models[model.name].sinks[layers.join(",")]);
    const maps = grids.map((grid) => grid.parts.map(
      (parts) => sum(parts.map(([token, weight]) => values[token] * weight))));
    const marks = grids.map((grid) => grid.parts.map(
      (parts) => parts.some(([token]) => sinks.has(token))));
    const free = maps.flatMap((map, i) => map.filter((_, cell) => !marks[i][cell]));
    const limit = Math.max(0, ...(free.length ? free : maps.flat()));
    return { name: model.name, layers, values, share, sinks, maps, marks, limit };
  }

  function place(i, cell) {
    if (sampleNow().geometry) return `visual token ${cell + 1}`;
    const where = `row ${Math.floor(cell / grids[i].width) + 1}, ` +
      `column ${(cell % grids[i].width) + 1}`;
    return grids.length > 1 ? `image ${i + 1}, ${where}` : where;
  }

  const all = (one) => one.maps.flatMap((map, i) => map.map((value, cell) => (
    { i, cell, value })));
  const highest = (one, count) => all(one).sort((a, b) => b.value - a.value).slice(0, count);
  const value = (one, i, cell) => percent(one.maps[i][cell]) + (one.marks[i][cell] ? " (sink)" : "");
  const similar = (one) => cosine(one.values, reference().values).toFixed(2);

  // -- the page -----------------------------------------------------------------------------

  // Another sample: its pictures, tokens and empty figures.
  async function open() {
    const sample = sampleNow();
    const pictures = sample.images.map((image, i) => element("img", { src: image.uri,
      alt: `picture ${i + 1} of ${sample.images.length}`,
      className: Math.max(image.width, image.height) < LONGER / 2 ? "pixels" : "" }));
    await Promise.all(pictures.map((picture) => picture.decode()));
    if (sample !== sampleNow()) return; // another one was chosen meanwhile
    grids = gridsOf(sample);
    greys = grids.map((grid, i) => greyPicture(grid.image, sample.geometry ? null : pictures[i]));
    part("asked").replaceChildren(element("strong", { textContent: sample.question }),
      ` Right answer: ${sample.answer} (${sample.kind})`);
    part("geometry").hidden = !sample.geometry;
    part("geometry").textContent = sample.geometry &&
      `Shown as a strip of all visual tokens in the order of the prompt. ${sample.geometry}`;
    tokens(sample);
    figures = data.models.map((model) => figure(model, sample));
    part("figures").replaceChildren(element("figure", {}, ...pictures,
      element("figcaption", {}, element("strong", { textContent: "The picture" }))),
    ...figures.map((one) => one.whole));
    part("image-label").hidden = grids.length < 2;
    control("image").max = grids.length;
    update();
  }

  function tokens(sample) {
    const answer = sample.tokens.filter((token) => token.answer);
    const offered = [...sample.tokens];
    if (answer.length > 1) offered.push({ text: "the whole answer", number: "answer" });
    const usable = offered.filter((token) => token.row !== null);
    if (!usable.some((token) => String(token.number) === state.token)) {
      const first = usable.find((token) => token.number === "answer" || token.answer);
      state.token = String((answer.length > 1 ? usable.at(-1) : first ?? usable.at(-1)).number);
    }
    part("tokens").replaceChildren(...offered.map((token) => {
      const input = element("input", { type: "radio", name: `${root.id}-token`,
        value: String(token.number), disabled: token.row === null,
        checked: String(token.number) === state.token });
      input.addEventListener("change", () => { state.token = input.value; update(true); });
      const text = token.text.trim() || { "\n": "⏎ new line" }[token.text] || "␠ space";
      return element("label", { className: token.answer || !token.text ? "answer" : "" }, input,
        element("span", { textContent: text }));
    }));
  }

  function figure(model, sample) {
    const canvases = grids.map((grid, i) => {
      const canvas = element("canvas", { width: greys[i].width, height: greys[i].height });
      canvas.setAttribute("role", "img");
      canvas.addEventListener("pointermove", (event) => point(event, canvas, i));
      return canvas;
    });
    const bar = element("canvas", { width: 256, height: 8, className: "bar" });
    bar.setAttribute("aria-hidden", "true");
    const [end, lines] = [element("span"), element("div")];
    const { probability, right } = sample.models[model.name];
    const whole = element("figure", {}, ...canvases, bar,
      element("div", { className: "ends" }, element("span", { textContent: "0" }), end),
      element("figcaption", {}, element("strong", { textContent: model.name }), lines,
        element("div", { textContent:
          `answer: probability ${probability.toFixed(3)}, ${right ? "right" : "wrong"}` })));
    return { whole, canvases, bar, end, lines };
  }

  // Other layers, tokens or colours.
  function update(keep = false) {
    shown = data.models.map((model) => read(model, layersOf(model)));
    for (const [name, input] of ["sample", "mode", "scale", "opacity"].map(
      (name) => [name, control(name)])) input.value = state[name];
    control("sinks").checked = Boolean(state.sinks);
    control("layer").max = choices().length - 1;
    control("layer").value = choices().indexOf(state.layer);
    control("layer").closest("label").hidden = state.mode === "own";
    part("own").hidden = state.mode !== "own";
    const text = `${state.layer}` + (state.mode === "matched"
      ? `, matched with ${data.reference} ${data.matches[state.layer].join(", ")}` : "");
    part("layer").value = text;
    control("layer").setAttribute("aria-valuetext", text);
    paint();
    table();
    clearTimeout(saying);
    saying = setTimeout(() => { part("summary").textContent = summary(); }, SAY_AFTER);
    if (keep) store();
  }

  function paint() {
    const shared = Math.max(...shown.map((one) => one.limit));
    shown.forEach((one, m) => {
      const limit = state.scale === "shared" ? shared : one.limit;
      const { canvases, bar, end, lines } = figures[m];
      canvases.forEach((canvas, i) => {
        const cell = i + 1 === state.image
          ? (state.row - 1) * grids[i].width + state.column - 1 : -1;
        draw(canvas, greys[i], grids[i], one.maps[i], one.marks[i], limit, { ...state, cell });
        canvas.setAttribute("aria-label", described(one, i));
      });
      drawBar(bar, state.opacity);
      end.textContent = percent(limit);
      const said = [`${named(one.layers)}; ${percent(one.share)} on the image`];
      if (one !== reference()) said.push(`cosine with ${data.reference}: ${similar(one)}`);
      said.push(`sinks: ${one.sinks.size} of ${one.values.length} visual tokens`);
      lines.replaceChildren(...said.map((line) => element("div", { textContent: line })));
    });
    patch();
  }

  function described(one, i) {
    const top = one.maps[i].indexOf(Math.max(...one.maps[i]));
    const here = grids.length > 1 ? `, ${percent(sum(one.maps[i]))} on image ${i + 1}` : "";
    return `${one.name}, ${named(one.layers)}: ${percent(one.share)} on the image${here}, ` +
      `most in ${place(i, top)}: ${value(one, i, top)}`;
  }

  function summary() {
    const token = root.querySelector(":checked + span").textContent;
    return `Sample ${state.sample} of ${data.samples.length}, token ${token}. ` + shown.map(
      (one) => `${one.name}, ${named(one.layers)}: ${percent(one.share)} on the image` +
        (one === reference() ? "" : `, cosine ${similar(one)}`)).join("; ") + ".";
  }

  function patch() {
    const i = state.image - 1;
    control("row").max = grids[i].height;
    control("column").max = grids[i].width;
    for (const name of ["image", "row", "column"]) control(name).value = state[name];
    const cell = (state.row - 1) * grids[i].width + state.column - 1;
    part("patch").value = shown.map((one) => `${one.name} ${value(one, i, cell)}`).join(", ");
  }

  function table() {
    const places = new Map(shown.flatMap((one) => highest(one, TOP)).map(
      ({ i, cell }) => [`${i} ${cell}`, [i, cell]]));
    const top = [...places.values()].sort(
      ([i, a], [j, b]) => reference().maps[j][b] - reference().maps[i][a]);
    const heads = ["patch", ...shown.map((one) => one.name)];
    part("table").replaceChildren(
      element("caption", { textContent: `The ${TOP} highest patches of each model` }),
      element("thead", {}, element("tr", {}, ...heads.map(
        (head) => element("th", { scope: "col", textContent: head })))),
      element("tbody", {}, ...top.map(([i, cell]) => element("tr", {},
        element("th", { scope: "row", textContent: place(i, cell) }),
        ...shown.map((one) => element("td", { textContent: value(one, i, cell) }))))));
  }

  function point(event, canvas, i) {
    const { box, image, width, height } = grids[i];
    const frame = canvas.getBoundingClientRect();
    const x = (event.clientX - frame.left) / frame.width * image.width;
    const y = (event.clientY - frame.top) / frame.height * image.height;
    const column = Math.floor((x - box[0]) / (box[2] - box[0]) * width) + 1;
    const row = Math.floor((y - box[1]) / (box[3] - box[1]) * height) + 1;
    if (row < 1 || column < 1 || row > height || column > width) return;
    if (state.image === i + 1 && state.row === row && state.column === column) return;
    Object.assign(state, { image: i + 1, row, column });
    paint();
  }

  // -- state --------------------------------------------------------------------------------

  function store() {
    const kept = { sample: state.sample, layer: state.layer, token: state.token };
    if (root.id !== "explorer") kept.in = root.id;
    if (state.mode === "own") kept.layers = data.models.map((m) => state.own[m.name]).join(",");
    for (const name of ["mode", "scale", "opacity", "sinks"]) {
      if (state[name] !== start[name]) kept[name] = state[name];
    }
    history.replaceState(null, "", `#${new URLSearchParams(kept)}`);
  }

  // What the address says, where it is about this explorer; anything impossible is passed over.
  function restore() {
    const said = new URLSearchParams(location.hash.slice(1));
    if (!said.has("sample") || (said.get("in") ?? "explorer") !== root.id) return false;
    const among = (name, allowed) => {
      const found = allowed.find((one) => String(one) === said.get(name));
      if (found !== undefined) state[name] = found;
    };
    among("sample", data.samples.map((_, i) => i + 1));
    among("mode", [...control("mode").options].map((one) => one.value));
    among("scale", ["shared", "own"]);
    among("sinks", [0, 1]);
    if (said.has("opacity")) state.opacity = Math.min(1, Math.max(0, Number(said.get("opacity"))));
    among("layer", choices());
    state.token = said.get("token") ?? "";
    (said.get("layers") ?? "").split(",").forEach((layer, m) => {
      if (data.models[m]?.layers.includes(Number(layer))) state.own[data.models[m].name] = +layer;
    });
    return true;
  }

  function on(name, change) {
    control(name).addEventListener("input", () => change(control(name)));
  }

  function go(sample) {
    state.sample = Math.min(data.samples.length, Math.max(1, sample));
    Object.assign(state, { image: 1, row: 1, column: 1 });
    return open().then(store);
  }

  // -- start --------------------------------------------------------------------------------

  document.head.append(element("style", { textContent: EXPLORER_STYLE }));
  root.hidden = false;
  control("sample").append(...data.samples.map((sample, i) => element("option", {
    value: i + 1, textContent: `${i + 1} of ${data.samples.length}: ${sample.kind}` })));
  if (!matched.length) control("mode").options[0].disabled = true;
  const own = data.models.map((model) => {
    state.own[model.name] = layersOf(model)[0];
    const select = element("select", {}, ...model.layers.map(
      (layer) => element("option", { value: layer, textContent: layer })));
    select.addEventListener("input", () => {
      state.own[model.name] = Number(select.value);
      update(true);
    });
    return [model.name, select];
  });
  part("own").append(...own.map(([name, select]) => element("label", {}, `${name} `, select)));
  on("sample", (input) => go(Number(input.value)));
  root.querySelectorAll("[data-step]").forEach((button) => button.addEventListener(
    "click", () => go(state.sample + Number(button.dataset.step))));
  on("mode", (input) => {
    state.mode = input.value;
    if (!choices().includes(state.layer)) state.layer = choices()[0];
    update(true);
  });
  on("layer", (input) => { state.layer = choices()[Number(input.value)]; update(true); });
  on("scale", (input) => { state.scale = input.value; update(true); });
  on("opacity", (input) => { state.opacity = Number(input.value); update(true); });
  on("sinks", (input) => { state.sinks = Number(input.checked); update(true); });
  for (const name of ["image", "row", "column"]) {
    on(name, (input) => {
      if (!input.checkValidity() || !input.value) return;
      state[name] = Number(input.value);
      paint();
    });
  }
  addEventListener("hashchange", () => { if (restore()) open(); });
  if (restore()) root.scrollIntoView();
  open();
}

for (const root of document.querySelectorAll(".explorer")) {
  const fail = (error) => {
    const shown = root.querySelector('[data-part="error"]');
    root.hidden = shown.hidden = false;
    shown.textContent = `The attention explorer stopped: ${error?.message ?? error}`;
  };
  addEventListener("error", (event) => fail(event.error ?? event.message));
  addEventListener("unhandledrejection", (event) => fail(event.reason));
  explorer(root);
}
