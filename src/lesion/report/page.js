"use strict";
// The texts behind the numbers. Everything a model wrote goes through textContent, never through markup.
const data = JSON.parse(document.getElementById("generations").textContent);
const [SITE, DOSE, SEED, PROMPT, TEXT, CORRECT, STOP, TOKENS, LOGPROB] = Array(9).keys();
const at = (id) => document.getElementById(id);
const chosen = { site: 0, seed: 0, prompt: 0 };
const cells = new Map(); // "site dose seed prompt" → rows
for (const row of data.rows) {
  const key = row.slice(SITE, PROMPT + 1).join(" ");
  cells.set(key, [...(cells.get(key) ?? []), row]);
}
const rowsAt = (dose, prompt) => cells.get([chosen.site, dose, chosen.seed, prompt].join(" ")) ?? [];

function make(tag, name, ...children) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  element.append(...children);
  return element;
}

// Control characters, and those that turn the direction of writing, by their number: a text is seen as it is.
const visible = (text) =>
  text.replace(/[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]/g, (c) => {
    return `⟨U+${c.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`;
  });

// Words of `text` and whether each is new: not part of a longest common subsequence with the words of `before`.
function diff(before, text) {
  const a = before.split(/\s+/).filter(Boolean);
  const parts = text.split(/(\s+)/); // words at even places
  const b = parts.filter((part, i) => i % 2 === 0);
  const width = b.length + 1;
  const length = new Uint32Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i--)
    for (let j = b.length - 1; j >= 0; j--)
      length[i * width + j] =
        a[i] === b[j] ? length[(i + 1) * width + j + 1] + 1 : Math.max(length[(i + 1) * width + j], length[i * width + j + 1]);
  const isNew = b.map(() => true);
  for (let i = 0, j = 0; i < a.length && j < b.length; )
    if (a[i] === b[j]) { isNew[j++] = false; i++; }
    else if (length[(i + 1) * width + j] >= length[i * width + j + 1]) i++;
    else j++;
  const runs = []; // neighbours that are alike, with the space between them
  parts.forEach((part, i) => {
    const fresh = i % 2 === 0 ? part !== "" && isNew[i / 2] : isNew[(i - 1) / 2] && isNew[(i + 1) / 2];
    const last = runs.at(-1);
    if (last && last.fresh === fresh) last.text += part;
    else runs.push({ text: part, fresh });
  });
  return runs;
}

const verdict = (row) => (row[CORRECT] === null ? "open" : row[CORRECT] ? "right" : "wrong");
const nameOf = (dose) => (data.doses[dose][0] === 0 ? "undamaged" : data.doses[dose][1]);

function card(dose) {
  const rows = rowsAt(dose, chosen.prompt);
  const title = make("h3", "", nameOf(dose));
  const article = make("article", "", title);
  if (!rows.length) article.append(make("p", "said empty", "not taken"));
  rows.forEach((row, n) => {
    const text = data.texts[row[TEXT]];
    const mark = { right: "✓ right", wrong: "✗ wrong", open: "" }[verdict(row)];
    (n ? article : title).append(make("span", "verdict " + verdict(row), mark));
    const said = make("p", text ? "said" : "said empty");
    said.dir = "auto";
    const before = rowsAt(0, chosen.prompt)[n];
    if (!text) said.append(text === null ? "–" : "(empty text)");
    else if (dose === 0 || !before || data.doses[0][0] !== 0) said.append(visible(text));
    else
      for (const run of diff(data.texts[before[TEXT]] ?? "", text))
        said.append(run.fresh ? make("mark", "", visible(run.text)) : visible(run.text));
    const stop = data.stops[row[STOP]] ?? "–";
    const facts = [`stop: ${stop}`, row[TOKENS] === null ? "" : `${row[TOKENS]} tokens`];
    if (row[LOGPROB] !== null) facts.push(`log p ${row[LOGPROB].toFixed(2).replace("-", "−")}`);
    article.append(said, make("p", stop === "not finite" ? "stop bad" : "stop", facts.filter(Boolean).join(" · ")));
  });
  return article;
}

function showMarks() {
  document.querySelectorAll(".marks").forEach((marks) => {
    const all = data.doses.map((_, dose) => rowsAt(dose, Number(marks.dataset.prompt)).map(verdict));
    marks.replaceChildren(...all.flatMap((found) => (found.length ? found : ["none"]).map((kind) => make("span", "m " + kind))));
  });
}

function show() {
  const [id, group, asked] = data.prompts[chosen.prompt];
  const label = make("small", "", [id, group].filter((x) => x && x !== asked).join(" · "));
  at("asked").replaceChildren(visible(asked ?? id), label);
  at("cards").replaceChildren(...data.doses.map((_, dose) => card(dose)));
}

function radio(name, value, checked, ...children) {
  const input = make("input");
  Object.assign(input, { type: "radio", name, value, checked });
  input.addEventListener("change", () => {
    chosen[name] = value;
    if (name !== "prompt") showMarks();
    show();
  });
  return make("label", "", input, ...children);
}

data.sites.forEach((site, i) => at("sites").append(radio("site", i, i === 0, make("span", "", visible(site)))));
data.seeds.forEach((seed, i) => at("seeds").append(radio("seed", i, i === 0, make("span", "", String(seed)))));
let group;
data.prompts.forEach(([id, of, asked], i) => {
  if (of !== group) at("prompts").append(make("h3", "", visible(of ?? "–")));
  group = of;
  const marks = make("span", "marks");
  marks.dataset.prompt = i;
  marks.ariaHidden = "true";
  const label = radio("prompt", i, i === 0, make("span", "line", make("span", "asked", visible(asked ?? id)), marks));
  label.title = asked ?? id;
  label.dataset.search = `${id} ${of ?? ""} ${asked ?? ""}`.toLowerCase();
  at("prompts").append(label);
});

function search() {
  const words = at("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const labels = [...at("prompts").querySelectorAll("label")];
  for (const label of labels) label.hidden = !words.every((word) => label.dataset.search.includes(word));
  let heading = null; // a group's heading goes with its last prompt
  for (const element of at("prompts").children)
    if (element.tagName === "H3") (heading = element).hidden = true;
    else if (!element.hidden) heading.hidden = false;
  const found = labels.filter((label) => !label.hidden);
  at("count").textContent = words.length ? `${found.length} of ${labels.length} prompts` : `${labels.length} prompts`;
  return found;
}
at("search").addEventListener("input", search);
at("search").addEventListener("keydown", (event) => {
  const first = event.key === "Enter" && search()[0];
  if (first) first.querySelector("input").click();
});

at("prompts").classList.toggle("many", data.doses.length > 8);
search();
showMarks();
show();
at("explorer").hidden = false;
