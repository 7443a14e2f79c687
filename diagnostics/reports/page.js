// The page draws itself from the data it carries. Every text in them is somebody else's: it becomes a text node, never
// markup, and reaches Vega as a value of a field, never as an expression.
"use strict";
(() => {
const json = id => JSON.parse(document.getElementById(id).textContent);
const fleet = json("fleet"), kinds = json("specifications"), settings = json("look");
const main = document.getElementById("main");
const run = number => json("run-" + number);  // parsed when somebody opens it: there may be hundreds
let drawing = 0;  // counts what is shown, so that drawing stops when something else is

const READING = {
  heatmap: "One row per layer, one column per recorded step. A gradient that keeps its size has one colour from top to bottom; one that vanishes on its way back grows darker towards depth 0.",
  depth_profile: "The backward pass runs from right to left. A line that falls towards the left vanishes, one that rises towards the left explodes. The line is fitted to norms, so that it bends where layers have other widths.",
  norms: "The optimizer is given the norm after clipping. A step is clipped where the norm before is above the threshold.",
  findings: "A bar runs from the first recorded step that showed it to the step at which it cleared, or to the end. A diamond is the first break of a rule of the loop.",
  clipping: "Where nearly every step is clipped, max_norm sets the size of the step and the loss no longer does.",
  gain: "Below 1 a layer shrinks what passes back through it, above 1 it makes it grow. An input that several layers read has the sum of their gradients.",
  update_ratio: "How far a step moves the weights, relative to their size. Layers far below the others hardly learn.",
  share: "Which layers make the norm that clipping looks at: the layer's part of the total norm to the power p, so that shares sum to one.",
};

// Elements

const present = children => children.flat(Infinity).filter(child => child !== null && child !== undefined);

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...present(children));
  return made;
}
const badge = ([word, tone]) => element("span", {class: "badge " + tone}, word);
const facts = list => element("dl", {class: "facts"}, list.map(fact => [
  element("dt", {}, fact.name),
  element("dd", {}, fact.values.map(value => fact.code ? element("code", {}, value) : value)),
]));
const cell = (content, kind = "number", extra = {}) => element("td", {class: kind, ...extra}, content);
const scroll = (label, table) => element("div", {class: "scroll", tabindex: 0, role: "region", "aria-label": label}, table);

function copy(text) {
  const done = word => { button.textContent = word; setTimeout(() => { button.textContent = "copy"; }, 1500); };
  const button = element("button", {class: "copy", type: "button", "aria-label": "copy " + text, onclick: async () => {
    try { await navigator.clipboard.writeText(text); done("copied"); } catch { done("not allowed: select and copy"); }
  }}, "copy");
  return button;
}

// Figures

function figure(drawn, layers = [], wide = false) {
  const chart = element("div", {class: "chart", role: "img", "aria-label": drawn.words});
  const caption = [drawn.note && drawn.note[0].toUpperCase() + drawn.note.slice(1) + ".", READING[drawn.kind]];
  const made = element("figure", {class: wide ? "wide" : null, "data-kind": drawn.kind},
    element("h3", {}, drawn.title), chart, element("figcaption", {}, caption.filter(Boolean).join(" ")));
  if (drawn.kind !== "depth_profile" || drawn.data.profiles.length < 2) return {made, draw: () => draw(chart, drawn, layers)};
  const chosen = chooseSteps(drawn.data.profiles.map(profile => profile.label), () => draw(chart, only(drawn, chosen.labels), layers));
  chart.after(chosen.made);
  return {made, draw: () => draw(chart, only(drawn, chosen.labels), layers)};
}

// A profile has up to seven steps to choose from; the first, the middle and the last are drawn until somebody chooses.
const only = (drawn, labels) => ({...drawn, data: {...drawn.data,
  profiles: drawn.data.profiles.filter(profile => labels.has(profile.label)),
  edges: drawn.data.edges.filter(edge => labels.has(edge.label))}});

