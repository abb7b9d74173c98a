// Questions and answers: what is sent, and how an answer is shown while it comes. Everything is text; nothing ever becomes markup.

import { Trouble, stream } from "./server.js";
import { counted, number } from "./words.js";

const turns = []; // {question, answer}

/** The conversation as the server takes it: the text opens the first question. Without a question: what is known so far. */
export function messages(text, question) {
  const said = [];
  for (const turn of [...turns, ...(question === undefined ? [] : [{ question }])]) {
    said.push({ role: "user", content: turn.question });
    if (turn.answer !== undefined) said.push({ role: "assistant", content: turn.answer });
  }
  if (text && said.length) said[0].content = `${text}\n\n${said[0].content}`;
  else if (text) said.push({ role: "user", content: text });
  return said;
}

export function forget(log) {
  turns.length = 0;
  log.replaceChildren();
}

export function started() {
  return turns.length > 0;
}

/**
 * Ask, and show the answer as it comes -> the usage, or null where it was stopped. What fails raises Trouble, and leaves the conversation as it was.
 *
 * told: {reading(), answering(), rate(tokens per second)}
 */
export async function ask(log, { text, question, most, temperature }, signal, told) {
  const turn = show(log, question);
  const begun = performance.now();
  let first, last, pieces = 0, answer = "", finish = null, usage = null;
  const take = (event) => {
    usage = event.usage ?? usage;
    const choice = event.choices[0];
    finish = choice?.finish_reason ?? finish;
    const piece = choice?.delta.content;
    if (!piece) return;
    last = performance.now();
    pieces += 1;
    if (first === undefined) {
      first = last;
      told.answering();
    } else told.rate((1000 * (pieces - 1)) / (last - first));
    answer += piece;
    const low = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
    turn.text.appendData(turn.text.length ? piece : piece.trimStart()); // what is sent back is `answer`, as it was written
    if (low) log.scrollTop = log.scrollHeight;
  };
  told.reading();
  log.setAttribute("aria-busy", "true"); // the answer is read aloud when it is whole
  const body = { messages: messages(text, question), max_tokens: most, temperature, stream_options: { include_usage: true } };
  try {
    await stream("/v1/chat/completions", body, signal, take);
  } catch (error) {
    if (error.name !== "AbortError") {
      if (!answer) turn.node.remove();
      else turn.say("This answer is not whole, and no part of the conversation.");
      throw error instanceof Trouble ? error : new Trouble(`This page failed: ${error.message}`);
    }
  } finally {
    turn.node.classList.remove("coming");
    log.setAttribute("aria-busy", "false");
  }
  if (answer) turns.push({ question, answer });
  if (finish === null) {
    turn.say(answer ? "Stopped. What was written stays in the conversation." : "Stopped before the first word. The question is forgotten.");
    return null;
  }
  turn.say(cost(usage, finish, first === undefined ? undefined : first - begun, last - first));
  log.scrollTop = log.scrollHeight;
  return usage;
}

function cost(usage, finish, wait, spent) {
  if (usage === null) return "";
  const said = [counted(usage.completion_tokens, "token")];
  if (usage.completion_tokens > 1 && spent > 0) said.push(`${number((1000 * (usage.completion_tokens - 1)) / spent)} tokens/s`);
  if (wait !== undefined) said.push(`first word after ${(wait / 1000).toFixed(1)} s`);
  said.push(`${number(usage.prompt_tokens_details?.cached_tokens ?? 0)} of ${number(usage.prompt_tokens)} tokens were cached`);
  return said.join(" · ") + (finish === "length" ? " · ended at the longest answer" : "");
}

function show(log, question) {
  const node = made("div", "turn coming");
  const text = document.createTextNode("");
  node.append(made("p", "asked", question), made("p", "answer"), made("p", "cost"));
  node.children[1].append(text);
  log.append(node);
  log.scrollTop = log.scrollHeight;
  return { node, text, say: (words) => (node.children[2].textContent = words) };
}

function made(kind, name, words = "") {
  const node = document.createElement(kind);
  node.className = name;
  node.textContent = words;
  return node;
}
