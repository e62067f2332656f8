// Curves, by uPlot. A chart is drawn when it comes into view; all share the range of iterations and the cursor.

const HEIGHT = 190;
const charts = { drawn: new Set(), all: new Map(), zoom: null, whole: [0, 1], smoothing: 0 };
const inView = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    inView.unobserve(entry.target);
    draw(charts.all.get(entry.target));
  }
}, { rootMargin: "200px" });
const resized = new ResizeObserver((entries) => {
  for (const entry of entries) {
    const width = Math.floor(entry.contentRect.width);
    const { plot } = charts.all.get(entry.target);
    if (plot && width > 0 && width !== plot.width) plot.setSize({ width, height: HEIGHT });
  }
});

// A figure of `lines`: [{label, colour, dash, x, y}].
// `band`: [{x, low, high, colour}] behind them; `marks`: iterations; `stacked`: lines lie on each other, filled.
function chart(title, explanation, lines, { band = [], marks = [], stacked = false, unit = "" } = {}) {
  const readout = element("p", { class: "readout" });
  const place = element("div", { class: "plot", tabindex: "0", role: "group", "aria-label": `${title}, a curve. ${summary(lines)} Arrow keys move along it, plus and minus zoom.`, onkeydown: (event) => pressed(shown, event) });
  const shown = { title, lines, band, marks, stacked, unit, readout, place, plot: null };
  charts.all.set(place, shown);
  say(shown, null);
  inView.observe(place);
  resized.observe(place);
  return element("figure", { class: "chart", "data-metric": title },
    element("figcaption", { class: lines.length > 1 ? "many" : "" }, element("h4", {}, named(title)), readout, explanation ? element("p", { class: "explanation" }, explanation) : null), place);
}

function summary(lines) {
  return lines.map((line) => {
    const ys = line.y.filter(isNumber);
    if (!ys.length) return `${line.label}: no finite number.`;
    const [low, high] = ys.reduce(([l, h], y) => [Math.min(l, y), Math.max(h, y)], [Infinity, -Infinity]);
    return `${line.label}: ${formatted(ys[0])} at first, ${formatted(ys.at(-1))} at last, between ${formatted(low)} and ${formatted(high)}.`;
  }).join(" ");
}

// What a chart says at a point, or at its end.
function say(shown, index) {
  const at = index === null ? null : shown.plot.data[0][index];
  const values = shown.lines.map((line) => (index === null ? line.y.findLast(isNumber) : valueAt(line, at)));
  shown.readout.replaceChildren(
    element("span", { class: "at" }, index === null ? "last" : `iteration ${at}`),
    ...shown.lines.map((line, i) => element("span", { class: "value" }, ...(shown.lines.length > 1 ? [swatch(line), `${line.label} `] : []), element("b", {}, formatted(values[i]) + (isNumber(values[i]) ? shown.unit : "")))));
}

function valueAt(line, x) {
  let low = 0, high = line.x.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (line.x[middle] < x) low = middle + 1; else high = middle;
  }
  return line.x[low] === x ? line.y[low] : null;
}

function pressed(shown, event) {
  const { plot } = shown;
  if (!plot) return;
  const xs = plot.data[0];
  const at = plot.cursor.idx ?? xs.length - 1;
  const moves = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: xs.length - 1 };
  if (event.key in moves) {
    const to = Math.max(0, Math.min(xs.length - 1, moves[event.key]));
    plot.setCursor({ left: plot.valToPos(xs[to], "x"), top: HEIGHT / 3 });
  } else if (event.key === "+" || event.key === "-") zoomBy(event.key === "+" ? 0.5 : 2, xs[at]);
  else if (event.key === "Escape" || event.key === "0") zoomTo(null);
  else return;
  event.preventDefault();
}

function zoomTo(range) {
  const [start, end] = charts.whole;
  charts.zoom = range && [Math.max(start, range[0]), Math.min(end, range[1])];
  if (range && !(charts.zoom[0] < charts.zoom[1] && charts.zoom[1] - charts.zoom[0] < end - start)) charts.zoom = null;
  const [min, max] = charts.zoom ?? charts.whole;
  for (const shown of charts.drawn) shown.plot.setScale("x", { min, max });
}

function zoomBy(factor, centre) {
  const [min, max] = charts.zoom ?? charts.whole;
  const middle = centre ?? (min + max) / 2;
  zoomTo([middle - (factor * (max - min)) / 2, middle + (factor * (max - min)) / 2]);
}

function redrawAll() {
  for (const shown of [...charts.drawn]) draw(shown);
}

// A mean over the points so far that forgets; gaps stay gaps.
function smoothed(ys, weight) {
  let sum = 0, norm = 0;
  return ys.map((y) => {
    if (!isNumber(y)) return y;
    sum = weight * sum + (1 - weight) * y;
    norm = weight * norm + (1 - weight);
    return sum / norm;
  });
}

