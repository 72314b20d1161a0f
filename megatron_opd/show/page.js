"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const MISSING = -32768, SHOWN_DIGITS = 2, LARGE = data.levels[2];
const NARROW = matchMedia("(max-width: 46rem)");  // where the rollout stands below the list
const $ = (id) => document.getElementById(id);

function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function bytes(text) {
  const raw = atob(text), found = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) found[i] = raw.charCodeAt(i);
  return found.buffer;
}

function numbers(text) { return data.wide ? new Uint32Array(bytes(text)) : new Uint16Array(bytes(text)); }

function nats(text) {  // NaN where there is none
  return Float32Array.from(new Int16Array(bytes(text)), (value) => value === MISSING ? NaN : value * data.step);
}

function levelClass(gap) {
  if (!(Math.abs(gap) >= data.levels[0])) return "";
  let step = 0;
  while (step < data.levels.length && Math.abs(gap) >= data.levels[step]) step++;
  return (gap < 0 ? "l" : "m") + step;
}

function shown(value, digits = SHOWN_DIGITS, signed = false) {
  if (Number.isNaN(value)) return "not known";
  const text = Math.abs(value).toFixed(digits);
  return (value < 0 ? "\u2212" : signed ? "+" : "") + text + (Math.abs(value) >= 32.767 ? " or beyond" : "");
}

function share(logp) {
  const value = Math.exp(logp) * 100;
  return Number.isNaN(value) ? "" : (value >= 0.1 || value < 5e-7 ? value.toFixed(1) : value.toFixed(1 - Math.floor(Math.log10(value)))) + " %";
}

// Text of a token in running text: a line's end is shown and made, other blanks stay as they are.
function fill(node, text) {
  const lines = text.split("\n");
  lines.forEach((line, at) => {
    if (at) { node.append(make("span", "nl", "\u23ce"), "\n"); }
    const tabs = line.split("\t");
    tabs.forEach((part, column) => {
      if (column) node.append(make("span", "nl", "\u21e5"), "\t");
      if (part) node.append(part);
    });
  });
}

function quoted(text, kind) { return kind === "text" ? "\u201c" + text.replace(/\n/g, "\u23ce").replace(/\t/g, "\u21e5") + "\u201d" : text; }

// The list: filtered and sorted.
const FILTERS = [
  ["all", "all", () => true],
  ["wrong", "wrong", (r) => r.outcome !== null && r.outcome !== "right"],
  ["right", "right", (r) => r.outcome === "right"],
  ["unfinished", "unfinished", (r) => r.index !== null && !r.finished],
  ["excluded", "excluded", (r) => r.excluded !== null],
];
const OUTCOMES = ["wrong", "no_answer", "unclosed", "cut", "timeout", "error", "partial", "right", null];
const SORTS = [
  ["order", "order given", (a, b) => a.at - b.at],
  ["disagreement", "disagreement", (a, b) => b.disagreement - a.disagreement],
  ["length", "length", (a, b) => b.length - a.length],
  ["verdict", "verdict", (a, b) => OUTCOMES.indexOf(a.outcome) - OUTCOMES.indexOf(b.outcome)],
];
const COLOURS = [
  ["teacher", "teacher \u2212 sampler", "log \u03c0_T \u2212 log \u03c0_ref", (d, t) => d.teacher[t] - d.ref[t]],
  ["left", "teacher \u2212 student now", "log \u03c0_T \u2212 log \u03c0_student", (d, t) => d.teacher[t] - d.now[t]],
  ["learnt", "student now \u2212 sampler", "log \u03c0_student \u2212 log \u03c0_ref", (d, t) => d.now[t] - d.ref[t]],
].slice(0, data.student ? 3 : 1);
data.rollouts.forEach((rollout, at) => { rollout.at = at; });
let visible = [], current = null, decoded = null, activeToken = 0;

function options(select, rows) { for (const [value, label] of rows) { const o = make("option", "", label); o.value = value; select.append(o); } }

function textOf(rollout) {
  if (rollout.text === undefined) rollout.text = Array.from(numbers(rollout.tokens), (n) => data.pieces[n][0]).join("");
  return rollout.text;
}

function chosen(rows, select) { return rows.find((row) => row[0] === select.value); }

function update() {
  const keep = chosen(FILTERS, $("only"))[2], order = chosen(SORTS, $("sort"))[2], needle = $("search").value;
  visible = data.rollouts.filter((r) => keep(r) && (!needle || textOf(r).includes(needle))).sort((a, b) => order(a, b) || a.at - b.at);
  $("count").textContent = `${visible.length} of ${data.rollouts.length} rollouts`;
  $("list").replaceChildren(...visible.map(row));
  open(visible.includes(current) ? current : visible[0] ?? null);
}

