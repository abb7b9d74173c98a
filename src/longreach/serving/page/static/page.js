// The page: what the controls do. Requests are in server.js, conversation in talk.js, pictures in sight.js.

import { Trouble, get, useKey } from "./server.js";
import { fit, gauge, picture, ruler, said } from "./sight.js";
import { ask, forget, messages, started } from "./talk.js";
import { counter, read, takeDrops } from "./text.js";
import { define, number, sentence, size } from "./words.js";

const $ = (id) => document.getElementById(id);
const now = { tokens: 0, facts: null, sight: null, cached: null, stop: null, followed: true, reads: 0 };
const PICTURE_PAUSE = 300, IDLE = 10_000, BUSY = 2_000; // milliseconds

// -- what is said -----------------------------------------------------------------------------------------------------------------

function complain(error) {
  if (error.name === "AbortError") return;
  if (error.status === 401) return wantKey(error);
  $("problem").textContent = error instanceof Trouble ? error.message : `This page failed: ${error.message}`;
  $("problem").hidden = false;
}

function calm() {
  $("problem").hidden = true;
  $("problem").textContent = "";
}

function wantKey(error) {
  const again = !$("key-form").hidden;
  $("key-form").hidden = false;
  $("key-note").textContent = again ? error.message : "It stays in the memory of this page, and goes when you close or reload it.";
  $("key").focus();
}

// -- the model --------------------------------------------------------------------------------------------------------------------

async function begin() {
  const [model] = (await get("/v1/models")).data;
  const { method, context, trained_window: window, dtype } = model.longreach;
  now.facts = { window, context: model.max_model_len };
  document.title = `${model.id} · Longreach`;
  define($("facts"), [
    ["model", model.id],
    ["method", method.method],
    ["window", number(window)],
    ["context", context === null ? "not declared" : number(context)],
    ["weights", dtype],
  ]);
  const { data } = await get("/page/methods");
  const own = data.map(({ name, served }) => new Option(served ? `${name} (served)` : name, served ? "" : name, served, served));
  $("method").replaceChildren(new Option("what the dial chooses", "dial"), ...own);
  measured(now.tokens);
  watch();
}

let watching, seen;
async function watch() {
  clearTimeout(watching);
  if (!document.hidden) {
    try {
      const { running, waiting, read, memory } = await get("/page/state");
      const at = performance.now();
      now.reads = seen && at > seen.at ? (1000 * (read - seen.read)) / (at - seen.at) : 0;
      seen = { read, at };
      const held = ({ bytes, budget }) => (budget === null ? [size(bytes)] : [gauge(bytes, budget), `${size(bytes)} of ${size(budget)}`]);
      define($("state"), [
        ["answering", number(running)],
        ["waiting", number(waiting)],
        ...memory.map((place) => [`memory, ${place.name}`, ...held(place)]),
      ]);
    } catch (error) {
      define($("state"), [["server", error.message]]);
    }
  }
  watching = setTimeout(watch, now.stop ? BUSY : IDLE);
}

// -- the text ---------------------------------------------------------------------------------------------------------------------

const count = counter(measured, (error) => {
  measured(0);
  complain(error);
});

function measured(tokens) {
  now.tokens = tokens;
  if (!now.facts) return;
  const { over, words } = fit(tokens, now.facts);
  $("fit").textContent = words;
  $("fit").classList.toggle("over", over);
  drawRuler();
  if (now.followed) $("length").value = tokens || now.facts.context || 2 * now.facts.window;
  look();
}

function changed() {
  now.cached = null;
  $("empty").hidden = !$("text").value;
  if ($("text").value) $("fit").textContent = "Counting…";
  count(messages($("text").value));
}

async function take(file) {
  try {
    calm();
    put(await read(file));
  } catch (error) {
    complain(new Trouble(error.message));
  }
}

function put(words) {
  $("text").value = words;
  $("text").scrollTop = 0;
  changed();
}

$("text").addEventListener("input", changed);
$("open").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => {
  if ($("file").files.length) take($("file").files[0]);
  $("file").value = "";
});
$("empty").addEventListener("click", () => {
  put("");
  $("text").focus();
});
$("sample").addEventListener("click", async () => {
  try {
    calm();
    const { text, question } = await get("/page/sample");
    put(text);
    $("question").value = question;
    $("question").focus();
  } catch (error) {
    complain(error);
  }
});
takeDrops($("text").closest("section"), take);

// -- questions --------------------------------------------------------------------------------------------------------------------

