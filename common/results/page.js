"use strict";
// Says what is under the pointer in the figures of report.html, and paints the maps of the head that is chosen, from
// the JSON inside the page. Everything that is written into the page is written as text.

const page = JSON.parse(document.getElementById("page").textContent);
const bubble = document.getElementById("bubble");
const MISSING = -32768;
const FULL = 32767;
const REACH = 8; // pixels from a mark's middle at which it is still meant
let chosen = page.chosen;

/** A new element inside a figure, over the box [left, top, width, height], shares of it. */
function over(figure, tag, className, [left, top, width, height]) {
  const made = figure.appendChild(document.createElement(tag));
  made.className = className;
  const share = (value) => `${100 * value}%`;
  Object.assign(made.style, { left: share(left), top: share(top), width: share(width), height: share(height) });
  return made;
}

/** Watch a box of a figure: `find(x, y, width, height)`, the place as shares of the box and its size in pixels, gives
    what is there, {text, head}, or nothing. */
function watch(figure, place, find, hear = () => {}) {
  const panel = over(figure, "div", "panel", place);
  const under = (event) => {
    const { left, top, width, height } = panel.getBoundingClientRect();
    return find((event.clientX - left) / width, (event.clientY - top) / height, width, height);
  };
  panel.addEventListener("pointermove", (event) => {
    const found = under(event);
    say(found?.text, event);
    hear(found?.head ?? -1);
  });
  panel.addEventListener("pointerleave", () => {
    say();
    hear(-1);
  });
  panel.addEventListener("click", (event) => {
    const found = under(event);
    if (found?.head >= 0) choose(found.head);
  });
  return panel;
}

/** Show a text beside the pointer, inside the window; nothing hides it. */
function say(text, event) {
  bubble.hidden = !text;
  if (!text) return;
  bubble.textContent = text;
  const left = Math.min(event.clientX + 14, window.innerWidth - bubble.offsetWidth - 4);
  const below = event.clientY + 14 + bubble.offsetHeight < window.innerHeight;
  bubble.style.left = `${Math.max(left, 0)}px`;
  bubble.style.top = `${below ? event.clientY + 14 : Math.max(event.clientY - bubble.offsetHeight - 10, 0)}px`;
}

/** The spot of a panel at a place: of those that reach so far, the one whose middle is nearest. */
function nearest(spots, x, y, width, height) {
  let best = Infinity, found;
  for (const [left, top, across, along, text, name] of spots) {
    const dx = Math.abs(x - left) * width, dy = Math.abs(y - top) * height;
    // A mark has no size of its own; a cell or a bar reaches as far as it is drawn.
    const inside = across || along ? dx <= across * width && dy <= along * height : Math.max(dx, dy) <= REACH;
    if (inside && Math.hypot(dx, dy) < best) {
      best = Math.hypot(dx, dy);
      found = { text, head: page.heads.findIndex((one) => one.name === name) };
    }
  }
  return found;
}

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
  if (value === null) return "";
  const at = (place) => `${text.labels[place]} (${text.places[place]})`;
  const induction = text.cells.some(([q, k]) => q === query && k === key);
  return `query ${at(query)}\nkey ${at(key)}\n${page.units[kind]} ${value.toFixed(3)}` +
    (induction ? "\ninduction cell: the token after an earlier copy" : "");
}

/** Put a canvas of a cell per pixel behind the axes of a text's map, and numbers beside its colour bar. */
function prepare(text, number, kind) {
  const map = text.maps[kind], figure = document.getElementById(`text-${number}-${kind}`);
  const places = text.labels.length;
  map.canvas = over(figure, "canvas", "cells", map.box);
  figure.prepend(map.canvas);
  Object.assign(map.canvas, { width: places, height: places - 1 });
  const [left, top, width, height] = map.bar;
  map.ends = [0, .5, 1].map((share) => over(figure, "span", "mark", [left + 1.3 * width, top + share * height, 0, 0]));
  watch(figure, map.box, (x, y) => {
    const key = Math.floor(x * places), query = 1 + Math.floor(y * (places - 1));
    return { text: describe(text, kind, query, key, map.canvas.cells[query]?.[key] ?? null) };
  });
}

/** Paint a text's map of one head. BOS has no row; its column does not set the colours and may have its own. */
function paint(text, kind, head) {
  const map = text.maps[kind], steps = map.colours.length, context = map.canvas.getContext("2d"), places = text.labels.length;
  const cells = map.canvas.cells = unpack(map, places, head);
  const inside = cells.slice(1).flatMap((row) => row.slice(1)).filter((value) => value !== null);
  const limit = inside.reduce((most, value) => Math.max(most, Math.abs(value)), 1e-6);
  context.clearRect(0, 0, places, places);
  cells.slice(1).forEach((row, query) => row.forEach((value, key) => {
    if (value === null) return;
    const share = map.signed ? (value / limit + 1) / 2 : value / (key === 0 ? 1 : limit);
    const step = Math.max(0, Math.min(steps - 1, Math.floor(steps * share)));
    context.fillStyle = (key === 0 ? map.bos : map.colours)[step];
    context.fillRect(key, query, 1, 1);
  }));
  const low = map.signed ? -limit : 0;
  map.ends.forEach((end, place) => { end.textContent = Number((limit - place / 2 * (limit - low)).toPrecision(2)); });
  map.canvas.closest("figure").querySelector("figcaption").textContent =
    `${kind[0].toUpperCase()}${kind.slice(1)} of head ${page.heads[head].name}`;
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
  page.texts.forEach((text) => Object.keys(text.maps).forEach((kind) => paint(text, kind, head)));
  for (const { spots, panel } of page.figures.mosaic ?? []) {
    panel.replaceChildren();
    const [x, y, across, along] = spots.find((spot) => spot[5] === page.heads[head].name);
    over(panel, "div", "ring mark", [x - across, y - along, 2 * across, 2 * along]).style.position = "absolute";
  }
}

for (const [name, panels] of Object.entries(page.figures)) {
  for (const one of panels) {
    const hear = (head) => tell(head >= 0 ? head : chosen);
    const find = (...place) => nearest(one.spots, ...place);
    one.panel = watch(document.getElementById(name), one.box, find, name === "mosaic" ? hear : undefined);
  }
}
page.texts.forEach((text, number) => Object.keys(text.maps).forEach((kind) => prepare(text, number, kind)));
document.getElementById("head").addEventListener("change", (event) => choose(Number(event.target.value)));
choose(chosen);
