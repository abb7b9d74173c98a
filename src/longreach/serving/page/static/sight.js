// Pictures: how long the text is beside window and context, what the last token sees of it, and the distances of all.

import { number } from "./words.js";

const SVG = "http://www.w3.org/2000/svg";
const LEVELS = 10;
const LEFT = 56, RIGHT = 4, TOP = 20, STEP = 23, HIGH = 15; // pixels of the ruler

/** What a text of so many tokens is to the model, in words; `over`: it does not fit. */
export function fit(tokens, { window, context }) {
  const limit = context === null ? "no limit is declared" : `the context is ${number(context)}`;
  if (tokens === 0) return { over: false, words: `The model was trained on ${number(window)} tokens; ${limit}.` };
  const trained = `the trained window of ${number(window)}`;
  const own = `${number(tokens)} tokens: ${tokens <= window ? `inside ${trained}` : `${(tokens / window).toFixed(1)} times ${trained}`}`;
  if (context !== null && tokens >= context) {
    const fix = "shorten the text, or start the server with a larger --context";
    return { over: true, words: `${own}. The context of ${number(context)} has no room for it and an answer: ${fix}.` };
  }
  return { over: false, words: context === null ? `${own}.` : `${own}, inside the context of ${number(context)}.` };
}

/** facts: {window, context}; sight: what the last token sees, or null; cached: tokens of the last prompt that had been read before, or null. */
export function ruler(svg, tokens, facts, sight, cached) {
  const width = svg.clientWidth || 480;
  const most = Math.max(facts.context ?? 2 * facts.window, facts.window, tokens);
  const at = (token) => LEFT + ((width - LEFT - RIGHT) * token) / most;
  const band = (row, from, to, name) => node("rect", { x: at(from), y: TOP + row * STEP, width: Math.max(0, at(to) - at(from)), height: HIGH, class: name });
  svg.setAttribute("viewBox", `0 0 ${width} 88`);
  const drawn = [];
  ["text", "seen", "cached"].forEach((name, row) => {
    drawn.push(node("text", { x: 0, y: TOP + row * STEP + 12 }, name), band(row, 0, Math.min(most, facts.context ?? most), "room"));
  });
  if (tokens) {
    const inside = Math.min(tokens, facts.context ?? tokens);
    drawn.push(band(0, 0, inside, "filled"));
    if (tokens > inside) drawn.push(band(0, inside, tokens, "beyond"));
    if (cached) drawn.push(band(2, 0, Math.min(cached, tokens), "kept"));
  }
  if (tokens && sight) {
    const share = sight.tokens / sight.last.length;
    for (const [from, to, name] of runs(sight.last, shade(sight))) drawn.push(band(1, from * share, to * share, name));
  }
  drawn.push(...marks(at, width, facts));
  svg.replaceChildren(...drawn);
}

function marks(at, width, { window, context }) {
  const x = at(window), late = x > width / 2;
  const found = [
    node("line", { x1: x, x2: x, y1: TOP - 4, y2: TOP + 2 * STEP + HIGH + 4, class: "mark" }),
    node("text", { x, y: 11, "text-anchor": late ? "end" : "start" }, `${context === window ? "window and context" : "window"} ${number(window)}`),
  ];
  if (context !== null && context > window && at(context) - x > (late ? 110 : 190)) {
    found.push(node("text", { x: at(context), y: 11, "text-anchor": "end" }, `context ${number(context)}`));
  }
  return found;
}

/** The matrix: a row for a query, a column for keys. */
export function picture(svg, sight) {
  const rows = sight.distances.length, name = shade(sight), drawn = [];
  svg.setAttribute("viewBox", `0 0 ${rows} ${rows}`);
  svg.setAttribute("shape-rendering", "crispEdges");
  sight.distances.forEach((row, y) => {
    for (const [from, to, kind] of runs(row, name)) drawn.push(node("rect", { x: from, y, width: to - from, height: 1, class: kind }));
  });
  svg.replaceChildren(...drawn);
}

/** How much of a budget is taken, as a bar beside the words that say it. */
export function gauge(held, budget) {
  const bar = node("svg", { viewBox: "0 0 48 8", class: "gauge", "aria-hidden": "true" });
  const part = (width, name) => node("rect", { width, height: 8, rx: 2, class: name });
  bar.append(part(48, "unseen"), part(48 * Math.min(1, held / budget), "filled"));
  return bar;
}

/** In words what the picture shows. */
export function said(sight) {
  const { tokens, trained_window: window, capacity } = sight;
  const seen = sight.last.filter((distance) => distance !== null);
  const share = seen.length / sight.last.length;
  const farthest = Math.round(Math.max(...seen));
  const words = [`At ${number(tokens)} tokens the last one sees ${share === 1 ? "all of the text" : `${number(100 * share)} % of the text`}`];
  words[0] += share === 1 || tokens <= sight.last.length ? "." : ", in whole stretches.";
  if (sight.chosen !== null) words.push(`Of these keys it takes at most ${number(sight.chosen)}, chosen by what they say.`);
  words.push(`The farthest key counts as ${number(farthest)} away, ${farthest > window ? "beyond" : "inside"} the trained window of ${number(window)}.`);
  if (sight.rescales) words.push("The rotary frequencies are slowed, which a picture of distances does not show.");
  if (capacity !== null && capacity < tokens) words.push(`With these parameters it reaches ${number(capacity)} tokens, so this text is too long for it.`);
  return words.join(" ");
}

function shade(sight) {
  const limit = sight.rescales ? Infinity : sight.trained_window;
  const all = [...sight.distances.flat(), ...sight.last].filter((distance) => distance !== null);
  const top = Math.min(Math.max(1, ...all), limit);
  return (distance) => {
    if (distance === null) return "unseen";
    return distance > limit ? "beyond" : `s${Math.min(LEVELS - 1, Math.floor((LEVELS * distance) / top))}`;
  };
}

/** [from, to, name] of neighbours with the same name. */
function runs(values, name) {
  const found = [];
  values.forEach((value, place) => {
    const kind = name(value);
    if (found.length && found.at(-1)[2] === kind) found.at(-1)[1] = place + 1;
    else found.push([place, place + 1, kind]);
  });
  return found;
}

function node(kind, attributes, words) {
  const made = document.createElementNS(SVG, kind);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (words !== undefined) made.textContent = words;
  return made;
}
