// Asks the server: JSON and server-sent events. The API key lives in this module, and nowhere else.

import { sentence } from "./words.js";

const BROKEN = "The connection broke off before the answer was whole. Look whether the server is still there, and ask again.";

let key = "";

export class Trouble extends Error {
  constructor(sentence, status = 0) {
    super(sentence);
    this.status = status;
  }
}

export function useKey(given) {
  if (!/^[\x21-\x7e]+$/.test(given)) throw new Trouble("An API key has only the letters, digits and signs of ASCII, and no spaces.");
  key = given;
}

export function get(path, signal) {
  return send(path, undefined, signal).then((answer) => answer.json());
}

export function post(path, body, signal) {
  return send(path, body, signal).then((answer) => answer.json());
}

/** Hands every event to `take`, until the answer is whole. */
export async function stream(path, body, signal, take) {
  const answer = await send(path, { ...body, stream: true }, signal);
  const reader = answer.body.getReader(), decoder = new TextDecoder();
  let rest = "", whole = false;
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done && whole) return;
      if (done) throw new Trouble(BROKEN);
      const events = (rest + decoder.decode(value, { stream: true })).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const data = event.replace(/^data: /, "");
        if (data === "[DONE]") whole = true;
        else {
          const found = JSON.parse(data);
          if (found.error) throw new Trouble(sentence(found.error.message));
          take(found);
        }
      }
    }
  } catch (error) {
    reader.cancel().catch(() => {}); // so that the server learns that nobody reads on
    throw known(error, BROKEN);
  }
}

async function send(path, body, signal) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const request = { headers, signal, cache: "no-store", credentials: "omit", redirect: "error" };
  if (body !== undefined) {
    Object.assign(request, { method: "POST", body: JSON.stringify(body) });
    headers["Content-Type"] = "application/json";
  }
  let answer;
  try {
    answer = await fetch(path, request);
  } catch (error) {
    throw known(error, "The server cannot be reached. If it has ended, start it again; your text and your question are still here.");
  }
  if (!answer.ok) throw await told(answer);
  return answer;
}

function known(error, otherwise) {
  return error instanceof Trouble || error.name === "AbortError" ? error : new Trouble(otherwise);
}

async function told(answer) {
  let said;
  try {
    said = (await answer.json()).error.message;
  } catch {
    said = `the server answered with the status ${answer.status}, and without a reason`;
  }
  return new Trouble(sentence(said), answer.status);
}