function chooseSteps(all, changed) {
  const last = all.length - 1, labels = new Set([all[0], all[last >> 1], all[last]]);
  const box = label => {
    const input = element("input", {type: "checkbox", onchange: () => { input.checked ? labels.add(label) : labels.delete(label); changed(); }});
    input.checked = labels.has(label);
    return element("label", {}, input, label.split(":")[0]);
  };
  return {labels, made: element("fieldset", {class: "steps"}, element("legend", {}, "steps shown"), all.map(box))};
}

async function draw(chart, drawn, layers) {
  const kind = kinds[drawn.kind];
  const layer = kind.layer.filter(one => !one.data || !one.data.name || drawn.data[one.data.name].length);  // Vega cannot lay out a legend without an entry
  if (!layer.length) { chart.replaceChildren(drawn.note); chart.classList.add("drawn"); return; }
  const specification = {
    ...kind, layer, width: "container", autosize: {type: "fit-x", contains: "padding"}, padding: 0,
    ...(drawn.height && {height: drawn.height}),
    datasets: {...drawn.data, layers},
  };
  await vegaEmbed(chart, specification, {
    mode: "vega-lite", renderer: "svg", actions: false, ast: true, config: {...settings, legend: {...settings.legend, labelLimit: Math.max(120, chart.clientWidth - 60)}}, defaultStyle: false, logLevel: 1,  // errors; an empty table is no news
    tooltip: {disableDefaultStyle: true},
  });
  chart.classList.add("drawn");
}

async function drawAll(figures) {
  const mine = ++drawing;
  main.setAttribute("aria-busy", "true");
  for (const one of figures) {
    await new Promise(done => setTimeout(done));  // the browser may answer to a click in between
    if (mine !== drawing) return;
    try { await one.draw(); } catch (error) { one.made.append(element("p", {}, `This figure could not be drawn (${error}).`)); console.error(error); }
  }
  main.setAttribute("aria-busy", "false");
}

// One run

function troubles(list) {
  if (!list.length) return null;
  return element("section", {}, element("h2", {}, "What was found, and what to try"), list.map(one =>
    element("section", {class: "card " + one.tone},
      element("h3", {}, one.title + " ", element("span", {class: "when"}, one.when)),
      element("p", {}, one.message),
      element("ul", {}, one.remedies.map(remedy => element("li", {}, remedy.text,
        remedy.override ? [" ", element("code", {}, remedy.override), copy(remedy.override)] : null,
        remedy.tried ? element("span", {class: "when"}, ` tried: ${remedy.tried}`) : null))))));
}

function byDepth(part) {
  const table = part.table;
  if (!table) return [element("h2", {}, "By depth"), element("p", {}, "No step was recorded.")];
  const rows = part.layers.map(({depth, layer}, row) => element("tr", {},
    cell(String(depth)), cell(layer, "text name"), cell(table.kinds[row], "text"),
    table.columns.map((column, place) => {
      const text = column[row] ?? "–", share = table.headings[place] === "share of total norm" && parseFloat(text);
      const broken = /NaN|∞/.test(text) ? " broken" : "";
      return share ? cell(text, "number share" + broken, {style: `--share: ${share}%`}) : cell(text, "number" + broken);
    })));
  const heading = (text, kind) => element("th", {scope: "col", class: kind}, text);
  const head = [heading("depth"), heading("layer", "text"), heading("kind", "text"), table.headings.map(text => heading(text))];
  return [
    element("h2", {}, `By depth at step ${table.step}`),
    scroll("Table by depth", element("table", {}, element("thead", {}, element("tr", {}, head)), element("tbody", {}, rows))),
    element("p", {class: "soft"}, "rms: size of a typical element of the gradient of the loss with respect to the layer's output. gain: norm of the gradient at the layer's input over that at its output. update / weight: how far the step moved the weights, relative to their size. share: part of the total norm raised to the power p, so that shares sum to one. Shares of dead units, and updates, come from samples."),
  ];
}

