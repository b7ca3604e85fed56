// SPDX-License-Identifier: Apache-2.0
// The heat map: a table of cosines, of which one pair is in focus.

const detail = document.getElementById("pair");
const table = document.getElementById("map");
const legend = { low: document.getElementById("low"), high: document.getElementById("high") };
const stretch = document.getElementById("stretch");

let shown = { numbers: [], texts: [], similarity: [], full: null };
let cells = []; // [N][N]
let hovered = null; // [row, column]
let focused = null; // likewise
let tell = () => {};

const badge = (number) => element("span", { className: "number" }, String(number));

/**
 * The cosine of each vector with each, of their first components.
 *
 * @param {Float32Array[]} vectors
 * @param {number} dimensions how many components count
 * @returns {number[][]} [N][N]; a vector of zeros gives 0
 */
export function cosines(vectors, dimensions) {
  const dot = (a, b) => {
    let sum = 0;
    for (let i = 0; i < dimensions; i++) sum += a[i] * b[i];
    return sum;
  };
  const lengths = vectors.map((vector) => Math.sqrt(dot(vector, vector)) || 1);
  return vectors.map((a, i) => vectors.map((b, j) => dot(a, b) / (lengths[i] * lengths[j])));
}

/** Each pair of different texts once. */
export function* pairs(count) {
  for (let i = 0; i < count; i++) for (let j = i + 1; j < count; j++) yield [i, j];
}

/** The most similar pair, or null. */
function closest(similarity) {
  let best = null;
  for (const [i, j] of pairs(similarity.length))
    if (!best || similarity[i][j] > similarity[best[0]][best[1]]) best = [i, j];
  return best;
}

/** A cosine as it is written in the map and in sentences. */
export const written = (value, digits = 2) =>
  value.toFixed(digits).replace(/^-(0\.?0*)$/, "$1").replace("-", "−");

/** "1 text", "2 texts". */
export const counted = (count, what) => `${count} ${what}${count === 1 ? "" : "s"}`;

/** What is called with the numbers of the pair in focus, or with none, when it changes. */
export function onPair(callback) {
  tell = callback;
}

/**
 * Shows similarities.
 *
 * @param {{numbers: number[], texts: string[], similarity: number[][], full: number[][] | null}}
 *   given the texts and their numbers; `full`: of whole vectors, where `similarity` is of cut ones
 */
export function show(given) {
  const same = String(given.numbers) === String(shown.numbers);
  shown = given;
  if (!same) build();
  paint();
  changed();
}

function build() {
  hovered = focused = null;
  const count = shown.numbers.length;
  const heads = shown.numbers.map((number) => element("th", { scope: "col" }, String(number)));
  const corner = element("td", {});
  table.replaceChildren(element("thead", {}, element("tr", {}, corner, ...heads)));
  const body = element("tbody", {});
  cells = shown.numbers.map((number, i) => {
    const row = shown.numbers.map((_, j) => {
      const cell = element("td", { tabIndex: i === 0 && j === 1 ? 0 : -1 });
      cell.append(element("span", { className: "value" }), element("small", {}));
      cell.classList.toggle("same", i === j);
      cell.addEventListener("pointerenter", () => changed((hovered = [i, j])));
      cell.addEventListener("focus", () => {
        // One cell of the map is in the order of Tab: the one that was last in focus.
        for (const other of cells.flat()) other.tabIndex = other === cell ? 0 : -1;
        changed((focused = [i, j]));
      });
      cell.addEventListener("blur", () => changed((focused = null)));
      return cell;
    });
    const text = element("span", { className: "text" });
    const head = element("th", { scope: "row" }, badge(number), text);
    body.append(element("tr", {}, head, ...row));
    return row;
  });
  table.append(body);
  table.style.setProperty("--count", String(count));
  table.classList.toggle("many", count > 8);
}

function paint() {
  const { similarity, full, texts } = shown;
  const values = [...pairs(similarity.length)].map(([i, j]) => similarity[i][j]);
  const spread = stretch.checked && values.length > 1;
  const low = spread ? Math.min(...values) : 0;
  const high = spread ? Math.max(...values) : 1;
  legend.low.textContent = spread ? written(low) : "0 or less";
  legend.high.textContent = spread ? written(high) : "1";
  table.querySelectorAll("th .text").forEach((head, i) => (head.textContent = texts[i]));
  cells.forEach((row, i) =>
    row.forEach((cell, j) => {
      const place = (similarity[i][j] - low) / (high - low || 1);
      cell.style.setProperty("--heat", String(Math.min(1, Math.max(0, place))));
      cell.firstChild.textContent = written(similarity[i][j]);
      const change = full && i !== j ? similarity[i][j] - full[i][j] : null;
      cell.lastChild.textContent =
        change === null ? "" : (change >= 0.005 ? "+" : "") + written(change);
    }),
  );
}

function changed() {
  const pair = hovered ?? focused ?? closest(shown.similarity);
  const [row, column] = pair ?? [-1, -1];
  cells.forEach((line, i) =>
    line.forEach((cell, j) => cell.classList.toggle("chosen", i === row && j === column)),
  );
  table.querySelectorAll("thead th").forEach((h, j) => h.classList.toggle("chosen", j === column));
  table.querySelectorAll("tbody th").forEach((h, i) => h.classList.toggle("chosen", i === row));
  tell(pair?.map((place) => shown.numbers[place]) ?? []);
  if (!pair) return detail.replaceChildren();
  const { numbers, texts, similarity, full } = shown;
  const kind = row === column ? "the same text" : hovered || focused ? "" : "the closest pair";
  const whole = full ? `${written(full[row][column], 4)} in all dimensions` : "";
  const value = element("b", {}, written(similarity[row][column], 4));
  const told = ` ${["cosine", kind, whole].filter(Boolean).join(", ")}`;
  const both = [...new Set(pair)].map((place) => {
    const text = element("span", {}, texts[place]);
    return element("p", { className: "text" }, badge(numbers[place]), text);
  });
  detail.replaceChildren(element("p", {}, value, told), ...both);
}

table.addEventListener("pointerleave", () => changed((hovered = null)));
stretch.addEventListener("change", paint);
table.addEventListener("keydown", (event) => {
  if (!focused) return;
  const last = cells.length - 1;
  const [i, j] = focused;
  const move = {
    ArrowUp: [i - 1, j],
    ArrowDown: [i + 1, j],
    ArrowLeft: [i, j - 1],
    ArrowRight: [i, j + 1],
    Home: [event.ctrlKey ? 0 : i, 0],
    End: [event.ctrlKey ? last : i, last],
  }[event.key];
  const next = move && cells[move[0]]?.[move[1]];
  if (!next) return;
  event.preventDefault();
  next.focus();
});

/** An element with properties and children; strings become text, never markup. */
export function element(name, properties, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}
