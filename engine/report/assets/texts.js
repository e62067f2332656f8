// Samples, evaluations side by side, and one response token by token.

const text = (content) => element("div", { class: "text", dir: "auto" }, content === "" || content === null || content === undefined ? element("i", { class: "empty" }, "(empty)") : String(content));

const chip = (label, value, sign = "") => element("span", { class: `chip ${sign}` }, `${label} `, element("b", {}, value));

const chipsOf = (row, more = null) => element("p", { class: "chips" },
  chip("score", formatted(row.score)), "kl" in row ? chip("KL", `${formatted(row.kl)} nats`) : null, "length" in row ? chip("length", `${row.length} tokens`) : null, more);

function shownOf(thinned) {
  const kept = new Set(thinned.rows.map((row) => row.iteration)).size;
  return kept < thinned.iterations ? element("p", { class: "explanation" }, `${kept} of ${thinned.iterations} iterations, evenly spread, are in this page; the file has all.`) : null;
}

function samples(run) {
  const place = element("div", { class: "cards" });
  return [shownOf(run.samples), slider("Iteration of the samples", run.samples.rows, (_, rows) => place.replaceChildren(...rows.map((row) =>
    element("article", { class: "card" }, element("h4", {}, "Prompt"), text(row.prompt), element("h4", {}, row.conversation ? "Response, and the conversation" : "Response"), text(row.response),
      row.conversation ? element("details", {}, element("summary", {}, "All turns"), row.conversation.map((turn) => [element("h5", {}, turn.role), text(turn.content)])) : null,
      chipsOf(row))))), place];
}

function evaluationSamples(run) {
  const place = element("div", { class: "stack" });
  const better = (row) => (isNumber(row.score) && isNumber(row.initial_score) ? row.score - row.initial_score : null);
  const kinds = { "all prompts": () => true, "better than at first": (row) => better(row) > 0, "worse than at first": (row) => better(row) < 0, "the same score": (row) => better(row) === 0, "no score to compare": (row) => better(row) === null };
  let current = [];
  const choice = element("select", { "aria-label": "Which prompts", onchange: fill }, Object.keys(kinds).map((kind) => element("option", {}, kind)));
  const count = element("output", { class: "explanation" });
  function fill() {
    const rows = current.filter(kinds[choice.value]);
    count.textContent = `${rows.length} of ${current.length} prompts${rows.length > 50 ? ", the first 50 shown" : ""}`;
    place.replaceChildren(...rows.slice(0, 50).map((row) => element("article", { class: "card" }, element("h4", {}, "Prompt"), text(row.prompt),
      element("div", { class: "pair" },
        element("div", {}, element("h4", {}, "Initial model"), text(row.initial_response), element("p", { class: "chips" }, chip("score", formatted(row.initial_score)))),
        element("div", {}, element("h4", {}, "This run"), text(row.response), chipsOf(row,
          better(row) > 0 ? chip("▲ better by", formatted(better(row)), "up") : better(row) < 0 ? chip("▼ worse by", formatted(-better(row)), "down") : better(row) === 0 ? chip("=", "same score") : null))))));
  }
  const moved = slider("Iteration of the evaluation", run.evaluation_samples.rows, (_, rows) => { current = rows; fill(); });
  return [shownOf(run.evaluation_samples), moved, element("p", { class: "row" }, choice, count), place];
}

const MEASURES = [
  ["advantages", "Advantage", "how much better than expected the token turned out: what the actor learns from"],
  ["rewards", "Reward", "what the token earned: the KL penalty, plus the score at the end"],
  ["values", "Value", "what the critic expected before the token"],
  ["kl", "KL", "of the actor to the ref at the token, in nats"],
  ["logprobs", "Log-prob", "of the token under the actor, in nats"],
  ["ref_logprobs", "Ref log-prob", "of the token under the ref, in nats"],
];

