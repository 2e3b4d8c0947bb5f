// The explorer. Everything a model wrote goes through textContent, never through markup.
const [SITE, DOSE, SEED, PROMPT, TEXT, CORRECT, STOP, TOKENS, LOGPROB] = Array(9).keys();
const intact = data.doses[0][0] === 0; // then dose 0 is the undamaged model's
const damaged = data.doses.map((_, dose) => dose).slice(intact ? 1 : 0);
const narrow = matchMedia("(max-width: 52rem)").matches;
const chosen = { site: 0, seed: 0, prompt: 0, dose: damaged[0] ?? 0, view: narrow || damaged.length > 6 ? "one" : "all" };
const cells = new Map(); // "site dose seed prompt" → rows
const ofText = new Map(); // text → rows; an undamaged text stands once, not once for each site
const sought = { typed: "", pattern: null, hits: [], here: -1, run: 0 };
let shown = 0; // what was asked for last is shown, however long the texts before it took

const rowsAt = (dose, prompt) => cells.get([chosen.site, dose, chosen.seed, prompt].join(" ")) ?? [];
const verdict = (row) => (row[CORRECT] === null ? "open" : row[CORRECT] ? "right" : "wrong");
const nameOf = (dose) => (data.doses[dose][0] === 0 ? "undamaged" : data.doses[dose][1]);

function make(tag, name, ...children) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  element.append(...children);
  return element;
}

function marksOf(dose, prompt) {
  const found = rowsAt(dose, prompt).map(verdict);
  return (found.length ? found : ["none"]).map((kind) => make("span", "m " + kind));
}

function paragraph(text, before) {
  const said = make("p", text ? "said" : "said empty");
  said.dir = "auto";
  if (!text) return [said.append(text === null ? "–" : "(empty text)"), said][1];
  const compared = before === null ? null : diff(visible(before), visible(text));
  for (const piece of cut(compared ?? [{ text: visible(text), fresh: false }], sought.pattern)) {
    const inner = piece.hit ? make("mark", "hit", piece.text) : piece.text;
    said.append(piece.fresh ? make("mark", "new", inner) : inner);
  }
  if (before !== null && !compared) said.append(make("small", "", " Too long to mark what is new."));
  return said;
}

function card(dose, texts) {
  const rows = rowsAt(dose, chosen.prompt);
  const title = make("h3", "", nameOf(dose));
  const article = make("article", "", title);
  article.dataset.dose = dose;
  if (!rows.length) article.append(make("p", "said empty", "not taken"));
  rows.forEach((row, n) => {
    const mark = { right: "✓ right", wrong: "✗ wrong", open: "" }[verdict(row)];
    (n ? article : title).append(make("span", "verdict " + verdict(row), mark));
    const before = dose === 0 || !intact ? undefined : rowsAt(0, chosen.prompt)[n];
    const said = paragraph(texts.get(row[TEXT]), before ? texts.get(before[TEXT]) ?? "" : null);
    const stop = data.stops[row[STOP]] ?? "–";
    const facts = [`stop: ${stop}`, row[TOKENS] === null ? "" : `${row[TOKENS]} tokens`];
    if (row[LOGPROB] !== null) facts.push(`log p ${row[LOGPROB].toFixed(2).replace("-", "−")}`);
    article.append(said, make("p", stop === "not finite" ? "stop bad" : "stop", facts.filter(Boolean).join(" · ")));
  });
  return article;
}

function showMarks() {
  document.querySelectorAll(".marks").forEach((marks) => {
    marks.replaceChildren(...data.doses.flatMap((_, dose) => marksOf(dose, Number(marks.dataset.prompt))));
  });
}

