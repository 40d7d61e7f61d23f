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

/** Frames around (query, key) cells, as one line with gaps. */
function frames(cells) {
  const x = [], y = [];
  for (const [query, key] of cells) {
    x.push(key - .5, key + .5, key + .5, key - .5, key - .5, null);
    y.push(query - .5, query - .5, query + .5, query + .5, query - .5, null);
  }
  return { type: "scatter", mode: "lines", x, y, line: { color: page.mark, width: 2 }, hoverinfo: "skip", showlegend: false };
}

function describe(text, kind, query, key, value) {
  const at = (place) => `<b>${text.labels[place]}</b> (${text.places[place]})`;
  const induction = text.cells.some(([q, k]) => q === query && k === key);
  return `query ${at(query)}<br>key ${at(key)}<br>${page.kinds[kind].unit} ${value === null ? "" : value.toFixed(3)}` +
    (induction ? "<br>induction cell: the token after an earlier copy" : "");
}

/** The traces of a map: BOS on a scale of its own, the other keys, the induction cells. */
function traces(text, kind, values) {
  const { colours, bos, signed, unit } = page.kinds[kind];
  const queries = values.map((_, query) => query).slice(1);
  const columns = (keys) => ({
    type: "heatmap", x: keys, y: queries, xgap: 1, ygap: 1, hoverongaps: false, hoverinfo: "text",
    z: queries.map((query) => keys.map((key) => values[query][key])),
    hovertext: queries.map((query) => keys.map((key) => describe(text, kind, query, key, values[query][key]))),
  });
  const inside = queries.flatMap((query) => values[query].slice(1)).filter((value) => value !== null);
  const limit = inside.reduce((most, value) => Math.max(most, Math.abs(value)), 1e-6);
  const low = signed ? -limit : 0;
  const bar = { title: { text: unit, side: "right" }, thickness: 10, len: .9 };
  return [
    { ...columns([0]), colorscale: bos, zmin: signed ? low : 0, zmax: signed ? limit : 1, showscale: false },
    { ...columns(queries), colorscale: colours, zmin: low, zmax: limit, colorbar: bar },
    frames(text.cells),
  ];
}

function drawMap(text, number, kind, head) {
  const places = text.labels.length;
  const side = Math.max(13, Math.min(30, Math.floor(420 / places)));
  const room = 7 * Math.max(...text.short.map((one) => one.length));
  const ticks = { tickmode: "array", tickvals: [...text.labels.keys()], ticktext: text.short, zeroline: false,
    showgrid: false, tickfont: { size: side > 15 ? 11 : 9 } };
  const layout = {
    title: { text: `${page.kinds[kind].title} of head ${page.heads[head].name}`, font: { size: 13 } },
    width: side * places + room + 135, height: side * (places - 1) + room + 90,
    margin: { l: room + 45, r: 90, t: 40, b: room + 50 },
    xaxis: { ...ticks, range: [-.5, places - .5], tickangle: -90, title: { text: "key (attended to)" } },
    yaxis: { ...ticks, range: [places - .5, .5], title: { text: "query (attends)" } },
    shapes: [{ type: "line", x0: .5, x1: .5, y0: .5, y1: places - .5, line: { color: "black", width: 1 } }],
  };
  const values = unpack(text.maps[kind], places, head);
  Plotly.react(`text-${number}-${kind}`, traces(text, kind, values), layout, config);
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
