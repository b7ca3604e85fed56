// SPDX-License-Identifier: Apache-2.0
// What the page knows, and how it follows what is typed.

import { Refused, embed, info, tokenize, useKey } from "./gateway.js";
import { cosines, counted, element, onPair, pairs, show, written } from "./heatmap.js";
import { insert, know, replace, rows } from "./rows.js";

const EXAMPLES = [
  "A man is playing a guitar on the street.",
  "Someone performs music outdoors.",
  "The open-air concert was cancelled because of rain.",
  "Heavy rain is expected this evening.",
  "Investors expect a storm on the markets.",
  "The stock market fell sharply today.",
  "Shares dropped on Tuesday.",
];
const PAUSE_MS = 250; // after the last key, before the gateway is asked

const at = (id) => document.getElementById(id);
let facts = null; // `/info`
let stale = false; // whether they may have changed
const said = new Map(); // of each text (`Row.key`): vector, tokens, truncated; spans if asked for
let compared = []; // what the map shows: number, text, vector
let latest = ""; // how long the last call took
let waiting = 0;
let controller = new AbortController();

/** Asks for what is not known of the texts, and shows it. What was asked before is dropped. */
async function update() {
  clearTimeout(waiting);
  controller.abort();
  controller = new AbortController();
  const { signal } = controller;
  at("map").setAttribute("aria-busy", "true");
  try {
    if (!facts || stale) learn(await info(signal));
    // Vectors of another version of the model are not comparable: all are asked for again.
    if ((await ask(signal)) && (await ask(signal)))
      throw new Refused("The model became another one while it was asked, twice.", 0);
    await askForTokens(signal);
    if (signal.aborted) return;
    at("problem").hidden = true;
    stale = false;
    render();
  } catch (error) {
    if (signal.aborted) return;
    if (!(error instanceof Refused)) throw error;
    stale = true;
    at("told").textContent = error.message;
    at("keyform").hidden = ![401, 403].includes(error.status);
    at("problem").hidden = false;
    at("status").textContent = "Not up to date";
    tellTokens();
  }
}

/** Asks for the vectors of new texts; whether the model has become another meanwhile. */
async function ask(signal) {
  const prompts = new Map(); // -> the new texts with it
  for (const row of filled())
    if (!said.has(row.key))
      prompts.set(row.prompt, (prompts.get(row.prompt) ?? new Set()).add(row.text));
  if (!prompts.size) return false;
  const began = performance.now();
  const call = async (prompt, texts) => {
    const answers = await embed(texts, facts.model_id, prompt, signal);
    return texts.map((text, i) => [JSON.stringify([prompt, text]), answers[i]]);
  };
  const calls = [];
  for (const [prompt, texts] of prompts)
    for (const some of parts([...texts], facts.max_client_batch_size))
      calls.push(call(prompt, some));
  const all = Promise.all(calls).then((found) => [found.flat(), performance.now() - began]);
  const [[found, took], now] = await Promise.all([all, info(signal)]);
  const tokens = found.reduce((sum, [, answer]) => sum + answer.tokens, 0);
  latest = `${counted(found.length, "text")}, ${counted(tokens, "token")} in ${took.toFixed(1)} ms`;
  if (learn(now)) return true;
  for (const [key, answer] of found) said.set(key, answer);
  return false;
}

/** Asks where the tokens are, of texts of which it is to be shown. */
async function askForTokens(signal) {
  const open = rows.filter((row) => row.open && said.has(row.key) && !said.get(row.key).spans);
  const asked = open.map(async (row) => {
    const { key, text, prompt } = row;
    [said.get(key).spans] = await tokenize([text], prompt, signal);
  });
  await Promise.all(asked);
}

/** Takes `/info`'s answer; whether it is another than before. */
function learn(now) {
  if (JSON.stringify(now) === JSON.stringify(facts)) return false;
  facts = now;
  said.clear();
  compared = [];
  know(facts.prompts);
  tellFacts();
  const slider = at("dimensions");
  slider.max = String(facts.dimension);
  slider.value = slider.max;
  slider.disabled = false;
  const powers = [];
  for (let power = 8; power < facts.dimension; power *= 2) powers.push(new Option("", power));
  at("powers").replaceChildren(...powers);
  return true;
}