function whatIf(answers, figures) {
  const known = answers.filter(answer => answer.candidates.length);
  if (!known.length) return null;
  return element("section", {}, element("h2", {}, "What if: another max_norm"), element("div", {class: "figures"}, figures,
    known.map(answer => element("section", {class: "card"},
      element("h3", {}, "norm with " + answer.norm), element("p", {class: "soft"}, answer.steps),
      element("table", {}, element("thead", {}, element("tr", {}, ["max_norm", "would clip", "median coefficient"].map(text => element("th", {scope: "col"}, text)))),
        element("tbody", {}, answer.candidates.map(([norm, share, coefficient, current]) => element("tr", {class: current ? "current" : null},
          cell(norm + (current ? " (this run)" : "")), cell(share), cell(coefficient))))),
      answer.suggestions.length ? element("p", {}, "Of the healthy steps " + answer.suggestions.map(([share, norm]) => `${share} are clipped by max_norm = ${norm}`).join(", ") + ".") : null))),
    element("p", {class: "soft"}, known[0].caveat));
}

function showRun(number) {
  const one = run(number), figures = [];
  const keep = made => { figures.push(made); return made.made; };
  const parts = one.parts.map(part => [
    element("h2", {}, one.parts.length > 1 ? `Gradients of optimizer ${part.name}` : "Gradients"),
    element("div", {class: "figures"},
      part.figures.filter(drawn => drawn.kind !== "what_if").map(drawn => keep(figure(drawn, part.layers))),
      element("section", {class: "card"}, element("h3", {}, "Clipping"), facts(part.clipping))),
    whatIf(part.what_if, part.figures.filter(drawn => drawn.kind === "what_if").map(drawn => keep(figure(drawn)))),
    byDepth(part),
  ]);
  const headline = element("h1", {tabindex: -1}, one.headline);
  main.replaceChildren(...present([
    fleet ? element("nav", {}, element("a", {href: "#"}, "← all runs")) : null,
    element("header", {class: one.badges[0][1]}, element("p", {class: "run"}, one.name), one.badges.map(badge), headline, element("p", {class: "soft"}, one.ending)),
    troubles(one.troubles),
    (parts.length ? parts : [element("h2", {}, "By depth"), element("p", {}, "No step was recorded.")]),
    element("h2", {}, "What was run"), facts(one.facts),
  ]));
  window.scrollTo(0, 0);
  if (fleet) headline.focus();
  drawAll(figures);
}

// All runs

// Where every run is called by its overrides, as in a sweep, a column of them would say everything twice.
const flat = rows => rows.flatMap(row => [row, ...row.members]);
const named = fleet && flat(fleet.rows).every(row => row.overrides.every(one => row.label.includes(one)));
const seeds = fleet && fleet.rows.some(row => row.runs > 1);
const COLUMNS = [
  {name: "run", text: true, key: row => row.label},
  ...(named ? [] : [{name: "overrides that differ", text: true, key: row => row.overrides.join(" ")}]),
  {name: "verdict", text: true, key: row => -row.severity * 1e6 - row.violations.length},
  ...(seeds ? [{name: "sick", key: row => -row.sick / row.runs}] : []),
  {name: "slope", key: row => row.slope ? row.slope.median : null},
  {name: "clipped", key: row => row.clipped ? row.clipped.median : null},
  {name: "broken rules", key: row => -row.violations.length},
  {name: "last loss", key: row => row.loss ? row.loss.median : null},
  {name: "status", text: true, key: row => row.status},
];
const view = {sort: null, down: false, words: "", health: "all", open: new Set(), picked: new Set(), started: false};

const spread = (one, many) => one ? [one.shown, many && one.range ? element("span", {class: "soft"}, one.range) : null] : ["–"];

