"""Synthetic text whose facts belong together: many values under one kind of name, records, variables that are set to each other.

Knows templates, words and random numbers; like `retrieval_text`, nothing about tokens, lengths or models. Each function returns the facts
to hide, in the order of the text, and the facts that ask; the latter have no statement of their own. The tasks of the evaluation harness ask
for such things in other words than these.
"""

from __future__ import annotations

from random import Random

from retrieval_text import CITIES, KINDS, LABELS, OBJECTS, PEOPLE, PLACES, Fact, capital, number

QUALITIES = ("secret", "hidden", "private", "lucky", "chosen", "true", "important", "strange", "new", "old")
MENTIONED = (" mentioned in the text", " mentioned in the text above", " given in the text", " in the text above", " mentioned above", "")
ENTRIES = (
    "One of the {kinds} for {key} is: {value}.", "One of the {kinds} for {key} is: {value}.", "One of the {kinds} of {key} is {value}.",
    "The {kind} for {key} is: {value}.", "The {kind} of {key} is {value}.", "{key} has the {kind} {value}.",
)  # fmt: skip
# (question, mark around the answer)
RECORD_QUESTIONS = (
    ('Key: "{key}"\nValue:', '"'), ('The key is "{key}". Its value is:', ""), ('What is the value of "{key}"? It is', '"'),
    ('Give the value of the key "{key}".\nThe value:', ""), ('Key: "{key}"\nThe value of the key is:', ""), ('"{key}":', '"'),
)  # fmt: skip
VARIABLE_QUESTIONS = (
    "Which variables have the value {value}?", "Which variables have the value {value}? They are:", "Find all variables with the value {value}.",
    "Question: Name the variables that are equal to {value}. Answer: The variables that are equal to {value} are:",
    "List the variables whose value is {value}. Answer: {n} variables have the value {value}:",
)  # fmt: skip


def identifier(rng: Random) -> str:
    """32 hexadecimal digits in the groups of a UUID, or one group of eight."""
    text = "".join(rng.choices("0123456789abcdef", k=32))
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:])) if rng.random() < 0.5 else text[:8]


def key(rng: Random) -> str:
    kind = rng.random()
    if kind < 0.5:
        return f"{rng.choice(LABELS)}-{rng.choice(OBJECTS + PLACES)}"
    return rng.choice((rng.choice(CITIES).replace("-", " "), rng.choice(PEOPLE), f"the {rng.choice(LABELS)} {rng.choice(OBJECTS + PLACES)}"))


def entries(rng: Random, n: int, asks: str = "") -> tuple[list[Fact], list[Fact]]:
    """`n` sentences that give a value of a key. `asks`: "one" value of a key, its several "values", or those of several "keys"; drawn if empty."""
    asks = asks or rng.choice(("one", "one", "values", "keys"))
    random = rng.random() < 0.25
    names = list(dict.fromkeys(identifier(rng) if random and rng.random() < 0.3 else key(rng) for _ in range(3 * n)))[:n]
    keys = rng.choices(names[: max(1, n // 3)], k=n) if asks == "values" else names
    digits = rng.choice((5, 6, 7, 7, 7, 8, 10))
    values = [identifier(rng) if random else number(rng, digits) for _ in keys]
    kind = " ".join((*rng.sample(QUALITIES, rng.choice((0, 1, 1, 2))), rng.choice(KINDS)))
    form, mentioned = rng.choice(ENTRIES), rng.choice(MENTIONED)
    hidden = [
        Fact(capital(form.format(kind=kind, kinds=f"{kind}s", key=k, value=v)), "", "", f"{k} {i}", random) for i, (k, v) in enumerate(zip(keys, values))
    ]
    if asks == "keys" and len(keys) > 1:
        wanted = rng.sample(keys, rng.randint(2, min(4, len(keys))))
        return hidden, [_question(f"{kind}s", _joined(wanted), mentioned, [values[keys.index(k)] for k in wanted])]
    asked = []
    for name in rng.sample(list(dict.fromkeys(keys)), min(len(set(keys)), rng.randint(1, 3))):
        found = [v for k, v in zip(keys, values) if k == name]
        asked.append(_question(kind if len(found) == 1 else f"{kind}s", name, mentioned, found))
    return hidden, asked


def records(rng: Random, n: int) -> tuple[list[Fact], list[Fact]]:
    """A JSON object of `n` keys and values as one statement, and questions about it."""
    keys = list(dict.fromkeys(identifier(rng) for _ in range(n)))
    values = [identifier(rng) for _ in keys]
    text = "{" + ", ".join(f'"{k}": "{v}"' for k, v in zip(keys, values)) + "}"
    asked = rng.sample(list(zip(keys, values)), min(len(keys), rng.randint(1, 2)))
    form, mark = rng.choice(RECORD_QUESTIONS)
    return [Fact(text, "", "", "records", True)], [Fact("", form.format(key=k), f" {mark}{v}{mark}", k) for k, v in asked]


def variables(rng: Random, n: int) -> tuple[list[Fact], list[Fact]]:
    """`n` assignments in one or two chains that start with a number; which variables have it? All of its chain, in the order of the text."""
    width, word, digits = rng.choice((1, 3, 3, 4, 5)), rng.choice(("VAR", "VAR", "LET", "SET")), rng.choice((2, 4, 5, 5))
    names = list(dict.fromkeys("".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=width)) for _ in range(3 * n)))[:n]
    first = rng.randint(1, len(names))
    chains = [(number(rng, digits), chain) for chain in (names[:first], names[first:]) if chain]
    hidden = [
        [Fact(f"{word} {name} = {f'{word} {chain[i - 1]}' if i else value}", "", "", name, True) for i, name in enumerate(chain)] for value, chain in chains
    ]
    value, chain = rng.choice(chains)
    question = rng.choice(VARIABLE_QUESTIONS).format(value=value, n=len(chain))
    return _merged(rng, hidden), [Fact("", question, " " + " ".join(chain), "variables")]


def listed(rng: Random, n: int) -> tuple[list[Fact], list[Fact]]:
    """At most `n` statements of one of the three kinds, and what is asked about them."""
    kind = rng.random()
    if kind < 0.55:
        return entries(rng, rng.randint(1, n))
    if kind < 0.75:
        return records(rng, rng.randint(1, max(1, n // 2)))
    return variables(rng, rng.randint(1, n))


def _merged(rng: Random, lists: list[list[Fact]]) -> list[Fact]:
    """One list, in which the members of each keep their order."""
    left, merged = [list(facts) for facts in lists], []
    while any(left):
        merged.append(rng.choice([facts for facts in left if facts]).pop(0))
    return merged


def _question(kinds: str, names: str, mentioned: str, values: list[str]) -> Fact:
    asking, verb = ("What is", "is") if len(values) == 1 else ("What are all", "are")
    return Fact("", f"{asking} the {kinds} for {names}{mentioned}? The {kinds} for {names}{mentioned} {verb}", f" {_joined(values)}.", names)


def _joined(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{words[0]} and {words[1]}" if len(words) == 2 else f"{', '.join(words[:-1])}, and {words[-1]}"
