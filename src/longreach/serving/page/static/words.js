// Numbers and sentences for people.

const format = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const fine = new Intl.NumberFormat("en", { maximumSignificantDigits: 2 });

export function number(value) {
  return value < 10 && !Number.isInteger(value) ? fine.format(value) : format.format(value);
}

export function counted(count, word) {
  return `${number(count)} ${word}${count === 1 ? "" : "s"}`;
}

export function size(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  for (; bytes >= 1024 && unit < units.length - 1; unit += 1) bytes /= 1024;
  return `${unit === 0 ? bytes : bytes.toFixed(1)} ${units[unit]}`;
}

/** What a program says, as a sentence. */
export function sentence(words) {
  const text = String(words);
  return text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
}

/** Terms and what they are, into a list of definitions. */
export function define(list, pairs) {
  list.replaceChildren(
    ...pairs.map(([term, ...meaning]) => {
      const group = document.createElement("div");
      for (const [kind, parts] of [["dt", [term]], ["dd", meaning]]) {
        const node = document.createElement(kind);
        node.append(...parts);
        group.append(node);
      }
      return group;
    }),
  );
}
