// The sections of the page, from the JSON that engine/report embeds.

const data = JSON.parse(document.getElementById("data").textContent);
const runs = data.runs;
const several = runs.length > 1;

const GROUPS = [
  ["score", "Score", true], ["eval", "Evaluation on held-out data", true], ["kl", "KL to the ref", true], ["train", "Training", true], ["loss", "Loss", true],
  ["response", "Response", true], ["policy", "Policy", false], ["value", "Value", false], ["reward", "Reward", false], ["grad_norm", "Gradient norm", false],
  ["lr", "Learning rate", false], ["speed", "Speed", false], ["time", "Time", false], ["memory", "Memory", false], ["skipped", "Skipped steps", false],
];
const MEANINGS = {
  "score/mean": "Mean score of the responses; the band is one standard deviation.",
  "score/std": "How far scores lie apart; near 0 there is nothing to learn from.",
  "score/failed": "Responses that nobody could score.",
  "reward/kl_penalty": "What the KL costs a response.",
  "kl/ref_mean": "How far the actor has moved from the ref, in nats per response.",
  "kl/coef": "What one nat costs.",
  "loss/policy": "Clipped PPO objective, mean over tokens.",
  "loss/value": "Squared error of the critic, clipped.",
  "policy/clip_fraction": "Share of tokens whose ratio is clipped; often 0.05 to 0.3.",
  "policy/approx_kl": "How far the steps of an iteration move the actor, per token.",
  "policy/ratio_max": "Largest ratio of new to old probability.",
  "policy/first_log_ratio_max": "Before the first step: 0 but for rounding.",
  "policy/entropy": "In nats per token; towards 0 the actor always says the same.",
  "value/explained_variance": "1 for a perfect critic, 0 for a constant one.",
  "value/clip_fraction": "Share of tokens whose value is clipped.",
  "response/length_mean": "Tokens per response.",
  "response/eos_fraction": "Share of responses that end by themselves.",
  "eval/score_mean": "Mean score on the held-out prompts.",
  "eval/win_rate": "Share of held-out prompts that score above the initial model, ties half; 0.5 is no change.",
  "eval/kl_ref_mean": "Nats per response, on the held-out prompts.",
  "memory/peak_gib": "Most that one rank has allocated (on a CPU: the whole process), and what the plan said.",
  "skipped/steps": "Optimizer steps left out since the start, for numbers that are not finite.",
};
const HEADLINES = ["score/mean", "eval/win_rate", "eval/accuracy", "eval/loss", "train/accuracy", "train/loss", "kl/ref_mean", "response/length_mean", "eval/score_mean", "eval/perplexity"];
const PHASES = { generate: "phase-0", score: "phase-1", train: "phase-2", step: "phase-2" };

// {x, y} of a metric of a run, wherever it is reported.
function column(run, name) {
  for (const source of [run.metrics, run.evaluation]) {
    const found = source.columns[name];
    if (found) return { x: found.x ?? source.x, y: found.y };
  }
  return null;
}

const names = (run) => [...new Set([...Object.keys(run.metrics.columns), ...Object.keys(run.evaluation.columns)])];
const everyName = [...new Set(runs.flatMap(names))];
const ends = (run, name) => { const ys = column(run, name)?.y.filter(isNumber) ?? []; return ys.length ? [ys[0], ys.at(-1)] : null; };
const phasesOf = (run) => names(run).filter((name) => /^time\/.+_s$/.test(name));
const sum = (ys) => ys.reduce((total, y) => total + (y ?? 0), 0);
const seconds = (run) => sum(phasesOf(run).map((name) => sum(column(run, name).y) * run.metrics.rows_per_point));
const lastIteration = (run) => run.metrics.x.at(-1) ?? 0;
const modelOf = (run) => ["actor", "model", "reward"].map((role) => run.settings[`${role}.model_name_or_path`]).find(Boolean) ?? "not known: no config.yaml";
const isSupervised = (run) => "train/loss" in run.metrics.columns;
const lineOf = (run, name, found) => ({ label: several ? run.name : name, ...lineStyle(runs.indexOf(run)), ...found });
const section = (id, title, ...children) => element("section", { id, "aria-labelledby": `${id}-title` }, element("h2", { id: `${id}-title` }, title), ...children);
const missing = (sentence) => element("p", { class: "none" }, sentence);

function tile(label, value, detail) {
  return element("div", { class: "tile" }, element("dt", {}, named(label)), element("dd", {}, element("b", {}, value), detail ? element("span", {}, detail) : null));
}

function iterationsSaid(run) {
  const planned = Number(run.settings.num_iterations);
  return planned > lastIteration(run) ? `${lastIteration(run)} of ${planned}` : String(lastIteration(run));
}

