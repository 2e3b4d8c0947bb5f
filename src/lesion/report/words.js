// What is done with a text before it is shown: made visible, compared, searched.

// Control characters, and those that turn the direction of writing, by their number: a text is seen as it is.
const visible = (text) =>
  text.replace(/[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]/g, (c) => {
    return `⟨U+${c.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`;
  });

const LARGEST = 4e6; // cells of the table of a comparison; beyond it nothing is marked, and the page says so

// `text` in runs, each new or not: its words are not part of a longest common subsequence with the words of `before`.
// null: both are too long to be compared.
function diff(before, text) {
  const a = before.split(/\s+/).filter(Boolean);
  const parts = text.split(/(\s+)/); // words at even places
  const b = parts.filter((part, i) => i % 2 === 0);
  let first = 0; // a common beginning needs no table
  while (first < a.length && first < b.length && a[first] === b[first]) first++;
  const width = b.length + 1 - first;
  if ((a.length + 1 - first) * width > LARGEST) return null;
  const length = new Uint32Array((a.length + 1 - first) * width);
  const cell = (i, j) => (i - first) * width + j - first;
  for (let i = a.length - 1; i >= first; i--)
    for (let j = b.length - 1; j >= first; j--)
      length[cell(i, j)] =
        a[i] === b[j] ? length[cell(i + 1, j + 1)] + 1 : Math.max(length[cell(i + 1, j)], length[cell(i, j + 1)]);
  const isNew = b.map((_, j) => j >= first);
  for (let i = first, j = first; i < a.length && j < b.length; )
    if (a[i] === b[j]) { isNew[j++] = false; i++; }
    else if (length[cell(i + 1, j)] >= length[cell(i, j + 1)]) i++;
    else j++;
  const runs = []; // neighbours that are alike, with the space between them
  parts.forEach((part, i) => {
    const now = i % 2 === 0 ? part !== "" && isNew[i / 2] : isNew[(i - 1) / 2] && isNew[(i + 1) / 2];
    const last = runs.at(-1);
    if (last && last.fresh === now) last.text += part;
    else runs.push({ text: part, fresh: now });
  });
  return runs;
}

// A phrase as it was typed, in whatever case and with whatever space between its words; null where nothing was typed.
function pattern(phrase, flags) {
  const words = phrase.split(/\s+/).filter(Boolean).map((word) => word.replace(/[\^$\\.*+?()[\]{}|/]/g, "\\$&"));
  return words.length ? new RegExp(words.join("\\s+"), flags) : null;
}

// The same runs, cut where a phrase begins or ends, each saying whether it is part of the phrase.
function cut(runs, found) {
  if (!found) return runs;
  const spans = [...runs.map((run) => run.text).join("").matchAll(found)].map((hit) => [hit.index, hit.index + hit[0].length]);
  const pieces = [];
  let here = 0;
  for (const run of runs) {
    const end = here + run.text.length;
    const edges = spans.flat().filter((edge) => edge > here && edge < end);
    let from = here;
    for (const to of [...edges, end]) {
      const hit = spans.some(([start, stop]) => start <= from && to <= stop);
      if (to > from) pieces.push({ text: run.text.slice(from - here, to - here), fresh: run.fresh, hit });
      from = to;
    }
    here = end;
  }
  return pieces;
}
