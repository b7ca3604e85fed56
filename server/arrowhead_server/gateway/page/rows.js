// SPDX-License-Identifier: Apache-2.0
// The list of texts: each with its number, its tokens and, where the model has some, its prompt.

import { counted, element } from "./heatmap.js";

const list = document.getElementById("texts");
const note = document.getElementById("note");
const template = document.getElementById("row");
const MOST_TEXTS = 32;
const MOST_TOKENS = 600; // shown of a text
const MOST_UNREAD = 200; // characters shown of what the model does not read
let prompts = {};

/** The rows, in order. */
export const rows = [];

/**
 * One text.
 *
 * Its element fires `edited` while it is typed in, and `changed` when something else of it does.
 */
export class Row {
  constructor(text, prompt = "") {
    this.element = template.content.firstElementChild.cloneNode(true);
    const find = (selector) => this.element.querySelector(selector);
    this.area = find("textarea");
    this.area.value = text;
    this.number = find(".number");
    this.count = find(".count");
    this.truncated = find(".truncated");
    this.tokens = find(".tokens");
    this.choice = find("select");
    this.area.addEventListener("input", () => this.#fire("edited"));
    this.area.addEventListener("keydown", (event) => this.#key(event));
    this.area.addEventListener("paste", (event) => this.#paste(event));
    this.choice.addEventListener("change", () => this.#fire("changed"));
    this.count.addEventListener("click", () => this.#toggle());
    this.bin = find(".remove");
    this.bin.addEventListener("click", () => this.remove());
    this.#offer(prompt);
  }

  /** The text, with U+FFFD for halves of characters, which JSON could not carry. */
  get text() {
    return this.area.value.toWellFormed?.() ?? this.area.value;
  }

  /** The name of the prompt that is put in front; empty: none is named. */
  get prompt() {
    return this.choice.value;
  }

  /** Whether its tokens are to be shown. */
  get open() {
    return this.count.getAttribute("aria-expanded") === "true";
  }

  /** What names this text among others that the model was asked for. */
  get key() {
    return JSON.stringify([this.prompt, this.text]);
  }

  /** Shows what the model said of the text; undefined: nothing yet. */
  tell(said) {
    this.count.hidden = !said;
    this.truncated.hidden = !said?.truncated;
    if (said) this.count.textContent = counted(said.tokens, "token");
    this.tokens.hidden = !this.open || !said?.spans;
    if (!this.tokens.hidden) this.tokens.replaceChildren(...this.#pieces(said.spans));
  }

  /** Takes the text away; the focus goes to a neighbour. */
  remove() {
    const place = rows.indexOf(this);
    rows.splice(place, 1);
    this.element.remove();
    if (!rows.length) insert(0, "");
    number();
    (rows[place] ?? rows.at(-1)).area.focus();
    list.dispatchEvent(new Event("changed"));
  }

  #fire(name) {
    this.element.dispatchEvent(new Event(name, { bubbles: true }));
  }

  #toggle() {
    this.count.setAttribute("aria-expanded", String(!this.open));
    this.#fire("changed");
  }

  #key(event) {
    if (event.isComposing) return;
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      insert(rows.indexOf(this) + 1, "")?.area.focus();
      this.#fire("changed"); // the numbers of those below
    } else if (event.key === "Backspace" && !this.area.value && rows.length > 1) {
      event.preventDefault();
      this.remove();
    }
  }

  #paste(event) {
    const pasted = event.clipboardData.getData("text/plain");
    const [first, ...rest] = pasted.split(/\r?\n/).filter((line) => line.trim());
    if (this.area.value || !rest.length) return;
    event.preventDefault();
    this.area.value = first;
    const place = rows.indexOf(this) + 1;
    rest.every((line, i) => insert(place + i, line));
    this.#fire("changed");
  }

  /** The prompts that there are, and the chosen one again if it still is there. */
  offer() {
    this.#offer(this.prompt);
  }

  #offer(chosen) {
    const names = Object.keys(prompts);
    const options = names.map((name) => new Option(name, name));
    options.forEach((option) => (option.title = prompts[option.value]));
    this.choice.replaceChildren(new Option("default", ""), ...options);
    this.choice.value = names.includes(chosen) ? chosen : "";
    this.choice.parentElement.hidden = !names.length;
  }

  /** The text, with a mark for each token, and what is not read at the end. */
  *#pieces(spans) {
    const characters = Array.from((prompts[this.prompt] ?? "") + this.text);
    let read = 0;
    for (const { id, text, special, start, stop } of spans.slice(0, MOST_TOKENS)) {
      if (!special && start > read) yield characters.slice(read, start).join("");
      // Some tokenizers have several tokens in a character: the first gets it.
      const own = special ? text : characters.slice(Math.max(start, read), stop).join("");
      const className = special ? "special" : "token";
      yield element("span", { className, title: String(id) }, own || "·");
      if (!special) read = Math.max(read, stop);
    }
    if (spans.length > MOST_TOKENS) yield ` … and ${spans.length - MOST_TOKENS} more`;
    else if (!this.truncated.hidden) {
      const rest = characters.slice(read);
      const more = rest.length > MOST_UNREAD ? ` … ${rest.length - MOST_UNREAD} more` : "";
      yield element("s", { title: "not read" }, rest.slice(0, MOST_UNREAD).join("") + more);
    }
  }
}

/**
 * Puts a text at a place, with the prompt of the one before it.
 *
 * @returns {Row | null} null if there are `MOST_TEXTS` already, which is told
 */
export function insert(place, text) {
  note.textContent = rows.length < MOST_TEXTS ? "" : `The map shows ${MOST_TEXTS} texts at most.`;
  if (rows.length >= MOST_TEXTS) return null;
  const row = new Row(text, rows[place - 1]?.prompt);
  list.insertBefore(row.element, rows[place]?.element ?? null);
  rows.splice(place, 0, row);
  number();
  return row;
}

/** Takes all texts away and puts these in their place. */
export function replace(texts) {
  rows.splice(0);
  list.replaceChildren();
  texts.forEach((text, place) => insert(place, text));
}

/** The model's prompts, by name. */
export function know(known) {
  prompts = known;
  for (const row of rows) row.offer();
}

function number() {
  rows.forEach((row, i) => {
    row.number.textContent = String(i + 1);
    row.area.setAttribute("aria-label", `Text ${i + 1}`);
    row.bin.setAttribute("aria-label", `Remove text ${i + 1}`);
    row.choice.setAttribute("aria-label", `Prompt of text ${i + 1}`);
  });
}