async function question() {
  const words = $("question").value.trim();
  if (now.stop || !words) return $("question").focus();
  if (!$("most").reportValidity() || !$("temperature").reportValidity()) return;
  calm();
  now.stop = new AbortController();
  busy(true);
  $("question").value = "";
  const begun = performance.now();
  const clock = setInterval(() => {
    const seconds = `${number(Math.floor((performance.now() - begun) / 1000))} s`;
    $("clock").textContent = now.reads > 1 ? `${seconds}, the server reads ${number(Math.round(now.reads))} tokens/s` : seconds;
  }, 1000);
  const told = {
    reading: () => ($("status").textContent = now.tokens ? `Reading ${number(now.tokens)} tokens…` : "Reading…"),
    answering: () => {
      clearInterval(clock);
      $("clock").textContent = "";
      $("status").textContent = "Answering…";
    },
    rate: (value) => ($("clock").textContent = `${number(value)} tokens/s`),
  };
  const given = { text: $("text").value, question: words, most: $("most").valueAsNumber, temperature: $("temperature").valueAsNumber };
  try {
    const usage = await ask($("talk"), given, now.stop.signal, told);
    $("status").textContent = usage ? "Answered." : "Stopped.";
    if (usage) {
      now.cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
      measured(usage.total_tokens);
    } else count(messages($("text").value), true);
  } catch (error) {
    $("status").textContent = "";
    if (!$("question").value) $("question").value = words;
    complain(error);
  } finally {
    clearInterval(clock);
    $("clock").textContent = "";
    now.stop = null;
    busy(false);
    setTimeout(watch, IDLE / 20); // when the server has seen it end
  }
}

function busy(is) {
  if (!is && document.activeElement === $("stop")) $("question").focus();
  $("stop").hidden = !is;
  $("ask").setAttribute("aria-disabled", String(is));
  $("forget").hidden = is || !started();
  if (is) watch();
}

$("ask-form").addEventListener("submit", (event) => {
  event.preventDefault();
  question();
});
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    question();
  }
});
$("stop").addEventListener("click", () => now.stop?.abort());
addEventListener("keydown", (event) => event.key === "Escape" && now.stop?.abort());
$("forget").addEventListener("click", () => {
  forget($("talk"));
  calm();
  $("status").textContent = "The conversation is forgotten; the text is kept.";
  $("forget").hidden = true;
  changed();
  $("question").focus();
});
$("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  try {
    useKey($("key").value);
    await begin();
    $("key").value = "";
    $("key-form").hidden = true;
    calm();
    if ($("text").value) changed();
    $("text").focus();
  } catch (error) {
    complain(error);
  }
});

// -- what the method sees ---------------------------------------------------------------------------------------------------------

const sights = new Map();

function sight(method, tokens) {
  const path = `/page/sight?tokens=${tokens}${method ? `&method=${encodeURIComponent(method)}` : ""}`;
  if (!sights.has(path)) {
    if (sights.size > 50) sights.clear();
    sights.set(path, get(path).catch((error) => {
      sights.delete(path);
      throw error;
    }));
  }
  return sights.get(path);
}

function drawRuler() {
  ruler($("ruler"), now.tokens, now.facts, now.sight?.tokens === now.tokens ? now.sight : null, now.cached);
}

let looking;
function look() {
  clearTimeout(looking);
  looking = setTimeout(async () => {
    const { tokens } = now;
    try {
      await drawSight();
      if (tokens) now.sight = (await sight("", tokens)).sight;
      if (tokens === now.tokens) drawRuler();
    } catch (error) {
      complain(error);
    }
  }, PICTURE_PAUSE);
}

async function drawSight() {
  const method = $("method").value;
  if (!$("length").checkValidity() || !$("length").value) {
    $("sight-said").textContent = "A length is a whole number of tokens from 1 on.";
    return;
  }
  const tokens = $("length").valueAsNumber;
  const { sight: found, problem } = await sight(method, tokens);
  if (method !== $("method").value || tokens !== $("length").valueAsNumber) return;
  $("serve-it").hidden = $("recalls").hidden = found === null;
  if (problem !== null) $("sight-said").textContent = sentence(problem);
  if (found === null) return $("picture").replaceChildren();
  picture($("picture"), found);
  $("sight-said").textContent = said(found);
  $("recalls").textContent = `${found.brief}: ${found.recalls}.`;
  $("command").replaceChildren(...found.command.split(/ (?=--)/).flatMap((option) => [part(option), " "]));
  $("serve-note").textContent = found.served
    ? "This is the method that answers here. What serves it:"
    : "A server has one method for its whole life, so this one does not answer here. To ask it, end this server and start:";
}

/** An option of a command, which stays on one line where it can. */
function part(words) {
  return Object.assign(document.createElement("span"), { textContent: words });
}

$("method").addEventListener("change", look);
$("length").addEventListener("input", () => {
  now.followed = false;
  look();
});
$("copy").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText($("command").textContent.trim());
    $("copy").textContent = "Copied";
    setTimeout(() => ($("copy").textContent = "Copy"), 2000);
  } catch {
    getSelection().selectAllChildren($("command")); // a browser that does not let pages copy
  }
});

new ResizeObserver(() => now.facts && drawRuler()).observe($("ruler"));
document.addEventListener("visibilitychange", () => !document.hidden && now.facts && watch());
begin().catch(complain);