/** Shows all that is known now; forgets what is of no text any more. */
function render() {
  const keys = new Set(rows.map((row) => row.key));
  for (const key of said.keys()) if (!keys.has(key)) said.delete(key);
  tellTokens();
  compared = filled().map((row) => ({
    number: rows.indexOf(row) + 1,
    text: row.text,
    vector: said.get(row.key).vector,
  }));
  compare();
  at("map").removeAttribute("aria-busy");
  at("status").textContent = latest;
  at("compared").hidden = compared.length < 2;
  at("nothing").hidden = compared.length > 1;
}

/** Shows what is known of each text by itself. */
function tellTokens() {
  for (const row of rows) row.tell(said.get(row.key));
}

/** Shows the similarities, in as many dimensions as are chosen. */
function compare() {
  const vectors = compared.map(({ vector }) => vector);
  const whole = facts.dimension;
  const kept = Number(at("dimensions").value);
  const full = cosines(vectors, whole);
  const similarity = kept < whole ? cosines(vectors, kept) : full;
  show({
    numbers: compared.map(({ number }) => number),
    texts: compared.map(({ text }) => text),
    similarity,
    full: kept < whole ? full : null,
  });
  at("kept").textContent = `${kept} of ${whole}`;
  at("dimensions").setAttribute("aria-valuetext", `${kept} of ${whole}`);
  const moves = [...pairs(vectors.length)].map(([i, j]) => Math.abs(similarity[i][j] - full[i][j]));
  const mean = moves.reduce((sum, move) => sum + move, 0) / moves.length;
  at("moved").textContent =
    kept < whole && moves.length
      ? `Against all ${whole}, a similarity moves by ${written(mean)} on average, by ` +
        `${written(Math.max(...moves))} at most.`
      : "Cuts the vectors to their first components, and compares them again.";
}

/** Marks the texts of the pair in focus, by their numbers. */
function mark(numbers) {
  rows.forEach((row, i) => row.element.classList.toggle("chosen", numbers.includes(i + 1)));
}

/** The model, as `/info` tells it. */
function tellFacts() {
  const { certificate } = facts;
  const tiles = {
    Name: [facts.model_id, `version ${facts.model_version}`],
    Vectors: [`${facts.dimension} dimensions`, `${facts.model_type.embedding.pooling} pooling` +
      (facts.normalize ? ", length 1" : "")],
    Reads: [`${facts.max_input_length} tokens`, "of a text, special ones included"],
    Certificate: [certificate.worst_cosine?.toFixed(6) ?? "none",
      `worst cosine with sentence-transformers, of ${certificate.texts ?? 0} texts`],
    Fingerprint: [facts.fingerprint.slice(0, 8), "only vectors of one space compare",
      facts.fingerprint],
    Prompts: [Object.keys(facts.prompts).join(", ") || "none", "that it was trained with"],
  };
  const made = Object.entries(tiles).map(([name, [value, note, title = ""]]) =>
    element("div", {}, element("dt", {}, name),
      element("dd", {}, element("b", { title }, value), element("small", {}, note))));
  at("facts").replaceChildren(...made);
}

/** The list in parts of so many. */
function* parts(list, most) {
  for (let i = 0; i < list.length; i += most) yield list.slice(i, i + most);
}

const filled = () => rows.filter((row) => row.text.trim());

at("texts").addEventListener("edited", () => {
  controller.abort(); // what is under way is of the text before
  at("map").setAttribute("aria-busy", "true");
  clearTimeout(waiting);
  waiting = setTimeout(update, PAUSE_MS);
});
at("texts").addEventListener("changed", update);
at("add").addEventListener("click", () => insert(rows.length, "")?.area.focus());
at("clear").addEventListener("click", () => {
  replace([""]);
  rows[0].area.focus();
  update();
});
at("dimensions").addEventListener("input", compare);
at("again").addEventListener("click", update);
at("keyform").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(at("key").value);
  at("key").value = "";
  update();
});
onPair(mark);
replace(EXAMPLES);
update();
