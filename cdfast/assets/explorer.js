// The attention explorer: its state, its controls (cdfast/explorer_page.py) and what is shown.
const TOP = 8; // patches of each model in the table
const SPOKEN = { "\n": "new line", "\n\n": "empty line", " ": "space", "": "part of a character" };
const SAY_AFTER = 400; // milliseconds without a change before screen readers are told

function explorer(root) {
  const data = JSON.parse(document.getElementById(root.dataset.from).textContent);
  const part = (name) => root.querySelector(`[data-part="${name}"]`);
  const control = (name) => root.querySelector(`[data-control="${name}"]`);
  const modelOf = (name) => data.models.find((model) => model.name === name);
  const [student, teacher] = [modelOf(data.student), modelOf(data.reference)];
  const matched = student.layers.filter(
    (layer) => data.matches[layer]?.every((other) => teacher.layers.includes(other)));
  const start = { sample: 1, mode: matched.length ? "matched" : "depth", token: "",
    layer: matched[0] ?? student.layers[0], scale: "shared", opacity: 0.75, sinks: 1 };
  const state = { ...start, own: {}, image: 1, row: 0, column: 0 }; // row 0: no patch
  let grids = []; // of the sample's images
  let greys = []; // its pictures in grey
  let figures = []; // of each model: its canvases, its colour bar and its lines of text
  let shown = []; // of each model: its layers, values, maps on the grids, sinks
  let saying = 0; // the timer of what screen readers are told
  let opening = 1; // the sample that is wanted: pictures take a moment to be decoded

  const sampleNow = () => data.samples[state.sample - 1];
  const choices = () => (state.mode === "matched" ? matched : student.layers);
  const reference = () => shown.find((one) => one.name === data.reference);
  const similar = (one) => cosine(one.values, reference().values).toFixed(2);

  function layersOf(model) {
    if (state.mode === "own") return [state.own[model.name]];
    if (model === student) return [state.layer];
    if (state.mode === "matched" && model === teacher) return data.matches[state.layer];
    // The layer at the same relative place (l + 0.5) / depth, as `nearest` in cdfast/explorer.py.
    const away = (layer) => Math.abs(
      (2 * layer + 1) * student.depth - (2 * state.layer + 1) * model.depth);
    return [model.layers.reduce((best, layer) => (away(layer) < away(best) ? layer : best))];
  }

  // A model's map: the mean over layers, and over the tokens of the answer if all are asked for.
  function read(model) {
    const { visual, tokens, models } = sampleNow();
    const layers = layersOf(model);
    const rows = tokens.filter((token) => token.row !== null && (state.token === "answer"
      ? token.answer : String(token.number) === state.token)).map((token) => token.row);
    const weight = 1 / (layers.length * rows.length);
    const values = new Array(visual).fill(0);
    let share = 0;
    for (const stored of layers.map((layer) => models[model.name].layers[layer])) {
      const [scales, shares] = [floats(stored.scales), floats(stored.shares)];
      for (const row of rows) {
        share += weight * shares[row];
        bytes(stored.values[row]).forEach((code, i) => {
          values[i] += weight * scales[row] * (code / 255) ** 2;
        });
      }
    }
    const sinks = new Set(models[model.name].sinks[layers.join(",")]);
    const maps = grids.map((grid) => grid.parts.map(
      (parts) => sum(parts.map(([token, weight]) => values[token] * weight))));
    const marks = grids.map((grid) => grid.parts.map(
      (parts) => parts.some(([token]) => sinks.has(token))));
    const free = maps.flatMap((map, i) => map.filter((_, cell) => !marks[i][cell]));
    const limit = Math.max(0, ...(free.length ? free : maps.flat()));
    const title = (layers.length > 1 ? "layers " : "layer ") + listed(layers);
    return { name: model.name, title, values, share, sinks, maps, marks, limit };
  }

  function place(i, cell) {
    const { width } = grids[i];
    if (sampleNow().geometry) return `visual token ${cell + 1}`;
    const where = `row ${Math.floor(cell / width) + 1}, column ${(cell % width) + 1}`;
    return grids.length > 1 ? `image ${i + 1}, ${where}` : where;
  }

  const valueAt = (one, i, cell) => percent(one.maps[i][cell]) +
    (one.marks[i][cell] ? " (sink)" : "");

  // -- what is shown ---

  // Another sample: its pictures, its tokens, and figures without content.
  async function open(number, token = state.token) {
    opening = number;
    const sample = data.samples[number - 1];
    const pictures = sample.images.map(({ uri, width, height }, i) => element("img", { src: uri,
      alt: sample.images.length > 1 ? `Picture ${i + 1} as it is` : "The picture as it is",
      className: Math.max(width, height) < LONGER / 3 ? "pixels" : "" }));
    await Promise.all(pictures.map((picture) => picture.decode()));
    if (opening !== number) return; // another one was chosen meanwhile
    Object.assign(state, { sample: number, token, image: 1, row: 0, column: 0 });
    grids = sample.geometry ? [stripOf(sample.visual)]
      : sample.images.map((image) => gridOf(image.planes, image));
    greys = grids.map((grid, i) => greyOf(grid, sample.geometry ? null : pictures[i]));
    part("asked").replaceChildren(element("strong", { textContent: sample.question }),
      ` Right answer: ${sample.answer} (${sample.kind})`);
    part("geometry").hidden = !sample.geometry;
    part("geometry").textContent = "Shown is a strip of all visual tokens, line by line, in the " +
      `order of the prompt. ${sample.geometry}`;
    part("image").hidden = grids.length < 2;
    control("image").max = grids.length;
    showTokens(sample);
    figures = data.models.map((model) => figureOf(model, sample));
    part("figures").replaceChildren(element("figure", {}, ...pictures,
      element("figcaption", {}, element("strong", { textContent: "picture" }))),
    ...figures.map((one) => one.whole));
    update();
  }

  function showTokens({ tokens }) {
    const offered = tokens.map(({ text, answer, ...token }) => ({ ...token, answer,
      text: visible(text), said: (SPOKEN[text] ?? text.trim()) + (answer ? ", of the answer" : "") }));
    const answers = offered.filter((token) => token.answer && token.row !== null);
    const whole = "the whole answer";
    if (answers.length > 1) offered.push({ text: whole, said: whole, number: "answer", answer: true });
    const usable = offered.filter((token) => token.row !== null);
    if (!usable.some((token) => String(token.number) === state.token)) {
      state.token = String(usable.at(-1).number);
    }
    part("tokens").replaceChildren(...offered.map(({ text, said, number, answer, row }) => {
      const input = element("input", { type: "radio", name: `${root.id}-token`, value: number,
        ariaLabel: said, disabled: row === null, checked: String(number) === state.token });
      input.addEventListener("change", () => set({ token: input.value }));
      return element("label", { className: answer ? "answer" : "" }, input,
        element("span", { textContent: text }));
    }));
    const chosen = part("tokens").querySelector(":checked").parentElement;
    part("tokens").scrollTop = chosen.offsetTop - part("tokens").offsetTop;
  }

  function figureOf(model, sample) {
    const canvases = greys.map(({ width, height }, i) => {
      const canvas = element("canvas", { width, height });
      canvas.setAttribute("role", "img");
      canvas.addEventListener("pointermove", (event) => point(event, i));
      return canvas;
    });
    const [bar, end, lines] = [element("div", { className: "bar" }), element("span"),
      element("div")];
    const { probability, right } = sample.models[model.name];
    const whole = element("figure", {}, ...canvases, bar, element("div", { className: "ends" },
      element("span", { textContent: "0" }), end),
    element("figcaption", {}, element("strong", { textContent: model.name }), lines,
      `answers ${right ? "right" : "wrong"}; P(right answer) ${probability.toFixed(3)}`));
    return { whole, canvases, bar, end, lines };
  }

  // Other layers, another token, other colours.
  function update() {
    shown = data.models.map(read);
    for (const name of ["sample", "mode", "scale", "opacity"]) control(name).value = state[name];
    control("sinks").checked = Boolean(state.sinks);
    control("layer").max = choices().length - 1;
    control("layer").value = choices().indexOf(state.layer);
    const text = state.layer + (state.mode === "matched"
      ? `, matched with ${data.reference} ${listed(data.matches[state.layer])}` : "");
    part("layer").textContent = text;
    control("layer").setAttribute("aria-valuetext", text);
    part("slider").hidden = state.mode === "own";
    part("own").hidden = state.mode !== "own";
    data.models.forEach(({ name }, m) => { part("own").children[m].control.value = state.own[name]; });
    paint();
    showTable();
    say();
  }

  // To screen readers, once nothing has changed for a while.
  function say() {
    clearTimeout(saying);
    saying = setTimeout(() => {
      const chosen = state.row ? ` Patch: ${part("patch").textContent}.` : "";
      part("summary").textContent = summary() + chosen;
    }, SAY_AFTER);
  }

  function paint() {
    const shared = Math.max(...shown.map((one) => one.limit));
    const { height, width } = grids[state.image - 1];
    state.row = Math.min(state.row, height);
    state.column = Math.min(state.column, width);
    const patch = state.row ? (state.row - 1) * width + state.column - 1 : -1;
    shown.forEach((one, m) => {
      const { canvases, bar, end, lines } = figures[m];
      const limit = state.scale === "shared" ? shared : one.limit;
      canvases.forEach((canvas, i) => {
        const crossed = state.sinks ? one.marks[i] : [];
        draw(canvas, greys[i], grids[i], one.maps[i], limit, state.opacity, crossed,
          state.image === i + 1 ? patch : -1);
        canvas.setAttribute("aria-label", described(one, i));
      });
      const steps = COLOURS.map((_, i) => colour(i / (COLOURS.length - 1), state.opacity));
      bar.style.backgroundImage = `linear-gradient(to right, ${steps.join(",")})`;
      end.textContent = percent(limit);
      const said = [`${one.title}; ${percent(one.share)} on the image`];
      if (one !== reference()) said.push(`cosine with ${data.reference}: ${similar(one)}`);
      said.push(`sinks: ${one.sinks.size} of ${one.values.length} visual tokens`);
      lines.replaceChildren(...said.map((line) => element("div", { textContent: line })));
    });
    Object.assign(control("row"), { max: height, value: state.row || "" });
    Object.assign(control("column"), { max: width, value: state.column || "" });
    control("image").value = state.image;
    part("patch").textContent = state.row ? shown.map(
      (one) => `${one.name} ${valueAt(one, state.image - 1, patch)}`).join(", ") : "";
  }

  function described(one, i) {
    const top = one.maps[i].indexOf(Math.max(...one.maps[i]));
    const here = grids.length > 1 ? `, ${percent(sum(one.maps[i]))} on image ${i + 1}` : "";
    return `${one.name}, ${one.title}: ${percent(one.share)} on the image${here}, ` +
      `most in ${place(i, top)}: ${valueAt(one, i, top)}`;
  }

  function summary() {
    const token = root.querySelector(".explorer-tokens :checked").ariaLabel;
    return `Sample ${state.sample} of ${data.samples.length}, ${token}. ` + shown.map(
      (one) => `${one.name}, ${one.title}: ${percent(one.share)} on the image` +
        (one === reference() ? "" : `, cosine ${similar(one)}`)).join("; ") + ".";
  }

  function showTable() {
    const places = new Map(shown.flatMap((one) => one.maps.flatMap(
      (map, i) => map.map((value, cell) => ({ value, i, cell })))
      .sort((a, b) => b.value - a.value).slice(0, TOP)).map((at) => [`${at.i} ${at.cell}`, at]));
    const { maps } = reference();
    const rows = [...places.values()].sort((a, b) => maps[b.i][b.cell] - maps[a.i][a.cell]);
    const head = (scope, textContent) => element("th", { scope, textContent });
    part("table").replaceChildren(
      element("caption", { textContent: `The ${TOP} highest patches of each model` }),
      element("thead", {}, element("tr", {}, head("col", "patch"),
        ...shown.map((one) => head("col", one.name)))),
      element("tbody", {}, ...rows.map(({ i, cell }) => element("tr", {},
        head("row", place(i, cell)),
        ...shown.map((one) => element("td", { textContent: valueAt(one, i, cell) }))))));
  }

  // -- what is chosen ---

  function set(changes) {
    Object.assign(state, changes);
    if (!choices().includes(state.layer)) state.layer = choices()[0];
    update();
    store();
  }

  async function go(sample) {
    // From answer to answer: "" is the whole one, or its only token.
    const token = part("tokens").querySelector(".answer :checked") ? "" : state.token;
    await open((sample + data.samples.length - 1) % data.samples.length + 1, token);
    store();
  }

  function point(event, i) {
    const { box: [left, top, right, bottom], frame, width, height } = grids[i];
    const canvas = event.target.getBoundingClientRect();
    const x = (event.clientX - canvas.left) / canvas.width * frame.width;
    const y = (event.clientY - canvas.top) / canvas.height * frame.height;
    const column = Math.floor((x - left) / (right - left) * width) + 1;
    const row = Math.floor((y - top) / (bottom - top) * height) + 1;
    if (row < 1 || column < 1 || row > height || column > width) return;
    if (state.image === i + 1 && state.row === row && state.column === column) return;
    Object.assign(state, { image: i + 1, row, column });
    paint();
  }

  // The address says what is shown: what differs from the start, and always these three.
  function store() {
    const said = { sample: state.sample, layer: state.layer, token: state.token };
    for (const name of ["mode", "scale", "opacity", "sinks"]) {
      if (state[name] !== start[name]) said[name] = state[name];
    }
    if (state.mode === "own") said.layers = data.models.map(({ name }) => state.own[name]).join();
    if (root.id !== "explorer") said.in = root.id;
    history.replaceState(null, "", `#${new URLSearchParams(said)}`);
  }

  // The sample that the address asks for, 0 if it is not about this explorer; and the rest of the
  // state. What is asked for and is not there is passed over.
  function restore() {
    const said = new URLSearchParams(location.hash.slice(1));
    if (!said.has("sample") || (said.get("in") ?? "explorer") !== root.id) return 0;
    const among = (name, allowed) => {
      state[name] = allowed.find((one) => String(one) === said.get(name)) ?? start[name];
    };
    among("mode", [...control("mode").options].filter((o) => !o.disabled).map((o) => o.value));
    among("layer", choices());
    among("scale", ["shared", "own"]);
    among("sinks", [0, 1]);
    among("opacity", Array.from({ length: 21 }, (_, i) => i / 20));
    state.token = said.get("token") ?? "";
    const layers = (said.get("layers") ?? "").split(",");
    data.models.forEach((model, m) => {
      const layer = Number(layers[m] || NaN);
      if (model.layers.includes(layer)) state.own[model.name] = layer;
    });
    const number = Number(said.get("sample"));
    return data.samples[number - 1] ? number : 1;
  }

  // -- the start ---

  const listen = (name, change) => control(name).addEventListener(
    "input", ({ target }) => { if (target.value && target.checkValidity()) change(target); });
  control("sample").append(...data.samples.map((sample, i) => element("option", { value: i + 1,
    textContent: `${i + 1} of ${data.samples.length}: ${sample.kind}` })));
  control("mode").options[0].disabled = !matched.length;
  part("own").append(...data.models.map((model) => {
    [state.own[model.name]] = layersOf(model);
    const select = element("select", {}, ...model.layers.map(
      (layer) => element("option", { value: layer, textContent: layer })));
    select.addEventListener("input", () => set(
      { own: { ...state.own, [model.name]: Number(select.value) } }));
    return element("label", {}, `layer of ${model.name} `, select);
  }));
  root.querySelectorAll("[data-step]").forEach((button) => button.addEventListener(
    "click", () => go(opening + Number(button.dataset.step))));
  listen("sample", (input) => go(Number(input.value)));
  listen("mode", (input) => set({ mode: input.value }));
  listen("layer", (input) => set({ layer: choices()[Number(input.value)] }));
  listen("scale", (input) => set({ scale: input.value }));
  listen("opacity", (input) => set({ opacity: Number(input.value) }));
  listen("sinks", (input) => set({ sinks: Number(input.checked) }));
  for (const name of ["image", "row", "column"]) {
    listen(name, (input) => {
      const [row, column] = [state.row || 1, state.column || 1];
      Object.assign(state, { row, column, [name]: Number(input.value) });
      paint();
      say();
    });
  }
  addEventListener("hashchange", () => {
    const number = restore();
    if (number) open(number);
  });
  root.hidden = false;
  const asked = restore();
  if (asked) root.scrollIntoView();
  open(asked || 1);
}

document.head.append(element("style", { textContent: EXPLORER_STYLE }));
for (const root of document.querySelectorAll(".explorer")) {
  const fail = (error) => {
    const said = root.querySelector('[data-part="error"]');
    root.hidden = said.hidden = false;
    said.textContent = `The attention explorer stopped: ${error?.message ?? error}`;
  };
  addEventListener("error", (event) => fail(event.error ?? event.message));
  addEventListener("unhandledrejection", (event) => fail(event.reason));
  explorer(root);
}