function rowsShown() {
  const words = view.words.toLowerCase().split(/\s+/).filter(Boolean);
  const shown = fleet.rows.filter(row => words.every(word => row.words.includes(word)) &&
    (view.health === "all" || (view.health === "sick") === row.sick > 0));
  if (view.sort === null) return shown;
  const key = COLUMNS[view.sort].key, sign = view.down ? -1 : 1;
  const order = (a, b) => typeof a === "string" ? a.localeCompare(b, undefined, {numeric: true}) : a - b;
  return shown.map(row => [key(row), row]).sort(([a], [b]) => a === null || b === null ? (a === null) - (b === null) : sign * order(a, b)).map(([, row]) => row);
}

function line(row, member, again) {
  const many = row.runs > 1, open = view.open.has(row.id);
  const name = many
    ? element("button", {class: "plain", type: "button", "aria-expanded": String(open), onclick: () => { open ? view.open.delete(row.id) : view.open.add(row.id); again(row.id); }}, (open ? "▾ " : "▸ ") + row.label)
    : row.run === null ? row.label : element("button", {class: "plain name", type: "button", onclick: () => { location.hash = "run=" + row.run; }}, row.label);
  const box = member ? null : element("input", {type: "checkbox", "aria-label": "overlay " + row.label, onchange: event => {
    event.target.checked ? view.picked.add(row.id) : view.picked.delete(row.id); overlay();
  }});
  if (box) box.checked = view.picked.has(row.id);
  return element("tr", {class: member ? "member" : null, "data-row": row.id},
    cell(box, "pick"), cell(name, "text name"), named ? null : cell(row.overrides.map(one => element("code", {}, one)), "text overrides"), cell(badge(row.badge), "text"),
    seeds ? cell(many ? `${row.sick} of ${row.runs}` : row.sick ? "yes" : "no") : null,
    cell(spread(row.slope, many)), cell(spread(row.clipped, many)), cell(row.violations.length ? row.violations.join(", ") : "0"),
    cell(spread(row.loss, many)), cell(row.status, "text status"));
}

function fillTable(body, count, focus) {
  const again = id => fillTable(body, count, id), shown = rowsShown();
  body.replaceChildren(...shown.flatMap(row => [line(row, false, again), ...(view.open.has(row.id) ? row.members.map(member => line(member, true, again)) : [])]));
  count.textContent = `${shown.length} of ${fleet.rows.length} rows`;
  if (focus !== undefined) body.querySelector(`tr[data-row="${focus}"] button`).focus();
}

function fleetTable() {
  const body = element("tbody"), count = element("p", {class: "soft", role: "status"});
  const headings = COLUMNS.map((column, place) => {
    const button = element("button", {class: "plain", type: "button", onclick: () => {
      view.down = view.sort === place && !view.down; view.sort = place;
      headings.forEach((other, at) => other.setAttribute("aria-sort", at !== place ? "none" : view.down ? "descending" : "ascending"));
      headings.forEach((other, at) => { other.lastChild.lastChild.textContent = at !== place ? "" : view.down ? " ▾" : " ▴"; });
      fillTable(body, count);
    }}, column.name, element("span", {"aria-hidden": "true"}));
    return element("th", {scope: "col", class: column.text ? "text" : null, "aria-sort": "none"}, button);
  });
  const refill = change => event => { change(event.target.value); fillTable(body, count); };
  const health = element("select", {onchange: refill(value => { view.health = value; })},
    [["all", "all"], ["sick", "sick"], ["sound", "not sick"]].map(([value, text]) => element("option", {value}, text)));
  const words = element("input", {type: "search", oninput: refill(value => { view.words = value; })});
  health.value = view.health; words.value = view.words;
  fillTable(body, count);
  return [
    element("div", {class: "controls"}, element("label", {}, "words that a row must contain", words), element("label", {}, "health", health), count),
    scroll("Table of runs", element("table", {id: "runs"}, element("thead", {}, element("tr", {}, element("th", {class: "pick", scope: "col"}, "overlay"), headings)), body)),
  ];
}