function row(rollout) {
  const node = make("li"), top = make("span", "", `prompt ${rollout.name[0]}, sample ${rollout.name[1]}`), below = make("span", "soft");
  node.id = `rollout-${rollout.at}`;
  node.setAttribute("role", "option");
  if (rollout.outcome !== null) top.append(" ", make("span", "outcome", rollout.outcome.replace("_", " ")));
  below.textContent = `${rollout.length} tokens` + (rollout.excluded !== null ? ", excluded" : rollout.finished ? "" : ", unfinished");
  node.append(top, make("span", "end", rollout.disagreement ? `${rollout.disagreement.toFixed(1)} nat` : ""), below);
  const worst = make("span", "end soft");
  if (rollout.worst) worst.append(make("span", "t " + levelClass(rollout.worst[1]), rollout.worst[0].slice(0, 12)), ` ${shown(rollout.worst[1], 1, true)}`);
  node.append(worst);
  node.addEventListener("click", () => { open(rollout); if (NARROW.matches) $("title").scrollIntoView(); });
  return node;
}

function open(rollout) {
  const before = current && $(`rollout-${current.at}`);
  if (before) before.setAttribute("aria-selected", "false");
  current = rollout;
  if (!rollout) {
    for (const id of ["title", "about", "prompt", "response", "token"]) $(id).replaceChildren();
    $("title").textContent = "No rollout is what was asked for";
    return;
  }
  const item = $(`rollout-${rollout.at}`);
  item.setAttribute("aria-selected", "true");
  $("list").setAttribute("aria-activedescendant", item.id);
  const list = $("list"), top = item.offsetTop - list.offsetTop;
  if (top < list.scrollTop) list.scrollTop = top;
  else if (top + item.offsetHeight > list.scrollTop + list.clientHeight) list.scrollTop = top + item.offsetHeight - list.clientHeight;
  decoded = {
    tokens: numbers(rollout.tokens), ref: nats(rollout.ref), teacher: nats(rollout.teacher), now: nats(rollout.now),
    candidates: numbers(rollout.candidates), candidateLogp: nats(rollout.candidate_logp),
  };
  $("title").textContent = `Prompt ${rollout.name[0]}, sample ${rollout.name[1]}` + (rollout.verdict ? `, ${rollout.verdict}` : "");
  $("about").textContent = [`${rollout.length} tokens, ${rollout.ending}`, rollout.figures, rollout.reason].filter(Boolean).join("; ");
  draw();
}

function token(number) {
  const [text, kind] = data.pieces[number], node = make("span", kind === "text" ? "t" : `t ${kind}`);
  fill(node, text);
  return node;
}

function draw() {
  const gapOf = chosen(COLOURS, $("colour"))[3], start = current.start;
  decoded.gap = Float32Array.from(decoded.ref, (_, t) => gapOf(decoded, t));
  decoded.worst = Array.from(decoded.gap.keys()).filter((t) => Math.abs(decoded.gap[t]) >= LARGE)
    .sort((a, b) => Math.abs(decoded.gap[b]) - Math.abs(decoded.gap[a]));
  $("prompt").replaceChildren(...Array.from(decoded.tokens.subarray(0, start), token));
  const nodes = Array.from(decoded.tokens.subarray(start), (number, t) => {
    const node = token(number), step = levelClass(decoded.gap[t]);
    if (step) node.classList.add(step);
    node.tabIndex = -1;
    node.dataset.t = t;
    return node;
  });
  $("response").replaceChildren(...nodes);
  $("response").scrollTop = 0;
  $("shown").scrollTop = 0;
  const first = decoded.worst.length ? decoded.worst[0] : 0;
  if (nodes.length) { activate(first); } else { $("token").replaceChildren(); }
}

function activate(t) {
  const nodes = $("response").children;
  if (nodes[activeToken]) nodes[activeToken].tabIndex = -1;
  activeToken = t;
  nodes[t].tabIndex = 0;
  describe(t);
}

function describe(t) {
  const [text, kind, id] = data.pieces[decoded.tokens[current.start + t]], name = make("div"), values = make("table");
  name.append(make("div", "name", quoted(text, kind)), make("div", "soft", `id ${id}, token ${t} of ${current.length}`));
  const rows = [["log \u03c0_ref (sampler)", decoded.ref[t]], ["log \u03c0_T (teacher)", decoded.teacher[t]]];
  if (data.student) rows.push(["log \u03c0_student (now)", decoded.now[t]]);
  for (const [label, value] of rows) line(values, [label, shown(value), share(value)]);
  for (const [, , label, gapOf] of COLOURS) line(values, [label, shown(gapOf(decoded, t), SHOWN_DIGITS, true), "nat"]);
  $("token").replaceChildren(name, values);
  if (!current.k) return;
  const list = make("table", "cand");
  for (let k = 0; k < current.k; k++) {
    const logp = decoded.candidateLogp[t * current.k + k], [text, kind] = data.pieces[decoded.candidates[t * current.k + k]];
    if (!Number.isNaN(logp)) line(list, [quoted(text, kind), shown(logp), share(logp)]);
  }
  const box = make("div");
  box.append(make("div", "soft", "the teacher's candidates"), list);
  $("token").append(box);
}

