// The text that is asked about: typed, pasted, dropped or opened, and how many tokens it has.

import { post } from "./server.js";

const LARGEST = 64 * 2 ** 20; // bytes: more would stall the page. What the server takes, it says itself
const PAUSE = 350; // milliseconds without a change before tokens are counted

/** The words of a file. Throws an Error, in plain words, for what is no text. */
export async function read(file) {
  if (file.size > LARGEST) throw new Error(`${file.name} is larger than 64 MiB. Cut it first.`);
  const words = new TextDecoder().decode(await file.arrayBuffer());
  if (words.includes("\0")) throw new Error(`${file.name} does not look like a text. A PDF or an office document has to be saved as plain text first.`);
  if (words.includes("\ufffd")) throw new Error(`${file.name} is not in UTF-8. Save it in this encoding first.`);
  return words;
}

/** Counts the tokens of messages a moment after the last call, and tells `found(count)` or `failed(error)`. */
export function counter(found, failed) {
  let timer, running;
  return (messages, at_once = false) => {
    clearTimeout(timer);
    running?.abort();
    if (!messages.length) return found(0);
    running = new AbortController();
    const { signal } = running;
    timer = setTimeout(
      () => post("/tokenize", { messages }, signal).then((answer) => found(answer.count), (error) => error.name === "AbortError" || failed(error)),
      at_once ? 0 : PAUSE,
    );
  };
}

/** Takes files that are dropped anywhere on the page. */
export function takeDrops(area, take) {
  let depth = 0;
  const files = (event) => [...event.dataTransfer.types].includes("Files");
  const marked = (change) => (event) => {
    if (!files(event)) return;
    event.preventDefault();
    depth = Math.max(0, depth + change);
    area.classList.toggle("dragged", depth > 0);
  };
  addEventListener("dragenter", marked(1));
  addEventListener("dragleave", marked(-1));
  addEventListener("dragover", marked(0));
  addEventListener("drop", (event) => {
    if (!files(event)) return;
    event.preventDefault();
    depth = 0;
    area.classList.remove("dragged");
    if (event.dataTransfer.files.length) take(event.dataTransfer.files[0]);
  });
}