function header() {
  const top = element("header", {}, element("p", { class: "over" }, "RLHF run report"), element("h1", {}, several ? `${runs.length} runs compared` : runs[0].name));
  const shown = HEADLINES.filter((name) => runs.some((run) => ends(run, name))).slice(0, 5);
  const change = (run, name) => { const found = ends(run, name); return found ? `${formatted(found[0])} → ${formatted(found[1])}` : "–"; };
  if (several) {
    top.append(table("The runs, with metrics from first to last", ["run", "model", "iterations", "time in iterations", ...shown],
      runs.map((run, i) => [[swatch(lineStyle(i)), ` ${run.name}`], element("span", { class: "model", title: modelOf(run) }, modelOf(run).split("?")[0].split("/").slice(-2).join("/")), iterationsSaid(run), duration(seconds(run)), ...shown.map((name) => change(run, name))])));
  } else {
    const [run] = runs;
    top.append(element("p", { class: "model" }, modelOf(run)), element("dl", { class: "tiles" },
      tile("iterations", iterationsSaid(run)), tile("time in iterations", duration(seconds(run)), run.versions?.device ? `${run.versions.world_size} × ${run.versions.device}` : null),
      shown.map((name) => tile(name, formatted(ends(run, name)[1]), `at first ${formatted(ends(run, name)[0])}`))));
  }
  const chosen = element("select", { id: "run", onchange: (event) => details(runs[Number(event.target.value)]) }, runs.map((run, i) => element("option", { value: i }, run.name)));
  const links = ["curves", "time", "memory", "evaluation", "samples", "tokens", "config"].map((id) => element("a", { href: `#${id}` }, id[0].toUpperCase() + id.slice(1)));
  return [top, element("nav", { "aria-label": "Sections" }, element("div", { class: "links" }, links),
    several ? element("label", { class: "chosen-run" }, "Details of ", chosen) : null)];
}

function health() {
  const found = runs.flatMap((run) => [
    ...run.warnings.map((row) => [run, row.iteration, row.warning ?? "", row.sentence ?? ""]),
    ...(ends(run, "skipped/steps")?.[1] > 0 ? [[run, null, "skipped steps", `optimizer steps left out for numbers that are not finite: ${ends(run, "skipped/steps")[1]}.`]] : []),
    ...(run.quarantined ? [[run, null, "quarantine", `${run.quarantined} responses, with which a step could not be taken, are in quarantine.jsonl.`]] : []),
  ]);
  const watched = runs.filter((run) => run.metrics.x.length && !isSupervised(run));
  const unwatched = runs.filter((run) => !watched.includes(run)).map((run) => `${several ? `${run.name}: ` : ""}${isSupervised(run) ? "Supervised runs are not checked for signs of trouble." : "There are no metrics to find signs of trouble in."}`);
  const notes = runs.flatMap((run) => run.notes.map((note) => (several ? `${run.name}: ${note}` : note)));
  const warnings = found.slice(0, 200).map(([run, iteration, name, sentence]) => element("li", { class: "warning" }, element("span", { class: "sign", "aria-hidden": "true" }, "▲"),
    element("span", {}, element("b", {}, name), several ? ` (${run.name})` : "", iteration === null ? "" : ` from iteration ${iteration}`, ": ", sentence)));
  return section("health", "Health", found.length ? element("ul", { class: "warnings" }, warnings) : watched.length === runs.length ? element("p", { class: "healthy" }, "✓ No health warnings.") : null,
    unwatched.map(missing),
    found.length > 200 ? missing(`${found.length - 200} more are in warnings.jsonl.`) : null, notes.map((note) => element("p", { class: "explanation" }, note)));
}

function metricChart(name) {
  const lines = [], band = [];
  for (const run of runs) {
    const found = column(run, name);
    if (!found) continue;
    lines.push(lineOf(run, name, found));
    const deviation = name === "score/mean" ? column(run, "score/std") : null;
    if (deviation && deviation.y.length === found.y.length) {
      const edge = (sign) => found.y.map((y, i) => (isNumber(y) && isNumber(deviation.y[i]) ? y + sign * deviation.y[i] : null));
      band.push({ x: found.x, high: edge(1), low: edge(-1), colour: lines.at(-1).colour });
    }
    const planned = name === "memory/peak_gib" && run.memory_plan?.device !== "cpu" ? column(run, "memory/planned_gib") : null;
    if (planned) lines.push({ ...lineOf(run, name, planned), label: several ? `${run.name}, planned` : "planned", colour: "quiet", dash: [4, 4] });
  }
  const marks = [...new Set(runs.flatMap((run) => run.warnings.map((row) => row.iteration)))].slice(0, 50);
  return chart(name, MEANINGS[name], lines, { band, marks });
}