// Blue below zero, orange above, as strong as the value is large: told apart by the colour-blind, and in both themes.
const STRONGEST = 0.8;
function shade(value, largest) {
  if (!isNumber(value) || largest === 0) return "transparent";
  const strength = (STRONGEST * Math.min(1, Math.abs(value) / largest)).toFixed(3);
  return value < 0 ? `rgb(0 114 178 / ${strength})` : `rgb(230 129 0 / ${strength})`;
}

function tokens(run) {
  const there = MEASURES.filter(([name]) => run.token_views.rows.some((row) => Array.isArray(row[name])));
  const prompt = element("div"), legend = element("div", { class: "legend" }), place = element("div", { class: "tokens", role: "group", "aria-label": "Tokens of the response; arrow keys move from one to the next" });
  const numbers = element("div", { class: "numbers", "aria-live": "polite" });
  const choice = element("select", { "aria-label": "What the colours show", onchange: paint }, there.map(([name, label]) => element("option", { value: name }, label)));
  let view = null, buttons = [], selected = 0;

  function paint() {
    const [name, label, meaning] = there.find(([known]) => known === choice.value);
    const values = view[name] ?? [];
    const largest = values.filter(isNumber).reduce((most, value) => Math.max(most, Math.abs(value)), 0);
    buttons.forEach((button, i) => { button.style.backgroundColor = shade(values[i], largest); });
    const steps = [-1, -0.5, 0, 0.5, 1].map((share) => element("span", { class: "step", style: { "background-color": shade(share * largest, largest) } }, formatted(share * largest)));
    legend.replaceChildren(view[name] ? element("span", { class: "scale", role: "img", "aria-label": `Colours from blue, ${formatted(-largest)}, over none, 0, to orange, ${formatted(largest)}` }, steps) : element("span", {}, `This response has no ${label.toLowerCase()}s.`),
      element("span", { class: "explanation" }, `${label}: ${meaning}.`));
    select(selected);
  }

  function select(index, focus = false) {
    if (!buttons.length) { numbers.replaceChildren("The response has no tokens."); return; }
    buttons[selected]?.classList.remove("selected");
    buttons[selected]?.setAttribute("tabindex", "-1");
    selected = Math.max(0, Math.min(buttons.length - 1, index));
    buttons[selected].classList.add("selected");
    buttons[selected].setAttribute("tabindex", "0");
    if (focus) buttons[selected].focus();
    numbers.replaceChildren(element("p", {}, `Token ${selected + 1} of ${buttons.length}: `, element("code", { dir: "auto" }, JSON.stringify(view.tokens[selected]))),
      element("dl", {}, there.map(([name, label]) => element("div", { class: name === choice.value ? "chosen" : "" }, element("dt", {}, label), element("dd", {}, formatted(view[name]?.[selected]))))));
  }

  function show(_, rows) {
    view = rows[0];
    prompt.replaceChildren(element("h4", {}, "Prompt"), text(view.prompt), element("h4", {}, "Response ", chip("score", formatted(view.score))));
    buttons = view.tokens.map((token, i) => element("button", {
      type: "button", class: "token", tabindex: i ? "-1" : "0", onmouseenter: () => select(i), onfocus: () => select(i), onclick: () => select(i),
      onkeydown: (event) => {
        const moves = { ArrowLeft: i - 1, ArrowUp: i - 1, ArrowRight: i + 1, ArrowDown: i + 1, Home: 0, End: buttons.length - 1 };
        if (event.key in moves) { event.preventDefault(); select(moves[event.key], true); }
      },
    }, token === "" ? "·" : token.replaceAll("\n", "⏎\n")));
    place.replaceChildren(...buttons);
    selected = 0;
    paint();
  }
  const moved = slider("Iteration of the token view", run.token_views.rows, show);
  return [shownOf(run.token_views), moved, element("p", { class: "row" }, element("label", {}, "Colour: ", choice)), prompt, legend, element("div", {}, place, numbers)];
}
