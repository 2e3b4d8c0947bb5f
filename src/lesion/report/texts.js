"use strict";
// The texts behind the numbers. A small report holds them as they are; a large one in packed blocks (explorer.py), of
// which only those that are asked for are unpacked, and only the last few are kept.
const at = (id) => document.getElementById(id);
const data = JSON.parse(at("generations").textContent);
const starts = data.starts ?? [0, data.texts.length]; // the first text of each block, then the number of texts
const KEPT = 6;
const unpacked = new Map(); // block → a promise of its texts; the one asked for last is the last

async function unpack(id) {
  if (typeof DecompressionStream === "undefined") throw new Error("this browser has no DecompressionStream");
  const code = atob(at(id).textContent);
  const bytes = new Uint8Array(code.length);
  for (let i = 0; i < code.length; i++) bytes[i] = code.charCodeAt(i);
  const plain = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
  return JSON.parse(await new Response(plain).text());
}

const fresh = (block) => (data.starts ? unpack(`block-${block}`) : Promise.resolve(data.texts));

function textsIn(block) {
  const texts = unpacked.get(block) ?? fresh(block);
  unpacked.delete(block);
  unpacked.set(block, texts);
  if (unpacked.size > KEPT) unpacked.delete(unpacked.keys().next().value);
  return texts;
}

// A map from the numbers of texts to the texts.
async function textsOf(numbers) {
  const found = new Map();
  for (const number of numbers) {
    const block = starts.findLastIndex((start) => start <= number);
    found.set(number, (await textsIn(block))[number - starts[block]]);
  }
  return found;
}

// The numbers of the texts that a pattern is found in, block after block. The page can be used in between.
async function* finding(pattern) {
  for (let block = 0; block + 1 < starts.length; block++) {
    const texts = await (unpacked.get(block) ?? fresh(block)); // looking at a block does not push a shown one out
    yield texts.flatMap((text, i) => (text !== null && pattern.test(text) ? [starts[block] + i] : []));
    await new Promise((resume) => setTimeout(resume));
  }
}