function curves() {
  if (!everyName.length) return section("curves", "Curves", missing("There are no curves: metrics.jsonl is missing, or holds no iteration yet."));
  const xs = runs.flatMap((run) => [run.metrics.x, run.evaluation.x]).filter((x) => x.length);
  charts.whole = [Math.min(...xs.map((x) => x[0])), Math.max(...xs.map((x) => x.at(-1)))];
  if (charts.whole[0] === charts.whole[1]) charts.whole = [charts.whole[0] - 1, charts.whole[1] + 1];
  const prefix = (name) => name.split("/")[0];
  const known = GROUPS.map(([group]) => group);
  const others = [...new Set(everyName.map(prefix))].filter((group) => !known.includes(group)).map((group) => [group, group, true]);
  const groups = [...GROUPS, ...others].map(([group, title, open]) => {
    const members = everyName.filter((name) => prefix(name) === group && name !== "memory/planned_gib");
    return members.length ? element("details", { class: "group", open, "data-group": group },
      element("summary", {}, element("h3", {}, title), element("span", { class: "explanation" }, members.map((name) => name.split("/").slice(1).join("/") || name).join(", "))),
      element("div", { class: "grid" }, members.map(metricChart))) : null;
  });
  const smoothing = element("input", { id: "smoothing", type: "range", min: 0, max: 0.95, step: 0.05, value: 0, oninput: (event) => { charts.smoothing = Number(event.target.value); redrawAll(); } });
  const button = (label, name, act) => element("button", { type: "button", "aria-label": name, onclick: act }, label);
  return section("curves", "Curves", element("div", { class: "toolbar" },
    element("label", { for: "smoothing" }, "Smoothing"), smoothing,
    element("span", { class: "buttons", role: "group", "aria-label": "Zoom" }, button("+", "Zoom in", () => zoomBy(0.5)), button("−", "Zoom out", () => zoomBy(2)), button("Whole run", "Show the whole run", () => zoomTo(null))),
    element("span", { class: "explanation" }, "Curves run over iterations. Point at one for its values, drag to zoom, double-click for the whole run."),
    several ? element("span", { class: "runs" }, runs.map((run, i) => element("span", {}, swatch(lineStyle(i)), ` ${run.name}`))) : null), groups);
}

function time() {
  const timed = runs.filter((run) => seconds(run) > 0);
  if (!timed.length) return section("time", "Time by phase", missing("There are no times: metrics.jsonl holds no time/..._s."));
  const phases = [...new Set(timed.flatMap(phasesOf))].map((name) => name.slice(5, -2));
  const colourOf = (phase) => PHASES[phase] ?? `phase-${(phases.indexOf(phase) + 3) % 7}`;
  const spent = (run, phase) => sum(column(run, `time/${phase}_s`)?.y ?? []) * run.metrics.rows_per_point;
  const most = Math.max(...timed.map(seconds));
  const bars = timed.map((run) => bar(several ? run.name : "all phases", phases.map((phase) => ({ label: phase, size: spent(run, phase), colour: colourOf(phase) })), most, duration));
  const rows = timed.map((run) => [run.name, ...phases.map((phase) => `${duration(spent(run, phase))} (${Math.round((100 * spent(run, phase)) / seconds(run))} %)`), duration(seconds(run))]);
  const areas = timed.map((run) => {
    const found = new Map(phases.map((phase) => [phase, column(run, `time/${phase}_s`)]).filter(([, times]) => times));
    const x = [...new Set([...found.values()].flatMap((times) => times.x))].sort((a, b) => a - b);
    const lines = [...found].map(([phase, times]) => {
      const at = new Map(times.x.map((iteration, i) => [iteration, times.y[i]]));
      return { label: phase, colour: colourOf(phase), dash: [], x, y: x.map((iteration) => at.get(iteration) ?? 0) };
    });
    return chart(several ? `seconds per iteration, ${run.name}` : "seconds per iteration", null, lines, { stacked: true, unit: " s" });
  });
  return section("time", "Time by phase", element("p", {}, "Of the iterations. Evaluation, saving and loading are not in it."), element("div", { class: "card" }, key(phases.map((phase) => [phase, colourOf(phase)])), bars), element("div", { class: "grid wide" }, areas), table("Time by phase", ["run", ...phases, "all phases"], rows));
}

