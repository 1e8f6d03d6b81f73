// Maps of the attention explorer: what its data mean (cdfast/explorer.py), and drawing them.

// Inferno without its darkest part, as in the overlays of cdfast.maps.
const COLOURS = ("2b0b57 440a68 59106e 6f196e 84206b 9a2865 b0315b c33b4f d54a41 e45a31 f06f20 " +
  "f8870e fc9f07 fbba1f f7d340 f1ed71 fcffa4").split(" ").map(
  (hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16)));
const LONGER = 448; // pixels of the longer side of a canvas, at least
const STRIP = 32; // tokens in a line where their places in the picture are not known

const bytes = (base64) => Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
const floats = (base64) => new Float32Array(bytes(base64).buffer);
const sum = (values) => values.reduce((total, value) => total + value, 0);
const visible = (text) => text.replace(/\n/g, "⏎").replace(/^ +$/, "␣") || "·";

// "2, 4" or, of layers that follow one another, "8–13".
function listed(layers) {
  const last = layers.length - 1;
  return last > 1 && layers.every((layer, i) => layer === layers[0] + i)
    ? `${layers[0]}–${layers[last]}` : layers.join(", ");
}

function percent(value) {
  return `${(100 * value).toFixed(value < 0.00995 ? 3 : value < 0.0995 ? 2 : 1)}%`;
}

function cosine(a, b) {
  const dot = (x, y) => sum(x.map((value, i) => value * y[i]));
  const norm = Math.sqrt(dot(a, a) * dot(b, b));
  return norm > 0 ? dot(a, b) / norm : 1;
}

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// -- drawing -------------------------------------------------------------------------------------

// The more attention, the more colour: where there is none, the picture stays as it is.
function colour(share, opacity) {
  const at = share * (COLOURS.length - 1);
  const low = Math.min(Math.floor(at), COLOURS.length - 2);
  const mixed = COLOURS[low].map((c, i) => Math.round(c + (COLOURS[low + 1][i] - c) * (at - low)));
  return `rgba(${mixed.join(",")},${opacity * share})`;
}

// The finest grid of an image's planes; `parts`: which share of which tokens a cell shows. The frame
// is the picture and what the model was given beside it: padding can have attention too.
function gridOf(planes, image) {
  const [height, width] = planes[0].shape;
  const parts = Array.from({ length: height * width }, (_, cell) => planes.flatMap((plane) => {
    const [down, across] = [height / plane.shape[0], width / plane.shape[1]];
    const row = Math.floor(Math.floor(cell / width) / down);
    const token = plane.tokens[row * plane.shape[1] + Math.floor((cell % width) / across)];
    return token < 0 ? [] : [[token, 1 / (down * across)]];
  }));
  const [left, top, right, bottom] = planes[0].box;
  const [x, y] = [Math.max(0, -left), Math.max(0, -top)]; // of the picture in the frame
  const frame = { x, y, width: Math.max(image.width, right) + x,
    height: Math.max(image.height, bottom) + y };
  return { height, width, parts, frame, image, box: [left + x, top + y, right + x, bottom + y] };
}

// Where places are not known: one grid that has all visual tokens in their order.
function stripOf(number) {
  const width = Math.min(STRIP, number);
  const height = Math.ceil(number / width);
  const tokens = Array.from({ length: height * width }, (_, i) => (i < number ? i : -1));
  return gridOf([{ shape: [height, width], tokens, box: [0, 0, width, height] }], { width, height });
}

// The frame of a grid on a canvas, with its picture in grey if there is one.
function greyOf({ frame, image }, picture) {
  const zoom = Math.ceil(LONGER / Math.max(frame.width, frame.height));
  const scale = Math.min(zoom, 2 * LONGER / Math.max(frame.width, frame.height));
  const [width, height] = [frame.width, frame.height].map(
    (side) => Math.max(1, Math.round(side * scale)));
  const canvas = element("canvas", { width, height });
  const pen = canvas.getContext("2d");
  pen.fillStyle = "#555";
  pen.fillRect(0, 0, width, height);
  if (!picture) return canvas;
  pen.imageSmoothingEnabled = zoom < 3;
  pen.drawImage(picture, ...[frame.x, frame.y, image.width, image.height].map(
    (length) => length * scale));
  const pixels = pen.getImageData(0, 0, width, height);
  for (let i = 0; i < pixels.data.length; i += 4) {
    const [red, green, blue] = pixels.data.subarray(i, i + 3);
    pixels.data.fill(51 + 0.8 * (0.299 * red + 0.587 * green + 0.114 * blue), i, i + 3);
  }
  pen.putImageData(pixels, 0, 0);
  return canvas;
}

// Black below white is seen on any background.
function stroke(pen, path, width) {
  for (const [style, line] of [["#000", 2 * width], ["#fff", width]]) {
    Object.assign(pen, { strokeStyle: style, lineWidth: line });
    pen.stroke(path);
  }
}

function draw(canvas, grey, grid, map, limit, opacity, crossed, chosen) {
  const pen = canvas.getContext("2d");
  const scale = canvas.width / grid.frame.width;
  const [left, top, right, bottom] = grid.box.map((edge) => edge * scale);
  const edgeX = (column) => Math.round(left + (right - left) * column / grid.width);
  const edgeY = (row) => Math.round(top + (bottom - top) * row / grid.height);
  pen.drawImage(grey, 0, 0);
  const unseen = new Path2D();
  unseen.rect(0, 0, canvas.width, canvas.height);
  unseen.rect(left, top, right - left, bottom - top);
  pen.fillStyle = "rgba(0,0,0,.75)"; // parts of the picture that the model was not given
  pen.fill(unseen, "evenodd");
  map.forEach((value, cell) => {
    const [row, column] = [Math.floor(cell / grid.width), cell % grid.width];
    const [x, y] = [edgeX(column), edgeY(row)];
    const [width, height] = [edgeX(column + 1) - x, edgeY(row + 1) - y];
    pen.fillStyle = colour(limit > 0 ? Math.min(1, value / limit) : 0, opacity);
    pen.fillRect(x, y, width, height);
    const marks = new Path2D();
    if (crossed[cell]) {
      const arm = 0.3 * Math.min(width, height);
      const [middle, centre] = [x + width / 2, y + height / 2];
      for (const slope of [arm, -arm]) {
        marks.moveTo(middle - arm, centre - slope);
        marks.lineTo(middle + arm, centre + slope);
      }
    }
    if (cell === chosen) marks.rect(x + 1, y + 1, width - 2, height - 2);
    stroke(pen, marks, 1.5);
  });
}