function showSlider() {
  const name = nameOf(chosen.dose);
  const kinds = rowsAt(chosen.dose, chosen.prompt).map(verdict).filter((kind) => kind !== "open");
  at("slider").value = damaged.indexOf(chosen.dose);
  at("slider").ariaValueText = [name, ...kinds].join(", ");
  at("value").textContent = name;
  const every = Math.ceil(damaged.length / (narrow ? 6 : 12));
  const ticks = damaged.map((dose, i) => {
    const label = make("span", "label", i % every ? "" : nameOf(dose));
    return make("span", dose === chosen.dose ? "tick now" : "tick", make("span", "marks-of", ...marksOf(dose, chosen.prompt)), label);
  });
  at("ticks").replaceChildren(...ticks);
}

async function show() {
  const turn = ++shown;
  const [id, group, asked] = data.prompts[chosen.prompt];
  const one = chosen.view === "one" && damaged.length > 0;
  const doses = one ? [...(intact ? [0] : []), chosen.dose] : data.doses.map((_, dose) => dose);
  if (one) showSlider();
  at("dose").hidden = !one;
  const texts = await textsOf(doses.flatMap((dose) => rowsAt(dose, chosen.prompt).map((row) => row[TEXT])));
  if (turn !== shown) return;
  const label = make("small", "", [id, group].filter((x) => x && x !== asked).map(visible).join(" · "));
  at("asked").replaceChildren(visible(asked ?? id), label);
  at("cards").className = one ? "cards pair" : "cards";
  at("cards").replaceChildren(...doses.map((dose) => card(dose, texts)));
}

function radio(name, value, ...children) {
  const input = make("input");
  Object.assign(input, { type: "radio", name, value, checked: chosen[name] === value });
  input.addEventListener("change", () => choose({ [name]: value }));
  return make("label", "", input, ...children);
}

function choose(changes) {
  Object.assign(chosen, changes);
  if ("site" in changes || "seed" in changes) showMarks();
  return show().catch(complain);
}

// Prompts that have all the words, or an answer with the phrase; and how many answers have it.
function showFound(words) {
  const counts = new Map();
  for (const row of sought.hits) counts.set(row[PROMPT], (counts.get(row[PROMPT]) ?? 0) + 1);
  const labels = [...at("prompts").querySelectorAll("label")];
  const named = labels.filter((label) => words.every((word) => label.dataset.search.includes(word)));
  for (const label of labels) {
    const count = counts.get(Number(label.dataset.prompt)) ?? 0;
    label.hidden = !count && !named.includes(label);
    label.querySelector(".found").textContent = count ? `${count} ×` : "";
  }
  let heading = null; // a group's heading goes with its last prompt
  for (const element of at("prompts").children)
    if (element.tagName === "H3") (heading = element).hidden = true;
    else if (!element.hidden) heading.hidden = false;
  return named;
}

function tell(words, named, ended) {
  const found = sought.hits.length;
  const place = sought.here < 0 ? "" : `${sought.here + 1} of `;
  const texts = `${place}${found}${ended ? "" : "…"} ${found === 1 ? "text" : "texts"}`;
  at("count").textContent = words.length ? `${named.length} of ${data.prompts.length} prompts · ${texts}` : `${data.prompts.length} prompts`;
  at("steps").hidden = !found;
}

async function search() {
  const run = ++sought.run;
  const typed = at("search").value;
  const words = typed.toLowerCase().split(/\s+/).filter(Boolean);
  Object.assign(sought, { typed, pattern: pattern(typed, "giu"), hits: [], here: -1, tell: null });
  const report = (ended) => (sought.tell = () => tell(words, named, ended))();
  let named = showFound(words);
  report(!words.length);
  show().catch(complain);
  if (!words.length) return;
  for await (const numbers of finding(pattern(typed, "iu"))) {
    if (run !== sought.run) return; // something else was typed meanwhile
    for (const number of numbers) sought.hits.push(...(ofText.get(number) ?? []));
    if (numbers.length) named = showFound(words);
    report(false);
  }
  report(true);
}