function memory(run) {
  const plan = run.memory_plan, measured = (column(run, "memory/peak_gib")?.y ?? []).filter(isNumber).reduce((most, y) => Math.max(most, y), 0) * 2 ** 30;
  if (!plan?.phases) return missing(`The memory was not planned: there is no memory_plan.json.${measured ? ` Measured peak: ${bytes(measured)} on a rank.` : ""}`);
  const parts = [...new Set(Object.values(plan.phases).flatMap((phase) => Object.keys(phase.parts ?? {})))];
  const colourOf = (part) => `phase-${parts.indexOf(part) % 7}`;
  const comparable = measured > 0 && plan.device !== "cpu"; // a CPU's peak is the whole process's, libraries included
  const whole = Math.max(comparable ? measured : 0, ...Object.values(plan.phases).map((phase) => Math.max(phase.peak_bytes ?? 0, sum(Object.values(phase.parts ?? {})))));
  const bars = Object.entries(plan.phases).map(([phase, { parts: sizes, peak_bytes: peak }]) => bar(phase, Object.keys(sizes ?? {}).length ? Object.entries(sizes).map(([part, size]) => ({ label: part, size, colour: colourOf(part) })) : [{ label: "peak", size: peak, colour: "phase-0" }], whole, bytes));
  const off = () => `${Math.abs(Math.round(100 * (plan.peak_bytes / measured - 1)))} % ${plan.peak_bytes < measured ? "below" : "above"} what was measured`;
  const against = !measured ? "." : comparable ? `, ${off()}.` : `. Measured: ${bytes(measured)} of the whole process, libraries included, since this ran on CPUs.`;
  return [element("p", {}, `Planned for a rank (there ${plan.world_size === 1 ? "is 1" : `are ${plan.world_size ?? "?"}`}), by phase. The plan's peak is ${bytes(plan.peak_bytes ?? 0)}${against}`),
    element("div", { class: "card" }, key(parts.map((part) => [part, colourOf(part)])), bars, comparable ? bar("measured", [{ label: "measured peak", size: measured, colour: "quiet" }], whole, bytes) : null),
    table("Planned states by role, on a rank", ["role", "ZeRO stage", "parameters", "weights", "gradients", "optimizer"], Object.entries(plan.roles ?? {}).map(([role, of]) =>
      [role, String(of.zero_stage ?? "–"), isNumber(of.parameters) ? counted(of.parameters) : "–", bytes(of.weights_bytes ?? 0), bytes(of.gradients_bytes ?? 0), bytes(of.optimizer_bytes ?? 0)]))];
}

function evaluation(run) {
  const measured = names(run).filter((name) => name.startsWith("eval/") && ends(run, name));
  if (!measured.length) return missing(`The run was not evaluated on held-out data: there is ${isSupervised(run) ? "no eval/... in metrics.jsonl" : "no evaluation.jsonl"}.`);
  return [table("Before training and at the last evaluation", ["metric", "at first", "at last", "change"], measured.map((name) => {
    const [first, last] = ends(run, name);
    return [name, formatted(first), formatted(last), `${last > first ? "+" : ""}${formatted(last - first)}`];
  })), element("h3", {}, "Responses beside the initial model's"), isSupervised(run) ? missing("A supervised run writes no responses.") : run.evaluation_samples.rows.length ? evaluationSamples(run) : missing("There are none: evaluation_samples.jsonl is missing or empty.")];
}

function config(run) {
  const versions = Object.entries(run.versions ?? {}).filter(([, value]) => value !== null).map(([name, value]) => [name, String(value)]);
  const all = [...new Set(runs.flatMap((other) => Object.keys(other.settings)))];
  const differing = several ? all.filter((name) => new Set(runs.map((other) => other.settings[name])).size > 1) : [];
  return [several ? table("Settings that differ", ["setting", ...runs.map((other) => other.name)], differing.map((name) => [name, ...runs.map((other) => other.settings[name] ?? "–")])) : null,
    run.config ? element("details", { class: "group" }, element("summary", {}, element("h3", {}, "config.yaml")), element("pre", { tabindex: "0" }, run.config)) : missing("The settings are not known: there is no config.yaml."),
    versions.length ? table("Versions and machine", ["what", "version"], versions) : missing("The versions are not known: there is no versions.json.")];
}

const DETAILS = [
  ["memory", "Memory by phase, against the plan", memory], ["evaluation", "Evaluation", evaluation],
  ["samples", "Samples", (run) => (run.samples.rows.length ? samples(run) : missing("There are no samples: samples.jsonl is missing or empty."))],
  ["tokens", "One response, token by token", (run) => (run.token_views.rows.length ? tokens(run) : missing("There is no response token by token: token_views.jsonl is missing or empty."))],
  ["config", "Config and versions", config],
];

// A file of another form than ours costs its section, not the page.
function attempted(content, run) {
  try {
    return content(run);
  } catch (error) {
    return missing(`This section cannot be shown, its file is not of the form that a run writes: ${error.message}.`);
  }
}

// The sections about one run.
function details(run) {
  document.getElementById("details").replaceChildren(...DETAILS.map(([id, title, content]) => section(id, several ? `${title}: ${run.name}` : title, attempted(content, run))));
}

document.getElementById("report").append(...header(), element("main", {}, health(), curves(), time(), element("div", { id: "details" })),
  element("footer", {}, `Written ${data.written.replace("T", " ").slice(0, 16)} UTC. This file needs no network.`));
details(runs[0]);
