// SPDX-License-Identifier: Apache-2.0
// The gateway's routes, as this page asks them.

/** A call that the gateway refused, or that did not reach it; the message is for people. */
export class Refused extends Error {
  /** @param {string} message  @param {number} status of the answer; 0 if there was none */
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

let key = ""; // here and nowhere else

/** The API key of all calls from now on; empty: none. */
export function useKey(given) {
  key = given;
}

/** What the model says of itself (`/info`). */
export const info = (signal) => call("info", undefined, signal);

/**
 * The vector of each text, the tokens read of it, and whether it has more.
 *
 * @returns {Promise<{vector: Float32Array, tokens: number, truncated: boolean}[]>}
 */
export async function embed(texts, model, prompt, signal) {
  const wish = { model, input: texts, encoding_format: "base64", truncate: "end" };
  const answer = await call("v1/embeddings", { ...wish, ...named(prompt) }, signal);
  return answer.data.map(({ embedding, tokens, truncated }) => ({
    vector: floats(embedding),
    tokens,
    truncated,
  }));
}

/** The tokens of each text: `{id, text, special, start, stop}`, in characters (`/tokenize`). */
export const tokenize = (texts, prompt, signal) =>
  call("tokenize", { inputs: texts, truncate: true, ...named(prompt) }, signal);

const named = (prompt) => (prompt ? { prompt_name: prompt } : {});

async function call(path, body, signal) {
  const headers = {};
  if (body) headers["Content-Type"] = "application/json";
  if (key) headers.Authorization = `Bearer ${key}`;
  const wish = { method: body ? "POST" : "GET", headers, body: JSON.stringify(body), signal };
  let response, text;
  try {
    response = await fetch(path, wish);
    text = await response.text();
  } catch (error) {
    if (signal.aborted) throw error;
    throw new Refused(`The gateway at ${location.host} does not answer. Is it running?`, 0);
  }
  let answer;
  try {
    answer = JSON.parse(text);
  } catch {
    // No JSON: not from the gateway itself, but perhaps from a proxy in front of it.
  }
  if (response.ok && answer !== undefined) return answer;
  throw new Refused(told(answer) ?? `${response.status} ${response.statusText}`, response.status);
}

/** An error body's message: OpenAI's dialect nests it, text-embeddings-inference's does not. */
const told = (answer) => answer?.error?.message ?? answer?.error;

/** float32, lowest byte first, out of base64. */
function floats(encoded) {
  const bytes = Uint8Array.from(atob(encoded), (character) => character.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  return Float32Array.from({ length: bytes.length / 4 }, (_, i) => view.getFloat32(4 * i, true));
}
