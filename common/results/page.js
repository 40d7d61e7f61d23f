"use strict";
// Draws the figures of report.html from the JSON inside the page. Labels in that JSON are escaped for Plotly, which
// reads a few tags in text; everything else that is written into the page is written as text.

const page = JSON.parse(document.getElementById("page").textContent);
const config = { displayModeBar: false, responsive: false };
const MISSING = -32768;
const FULL = 32767;
let chosen = page.chosen;

/** The codes of all maps of one kind of a text, as 16-bit numbers. */
function decode(packed) {
  const bytes = Uint8Array.from(atob(packed.codes), (char) => char.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  return Int16Array.from({ length: bytes.length / 2 }, (_, place) => view.getInt16(2 * place, true));
}

/** One map as rows of numbers, null where a query may not see a key. */
function unpack(packed, places, head) {
  packed.decoded ??= decode(packed);
  let next = head * (places * (places + 1)) / 2;
  return Array.from({ length: places }, (_, query) =>
    Array.from({ length: places }, (_, key) => {
      const code = key <= query ? packed.decoded[next++] : MISSING;
      return code === MISSING ? null : code * packed.scale[head] / FULL;
    }));
}

function describe(text, kind, query, key, value) {
  const at = (place) => `<b>${text.labels[place]}</b> (${text.places[place]})`;
  const induction = text.cells.some(([q, k]) => q === query && k === key);
  return `query ${at(query)}<br>key ${at(key)}<br>${page.units[kind]} ${value === null ? "" : value.toFixed(3)}` +
    (induction ? "<br>induction cell: the token after an earlier copy" : "");
}

/** The figure of a text's map, filled with the values of one head; BOS has no row and does not set the colours. */
function drawMap(text, number, kind, head) {
  const { data, layout } = text.figures[kind];
  const values = unpack(text.maps[kind], text.labels.length, head);
  const queries = values.map((_, query) => query).slice(1);
  const inside = queries.flatMap((query) => values[query].slice(1)).filter((value) => value !== null);
  const limit = inside.reduce((most, value) => Math.max(most, Math.abs(value)), 1e-6);
  const filled = data.map((trace) => ({
    ...trace,
    z: queries.map((query) => trace.x.map((key) => values[query][key])),
    hovertext: queries.map((query) => trace.x.map((key) => describe(text, kind, query, key, values[query][key]))),
    ...(trace.showscale && { zmin: trace.zmin < 0 ? -limit : 0, zmax: limit }),
  }));
  const words = `${kind[0].toUpperCase()}${kind.slice(1)} of head ${page.heads[head].name}`;
  const title = { ...layout.title, text: words };
  Plotly.react(`text-${number}-${kind}`, filled, { ...layout, title }, config);
}

/** Every number of a head, beside the mosaic. */
function tell(head) {
  const table = document.getElementById("numbers");
  if (!table) return;
  table.replaceChildren();
  table.createCaption().textContent = `Head ${page.heads[head].name}`;
  for (const cells of page.heads[head].numbers) {
    const row = table.insertRow();
    for (const cell of cells) row.insertCell().textContent = cell;
  }
}

/** Show a head: its maps on every text, its line, and its place in the mosaic. */
function choose(head) {
  chosen = head;
  tell(head);
  document.getElementById("head").value = head;
  document.getElementById("chosen").textContent = page.heads[head].line;
  page.texts.forEach((text, number) => Object.keys(text.maps).forEach((kind) => drawMap(text, number, kind, head)));
  if (!page.figures.mosaic) return;
  const { layer, head: column } = page.heads[head];
  const ring = { type: "circle", x0: column - .46, x1: column + .46, y0: layer - .46, y1: layer + .46,
    line: { color: "black", width: 2 } };
  Plotly.relayout("mosaic", { shapes: [...page.figures.mosaic.layout.shapes, ring] });
}

/** The place in `page.heads` of the head that a point of a figure stands for; -1 for none. */
function headAt(figure, point) {
  const named = point.data.meta?.names?.[point.pointIndex];
  return page.heads.findIndex((one) => one.name === named ||
    (figure === "mosaic" && one.layer === point.y && one.head === point.x));
}

function start() {
  for (const [name, figure] of Object.entries(page.figures)) {
    Plotly.newPlot(name, figure.data, figure.layout, config);
    const on = (event, act) => document.getElementById(name).on(event, ({ points: [point] }) => {
      const head = headAt(name, point);
      if (head >= 0) act(head);
    });
    on("plotly_click", choose);
    if (name === "mosaic") {
      on("plotly_hover", tell);
      on("plotly_unhover", () => tell(chosen));
    }
  }
  document.getElementById("head").addEventListener("change", (event) => choose(Number(event.target.value)));
  choose(chosen);
}

start();
