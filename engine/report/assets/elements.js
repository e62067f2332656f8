"use strict";
// Elements, numbers and colours. Texts of a run reach the page as text nodes only, never as HTML.

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, said] of Object.entries(value)) made.style.setProperty(key, said);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return made;
}

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

function formatted(value) {
  if (!isNumber(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2).replace("e+", "e");
  return Number(value.toPrecision(4)).toLocaleString("en", { maximumFractionDigits: 6 });
}

function counted(number) {
  for (const [unit, size] of [["B", 1e9], ["M", 1e6], ["K", 1e3]]) {
    if (number >= size) return `${Number((number / size).toPrecision(3))} ${unit}`;
  }
  return formatted(number);
}

// A metric's name, which may break after its slash.
const named = (name) => name.split(/(?<=[/_])/).flatMap((part, i) => (i ? [element("wbr"), part] : [part]));

function duration(seconds) {
  if (seconds < 60) return `${formatted(Number(seconds.toPrecision(3)))} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

function bytes(count) {
  for (const [unit, size] of [["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]]) {
    if (count >= size) return `${formatted(Number((count / size).toPrecision(3)))} ${unit}`;
  }
  return `${formatted(count)} B`;
}

// Colours of Okabe and Ito (report.css has their light and dark shades); lines of runs differ by their dashes too.
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const DASHES = [[], [8, 4], [2, 3], [10, 3, 2, 3], [5, 2], [1, 2]];
const lineStyle = (index) => ({ colour: `line-${index % 6}`, dash: DASHES[(index + Math.floor(index / 6)) % DASHES.length] });

function swatch({ colour: name, dash }) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  for (const [key, value] of Object.entries({ width: 26, height: 10, "aria-hidden": "true", class: "swatch" })) svg.setAttribute(key, value);
  const line = document.createElementNS(svg.namespaceURI, "line");
  for (const [key, value] of Object.entries({ x1: 0, x2: 26, y1: 5, y2: 5, "stroke-width": 2.5, "stroke-dasharray": dash.join(" ") })) line.setAttribute(key, value);
  line.style.stroke = `var(--${name})`;
  svg.append(line);
  return svg;
}

function table(caption, heads, rows) {
  return element("div", { class: "scrolled", tabindex: "0", role: "region", "aria-label": caption },
    element("table", {}, element("caption", {}, caption),
      element("thead", {}, element("tr", {}, heads.map((head) => element("th", { scope: "col" }, head)))),
      element("tbody", {}, rows.map((row) => element("tr", {},
        row.map((cell, i) => (i ? element("td", {}, cell) : element("th", { scope: "row" }, cell))))))));
}

// A bar in parts: [{label, size, colour}], all bars of a chart on one scale.
function bar(label, parts, whole, said) {
  const total = parts.reduce((sum, part) => sum + part.size, 0);
  return element("div", { class: "bar" },
    element("span", { class: "bar-label" }, label),
    element("span", { class: "bar-track", role: "img", "aria-label": `${label}: ${parts.map((p) => `${p.label} ${said(p.size)}`).join(", ")}` },
      parts.map((part) => element("span", {
        class: "bar-part", title: `${part.label}: ${said(part.size)}`,
        style: { width: `${whole ? (100 * part.size) / whole : 0}%`, background: `var(--${part.colour})` },
      }))),
    element("span", { class: "bar-total" }, said(total)));
}

const key = (parts) => element("ul", { class: "key" }, parts.map(([label, name]) =>
  element("li", {}, element("span", { class: "dot", style: { background: `var(--${name})` }, "aria-hidden": "true" }), label)));

// A slider over iterations with buttons to both sides; `show(iteration, rows)` fills what stands below it.
function slider(label, rows, show) {
  const groups = new Map();
  for (const row of rows) groups.set(row.iteration, [...(groups.get(row.iteration) ?? []), row]);
  const iterations = [...groups.keys()].sort((a, b) => a - b);
  const last = iterations.length - 1;
  const said = element("output", { class: "iteration", "aria-live": "polite" });
  const input = element("input", { type: "range", min: 0, max: last, value: last, step: 1, "aria-label": label, oninput: moved });
  const step = (by, name, sign) => element("button", { type: "button", "aria-label": name, onclick: () => { input.value = Number(input.value) + by; moved(); } }, sign);
  function moved() {
    const iteration = iterations[Number(input.value)];
    said.textContent = `iteration ${iteration}`;
    input.setAttribute("aria-valuetext", said.textContent);
    show(iteration, groups.get(iteration));
  }
  moved();
  return element("div", { class: "slider" }, step(-1, "Previous iteration", "◀"), input, step(1, "Next iteration", "▶"), said);
}