// The y axis: a line of one value lies in the middle, none rises out of rounding.
function around(_, low, high) {
  if (low === null) return [0, 1];
  const size = Math.max(Math.abs(low), Math.abs(high));
  if (high - low > 1e-9 * size) return uPlot.rangeNum(low, high, 0.1, true);
  return size === 0 ? [0, 1] : [low - 0.1 * size, high + 0.1 * size];
}

// uPlot's columns: numbers of all lines on the iterations of any of them.
function columns(lines) {
  const same = lines.every((line) => line.x === lines[0].x);
  return same ? [lines[0].x, ...lines.map((line) => line.y)] : uPlot.join(lines.map((line) => [line.x, line.y]));
}

function draw(shown) {
  const { lines, band, stacked, place } = shown;
  if (shown.plot) shown.plot.destroy();
  charts.drawn.delete(shown);
  shown.plot = null;
  if (!lines.some((line) => line.y.some(isNumber))) {
    place.replaceChildren(element("p", { class: "none" }, "No finite number was reported."));
    return;
  }
  const weight = stacked ? 0 : charts.smoothing;
  const layers = [];
  for (const { x, low, high, colour: name } of band) {
    layers.push({ x, y: high, series: { stroke: "transparent", width: 0, points: { show: false } } });
    layers.push({ x, y: low, series: { stroke: "transparent", width: 0, points: { show: false } }, fill: colour(name) + "26" });
  }
  const sums = new Float64Array(lines[0].y.length);
  const raised = lines.map((line) => (stacked ? line.y.map((y, i) => (sums[i] += y ?? 0)) : line.y));
  const order = stacked ? [...lines.keys()].reverse() : [...lines.keys()];
  for (const i of order) {
    const stroke = colour(lines[i].colour);
    const series = { stroke, width: 2, dash: lines[i].dash, spanGaps: false, fill: stacked ? stroke : undefined };
    const few = lines[i].y.length <= 30;
    if (weight > 0) layers.push({ x: lines[i].x, y: raised[i], series: { stroke: stroke + "40", width: 1, points: { show: false } } });
    layers.push({ x: lines[i].x, y: weight > 0 ? smoothed(raised[i], weight) : raised[i], series: { ...series, points: few && !stacked ? { show: true, size: 5, fill: stroke } : {} } });
  }
  const grid = { stroke: colour("grid"), width: 1 };
  const axis = { stroke: colour("quiet"), font: "11px system-ui, sans-serif", grid, ticks: { ...grid, size: 4 } };
  const [min, max] = charts.zoom ?? charts.whole;
  place.replaceChildren();
  shown.plot = new uPlot({
    width: Math.max(120, Math.floor(place.clientWidth)),
    height: HEIGHT,
    legend: { show: false },
    padding: [8, 16, 0, 0],
    scales: { x: { time: false, auto: false, min, max }, y: stacked ? { range: (_, __, high) => [0, high || 1] } : { range: around } },
    axes: [{ ...axis, size: 28, space: 44, incrs: [1, 2, 5].flatMap((n) => [0, 1, 2, 3, 4, 5, 6].map((e) => n * 10 ** e)).sort((a, b) => a - b) },
      { ...axis, size: 56, space: 34, values: (_, ticks) => ticks.map(formatted) }],
    cursor: { sync: { key: "iterations", setSeries: false }, drag: { x: true, y: false, setScale: false }, bind: { dblclick: () => () => zoomTo(null) }, points: { show: !stacked } },
    series: [{}, ...layers.map((layer) => layer.series)],
    bands: layers.flatMap((layer, i) => (layer.fill ? [{ series: [i, i + 1], fill: layer.fill }] : [])),
    hooks: {
      setCursor: [(plot) => say(shown, plot.cursor.idx === undefined || plot.cursor.left < 0 ? null : plot.cursor.idx)],
      setSelect: [(plot) => {
        if (plot.select.width < 4) return;
        const range = [plot.posToVal(plot.select.left, "x"), plot.posToVal(plot.select.left + plot.select.width, "x")];
        plot.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
        zoomTo(range);
      }],
      draw: [(plot) => marked(plot, shown.marks)],
    },
  }, columns(layers), place);
  charts.drawn.add(shown);
}

// Where the run gave a warning: a line across, with a triangle at its foot.
function marked(plot, marks) {
  const { ctx, bbox } = plot;
  ctx.save();
  ctx.fillStyle = ctx.strokeStyle = colour("warning");
  ctx.globalAlpha = 0.6;
  ctx.lineWidth = devicePixelRatio;
  ctx.setLineDash([3, 4]);
  for (const iteration of marks) {
    if (iteration < plot.scales.x.min || iteration > plot.scales.x.max) continue;
    const x = Math.round(plot.valToPos(iteration, "x", true)), foot = bbox.top + bbox.height, size = 5 * devicePixelRatio;
    ctx.beginPath();
    ctx.moveTo(x, bbox.top);
    ctx.lineTo(x, foot);
    ctx.stroke();
    ctx.beginPath();
    ctx.moveTo(x, foot - size * 1.6);
    ctx.lineTo(x + size, foot);
    ctx.lineTo(x - size, foot);
    ctx.fill();
  }
  ctx.restore();
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawAll);