function line(table, cells) {
  const node = make("tr");
  for (const cell of cells) node.append(make("td", "", cell));
  table.append(node);
}

// Keyboard and pointer.
function step(by) {
  const at = visible.indexOf(current) + by;
  if (visible[at]) open(visible[at]);
}

function focusToken(t) {
  const node = $("response").children[t];
  if (!node) return;
  activate(t);
  node.focus({ preventScroll: true });
  node.scrollIntoView({ block: "center" });
}

const tokenAt = (event) => event.target.closest?.("#response > .t");
$("response").addEventListener("pointerover", (event) => { const node = tokenAt(event); if (node) describe(Number(node.dataset.t)); });
$("response").addEventListener("pointerleave", () => { if (current?.length) describe(activeToken); });
$("response").addEventListener("click", (event) => { const node = tokenAt(event); if (node) activate(Number(node.dataset.t)); });
$("response").addEventListener("focusin", (event) => { const node = tokenAt(event); if (node) activate(Number(node.dataset.t)); });
let worstAt = 0;
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select, summary")) return;
  const inList = document.activeElement === $("list"), inTokens = tokenAt(event);
  const last = current ? current.length - 1 : 0;
  const actions = { j: () => step(1), k: () => step(-1), w: () => nextWorst() };
  if (inList) Object.assign(actions, {
    ArrowDown: () => step(1), ArrowUp: () => step(-1), Home: () => step(-visible.indexOf(current)), Enter: () => focusToken(activeToken),
    End: () => step(visible.length - 1 - visible.indexOf(current)),
  });
  if (inTokens) Object.assign(actions, {
    ArrowRight: () => focusToken(activeToken + 1), ArrowLeft: () => focusToken(activeToken - 1),
    Home: () => focusToken(0), End: () => focusToken(last), Escape: () => $("list").focus(),
    ArrowDown: () => focusToken(beside(1)), ArrowUp: () => focusToken(beside(-1)),
  });
  if (actions[event.key]) { event.preventDefault(); actions[event.key](); }
});

function nextWorst() {
  if (!decoded?.worst.length) return;
  const focused = document.activeElement?.closest?.("#response > .t");
  worstAt = focused ? (decoded.worst.indexOf(activeToken) + 1) % decoded.worst.length : 0;
  focusToken(decoded.worst[worstAt]);
}

// The token of the line below or above that is nearest to the active one.
function beside(direction) {
  const nodes = $("response").children, here = nodes[activeToken].getBoundingClientRect(), x = here.left;
  let line = null, best = activeToken;
  for (let t = activeToken + direction; nodes[t]; t += direction) {
    const box = nodes[t].getBoundingClientRect();
    if (Math.abs(box.top - here.top) < 3) continue;
    line ??= box.top;
    if (Math.abs(box.top - line) >= 3) break;
    if (best === activeToken || Math.abs(box.left - x) < Math.abs(nodes[best].getBoundingClientRect().left - x)) best = t;
  }
  return best;
}

function start() {
  const facts = Object.fromEntries(data.facts);
  document.title = `Rollouts of ${facts.store}`;
  $("facts").querySelector("summary").textContent = facts.store.split("/").slice(-3).join("/");
  for (const [name, text] of data.facts) $("facts").querySelector("dl").append(make("dt", "", name), make("dd", "", text));
  options($("only"), FILTERS.filter(([name, , keep]) => name === "all" || data.rollouts.some(keep)));
  options($("sort"), SORTS.filter(([name]) => name !== "verdict" || data.rollouts.some((r) => r.outcome !== null)));
  options($("colour"), COLOURS);
  $("colour").parentElement.hidden = COLOURS.length === 1;
  const last = data.levels.length - 1;
  const less = data.levels.map((value, at) => make("span", `t l${at + 1}`, (at === last ? "\u2265 " : "") + value)).reverse();
  const more = data.levels.map((value, at) => make("span", `t m${at + 1}`, (at === last ? "\u2265 " : "") + value));
  const what = make("span", "", COLOURS[0][2] + ", nat");
  $("legend").append(make("span", "", "less likely"), ...less, what, ...more, make("span", "", "more likely"));
  $("colour").addEventListener("change", () => { what.textContent = chosen(COLOURS, $("colour"))[2] + ", nat"; if (current) draw(); });
  for (const id of ["only", "sort"]) $(id).addEventListener("change", update);
  let timer = 0;
  $("search").addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(update, 150); });
  update();
}

start();