function separations() {
  if (!fleet.separations.length) return null;
  return element("section", {}, element("h2", {}, "What separates the sick from the sound"),
    element("table", {}, element("thead", {}, element("tr", {}, element("th", {scope: "col", class: "text"}, "override"), element("th", {scope: "col"}, "runs told right"), element("th", {scope: "col", class: "text"}, "sick, by value"))),
      element("tbody", {}, fleet.separations.map(one => element("tr", {}, cell(element("code", {}, one.key), "text"), cell(`${one.right} of ${one.runs}`),
        cell(one.groups.map(group => element("div", {}, element("code", {}, group.value), ` ${group.sick} of ${group.runs} sick`)), "text"))))),
    element("p", {class: "soft"}, `Each run is guessed from the other runs with the same value; without any setting ${fleet.separations[0].baseline} would be right. Settings that change together cannot be told apart.`));
}

let overlaid = null;
function overlay() {
  const picked = fleet.rows.filter(row => view.picked.has(row.id) && row.band).slice(0, 8);
  const kind = new Set(picked.map(row => row.band.depth.length ? row.depths : 0)).size > 1 ? "overlay_relative" : "overlay";
  const heights = picked.flatMap(row => [...row.band.low, ...row.band.high]).filter(value => value !== null);
  const low = Math.min(...heights), high = Math.max(...heights), wider = Math.max(.04 * (high - low), (1 - (high - low)) / 2);
  const left = view.picked.size - picked.length;
  const drawn = {
    kind, title: "Output gradient over depth, run by run",
    data: {runs: picked.map(row => ({run: row.label, ...row.band})), frame: picked.length ? [{log10: low - wider}, {log10: high + wider}] : []},
    note: left > 0 ? `${left} of the chosen rows are not drawn: there are eight colours, and a row needs a recorded step` : "",
    words: `Output gradient over depth of ${picked.length} rows of the table.`,
  };
  const made = figure(drawn, [], true);
  made.made.append(element("p", {class: "soft"}, "At the last recorded step. Choose rows by the boxes in the table; a band spans runs that differ in their seed."));
  overlaid.replaceChildren(made.made);
  return drawAll([made]);
}

function showFleet() {
  const figures = (fleet.comparison || []).map(drawn => figure(drawn));
  if (!view.started) { fleet.rows.filter(row => row.band).slice(0, 3).forEach(row => view.picked.add(row.id)); fleet.rows.filter(row => row.band && !row.sick).slice(0, 3).forEach(row => view.picked.add(row.id)); view.started = true; }
  overlaid = element("div");
  main.replaceChildren(...present([
    element("header", {class: fleet.tone}, element("p", {class: "run"}, fleet.name), element("h1", {tabindex: -1}, fleet.headline),
      fleet.common.length ? element("p", {class: "soft"}, "In all runs: ", fleet.common.map(one => [element("code", {}, one), " "]).flat()) : null),
    fleet.comparison ? element("section", {}, element("h2", {}, "Before and after"), element("p", {}, fleet.sentence), element("div", {class: "figures"}, figures.map(one => one.made))) : null,
    element("h2", {}, "Runs, the sickest first"), fleetTable(),
    element("p", {class: "soft"}, "slope: decades by which the gradient changes per layer on the way back, at the last recorded step; below 0 it vanishes, above 0 it explodes. clipped: share of the steps.", seeds ? " Runs that differ only in their seed are one row that opens: the median, and below it the range." : null),
    separations(),
    element("h2", {}, "Over each other"), overlaid,
    fleet.troubles.length ? element("section", {}, element("h2", {}, "Not read"), element("ul", {}, fleet.troubles.map(text => element("li", {}, text)))) : null,
  ]));
  const wait = overlay();
  if (figures.length) wait.then(() => drawAll(figures));
}

function show() {
  const wanted = /^#run=(\d+)$/.exec(location.hash);
  if (!fleet) showRun(0);
  else if (wanted && document.getElementById("run-" + wanted[1])) showRun(wanted[1]);
  else showFleet();
}
window.addEventListener("hashchange", show);
show();
})();