async function jump(by) {
  const count = sought.hits.length;
  if (!count) return;
  sought.here = sought.here < 0 ? (by > 0 ? 0 : count - 1) : (sought.here + by + count) % count;
  const row = sought.hits[sought.here];
  const dose = damaged.includes(row[DOSE]) ? { dose: row[DOSE] } : {};
  for (const [name, place] of [["site", SITE], ["seed", SEED], ["prompt", PROMPT]])
    document.querySelector(`input[name=${name}][value="${row[place]}"]`).checked = true;
  await choose({ site: row[SITE], seed: row[SEED], prompt: row[PROMPT], ...dose });
  sought.tell();
  const label = at("prompts").querySelector("input:checked").closest("label");
  const below = label.offsetTop - at("prompts").scrollTop;
  if (below < 0 || below + label.offsetHeight > at("prompts").clientHeight) at("prompts").scrollTop = label.offsetTop - 40;
  const article = at("cards").querySelector(`[data-dose="${row[DOSE]}"]`);
  article?.classList.add("now");
  article?.querySelector(".hit")?.scrollIntoView({ block: "nearest", inline: "nearest" });
}

// To a text that was found, or else to the first prompt; what was typed a moment ago is searched for first.
async function enter(by) {
  const typed = at("search").value;
  if (typed !== sought.typed) await search();
  if (typed !== sought.typed) return;
  if (sought.hits.length) await jump(by);
  else at("prompts").querySelector("label:not([hidden]) input")?.click();
}

function complain(error) {
  at("problem").textContent = `The texts cannot be shown here (${error.message}). All of them are in tables/generations.csv.`;
  at("problem").hidden = false;
}

function furnish() {
  data.sites.forEach((site, i) => at("sites").append(radio("site", i, make("span", "", visible(site)))));
  data.seeds.forEach((seed, i) => at("seeds").append(radio("seed", i, make("span", "", String(seed)))));
  const word = document.querySelector("label[for=slider]").textContent.toLowerCase();
  const views = [["one", intact ? `one ${word} beside undamaged` : `one ${word}`], ["all", `all ${intact ? `${word}s` : "of them"}`]];
  for (const [view, name] of views) at("views").append(radio("view", view, make("span", "", name)));
  at("views").hidden = damaged.length < 2;
  at("slider").max = damaged.length - 1;
  at("dose").style.setProperty("--n", damaged.length);
  at("slider").addEventListener("input", () => choose({ dose: damaged[Number(at("slider").value)] }));
  let group;
  data.prompts.forEach(([id, of, asked], i) => {
    if (of !== group || i === 0) at("prompts").append(make("h3", "", visible(of ?? "–")));
    group = of;
    const marks = make("span", "marks");
    marks.dataset.prompt = i;
    marks.ariaHidden = "true";
    const line = make("span", "line", make("span", "asked", visible(asked ?? id)), make("span", "found"), marks);
    const label = radio("prompt", i, line);
    label.title = visible(asked ?? id);
    Object.assign(label.dataset, { prompt: i, search: `${id} ${of ?? ""} ${asked ?? ""}`.toLowerCase() });
    at("prompts").append(label);
  });
  at("prompts").classList.toggle("many", data.doses.length > 6);
  let waiting;
  at("search").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => search().catch(complain), 120);
  });
  at("search").addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    event.preventDefault();
    clearTimeout(waiting);
    enter(event.shiftKey ? -1 : 1).catch(complain);
  });
  at("next").addEventListener("click", () => jump(1).catch(complain));
  at("previous").addEventListener("click", () => jump(-1).catch(complain));
}

async function start() {
  const rows = data.rows ?? (await unpack("rows"));
  for (const row of rows) {
    const key = row.slice(SITE, PROMPT + 1).join(" ");
    if (!cells.has(key)) cells.set(key, []);
    cells.get(key).push(row);
  }
  const undamaged = new Set();
  for (const row of rows) {
    const place = row.slice(DOSE, TEXT + 1).join(" ");
    if (intact && row[DOSE] === 0 && undamaged.has(place)) continue;
    undamaged.add(place);
    if (!ofText.has(row[TEXT])) ofText.set(row[TEXT], []);
    ofText.get(row[TEXT]).push(row);
  }
  furnish();
  showMarks();
  await search();
  await show();
  at("explorer").hidden = false;
}

start().catch(complain);
