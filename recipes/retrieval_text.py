"""Synthetic retrieval text: facts hidden in prose, and the questions that ask them back.

Knows templates, words and random numbers. Knows nothing about tokens, lengths or models.

Everything in `HELD_OUT_*` is kept away from training and is used by tests only.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

# What a number can be called. One wording is held out: see HELD_OUT_NAME.
NAMES = (
    "pass key",
    "pass key",
    "pass key",
    "passkey",
    "password",
    "secret number",
    "secret code",
    "access code",
    "code",
    "key",
    "code for the safe",
    "number of the room",
    "number of the ticket",
    "number of the house",
    "key of the vault",
    "hidden number",
    "private code",
    "number of the account",
    "number of the letter",
    "code of the lock",
    "sum in the ledger",
    "number on the card",
    "registration number",
    "page number",
)
HELD_OUT_NAME = "magic number"

STATEMENTS = (
    "The {name} is {value}. Remember it. {value} is the {name}.",
    "The {name} is {value}. Remember it. {value} is the {name}.",
    "The {name} is {value}.",
    "The {name} is {value}. Do not forget it.",
    "Remember that the {name} is {value}.",
    "Here is something important: the {name} is {value}.",
    "{value} is the {name}. Keep it in mind.",
    "Let it be known that the {name} is {value}.",
)
HELD_OUT_STATEMENT = "Please note: the {name} is {value}; you will be asked for it."

QUESTIONS = (
    ("What is the {name}?", " The {name} is {value}."),
    ("What is the {name}?", " The {name} is {value}."),
    ("What is the {name}?\n", "The {name} is {value}."),
    ("What is the {name}?", " {value}."),
    ("Question: What is the {name}?\nAnswer:", " {value}."),
    ("Tell me the {name}.", " The {name} is {value}."),
    ("What is the {name} in the text above?", " The {name} is {value}."),
)
# From the stage of full-length rows on, so that a question is recognised by what it asks, not by its form.
MORE_NAMES = (
    "lucky number", "secret word number", "room number", "ticket number", "number of the ship", "number of the regiment", "number of the prisoner",
    "telephone number", "number of the bank note", "price of the horse", "weight of the cargo", "serial number", "combination", "pin", "number of the carriage",
    "number of the locker", "number on the door", "number in the diary", "special number", "order number", "identification number", "reference number",
)  # fmt: skip
MORE_STATEMENTS = (
    "Please remember this: the {name} is {value}.",
    "Note well, the {name} is {value}; it may be of use later.",
    "By the way, the {name} is {value}.",
    "I was told that the {name} is {value}.",
    "Attention: {value} is the {name}. You will need it.",
    "The {name}, as everybody knows, is {value}.",
    "(The {name} is {value}.)",
    "Write this down: the {name} is {value}.",
)
MORE_QUESTIONS = (
    ("Do you remember the {name}?", " The {name} is {value}."),
    ("Could you say what the {name} is?", " The {name} is {value}."),
    ("Can you remember what the {name} was?", " The {name} is {value}."),
    ("Which number is the {name}?", " The {name} is {value}."),
    ("Please tell me the {name}.", " The {name} is {value}."),
    ("Will you repeat the {name}?", " The {name} is {value}."),
    ("I have forgotten the {name}. What is it?", " The {name} is {value}."),
    ("What was the {name}?", " The {name} is {value}."),
    ("What is the {name}? Answer with the number only.", " {value}."),
    ("Give me the {name}:", " {value}."),
    ("According to the text, what is the {name}?", " The {name} is {value}."),
    ("Could anybody name the {name}?", " The {name} is {value}."),
    ("Can you find the {name}?", " The {name} is {value}."),
    ("What did the text say the {name} is?", " The {name} is {value}."),
)
HELD_OUT_QUESTION = ("Can you tell me the {name}?", " The {name} is {value}.")

LABELS = (
    "red blue green yellow white black grey brown purple orange silver golden amber crimson scarlet violet pink "
    "north south east west upper lower inner outer first second third last left right front back old new little great "
    "iron copper oak pine stone glass paper linen ivory pearl ruby emerald sapphire marble velvet leather wooden brass"
).split()
PEOPLE = (
    "Alice Arthur Bertha Charles Clara Daniel Dora Edward Ellen Emily Felix Frank George Grace Harold Helen Henry Ida "
    "James Jane John Julia Laura Lewis Lucy Martha Mary Nora Oliver Oscar Paul Peter Philip Ralph Robert Rose Ruth Samuel "
    "Sarah Simon Sophia Stephen Susan Thomas Walter William"
).split()
CITIES = (
    "London Paris Rome Vienna Berlin Madrid Dublin Boston Chicago Venice Naples Geneva Athens Cairo Lisbon Moscow Oxford "
    "Bristol Florence Genoa Milan Munich Prague Warsaw Stockholm Copenhagen Edinburgh Glasgow Liverpool Richmond Baltimore"
).split()
OBJECTS = (
    "letter map ring watch book lamp knife coin hat coat picture sword box candle mirror pen bottle rope hammer clock "
    "flag drum violin necklace basket umbrella lantern telescope saddle diary"
).split()
PLACES = (
    "garden kitchen cellar attic library church stable market harbour forest castle tower drawer cupboard chest barn "
    "office schoolroom parlour chapel boat cabin cave well orchard bakery theatre museum station inn"
).split()
ACTIVITIES = (
    "walk along the river",
    "eat fresh bread",
    "sit in the park on a sunny day",
    "listen to the bells",
    "watch the ships",
    "visit the old market",
    "drink a cup of coffee",
    "climb the great tower",
    "hear the music in the square",
    "read in the public library",
    "feed the birds",
    "look at the pictures",
    "buy flowers",
    "dance until midnight",
    "row upon the lake",
    "eat a sandwich and rest under a tree",
)

# (statement, question, answer): the needle sentences. The last test-only form is HELD_OUT_NEEDLE.
NEEDLES = (
    ("{person} keeps the {object} in the {place}.", "Where does {person} keep the {object}?", " {person} keeps the {object} in the {place}."),
    ("{person} hid the {object} in the {place}.", "Where did {person} hide the {object}?", " {person} hid the {object} in the {place}."),
    ("The best thing to do in {city} is to {activity}.", "What is the best thing to do in {city}?", " The best thing to do in {city} is to {activity}."),
    ("{person} was born in {city}.", "Where was {person} born?", " {person} was born in {city}."),
    ("The {object} belongs to {person}.", "Who owns the {object}?", " The {object} belongs to {person}."),
    ("{person} sold the {object} to {person2}.", "To whom did {person} sell the {object}?", " {person} sold the {object} to {person2}."),
)
HELD_OUT_NEEDLE = ("{person} travelled to {city} with the {object}.", "What did {person} take to {city}?", " {person} travelled to {city} with the {object}.")

OPENINGS = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you about the important information there.",
    "Read the text and remember the facts in it.",
)
GRASS = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@dataclass(frozen=True)
class Fact:
    """One statement to hide, and the question whose answer it is. `answer` begins with the separator it needs; `name` is what is asked for."""

    statement: str
    question: str
    answer: str
    name: str = ""


def number(rng: Random, digits: int | None = None) -> str:
    """A number without a leading zero: five digits mostly, else three to seven."""
    n = digits or (5 if rng.random() < 0.65 else rng.choice((3, 4, 6, 7)))
    return str(rng.randrange(10 ** (n - 1), 10**n))


def pass_key(rng: Random, wide: bool = False) -> Fact:
    """`wide` draws from more names and wordings, half of the time for each."""
    more = lambda few, many: rng.choice(many if wide and rng.random() < 0.5 else few)  # noqa: E731
    name, value = more(NAMES, MORE_NAMES), number(rng)
    statement = more(STATEMENTS, MORE_STATEMENTS).format(name=name, value=value)
    question, answer = more(QUESTIONS, MORE_QUESTIONS)
    return Fact(_capital(statement), question.format(name=name), answer.format(name=name, value=value), name)


def labelled_keys(rng: Random, n: int, wide: bool = False) -> list[Fact]:
    """`n` facts that differ in their label only, so that the label must be read."""
    asking, answering = rng.choice(MORE_QUESTIONS) if wide and rng.random() < 0.3 else QUESTIONS[0]
    kind = rng.choice(("key", "code", "number", "pass key", "card"))
    pattern = rng.choice(("The {label} {kind} is {value}.", "The {label} {kind} is {value}. Remember it.", "Note that the {label} {kind} is {value}."))
    facts = []
    for label in rng.sample(LABELS, n):
        value = number(rng)
        filled = pattern.format(label=label, kind=kind, value=value)
        name = f"{label} {kind}"
        facts.append(Fact(filled, asking.format(name=name), answering.format(name=name, value=value), name))
    return facts


def needle(rng: Random) -> Fact:
    words = dict(
        person=rng.choice(PEOPLE),
        person2=rng.choice(PEOPLE),
        city=rng.choice(CITIES),
        object=rng.choice(OBJECTS),
        place=rng.choice(PLACES),
        activity=rng.choice(ACTIVITIES),
    )
    statement, question, answer = (part.format(**words) for part in rng.choice(NEEDLES))
    return Fact(statement, question, answer, question)


def pairs(rng: Random, n: int) -> tuple[str, list[Fact]]:
    """A short list of `n` key-value pairs as one statement, and one fact per pair."""
    keys = rng.sample(LABELS + [p.lower() for p in PEOPLE] + OBJECTS + PLACES, n)
    values = [number(rng, rng.choice((2, 3, 4, 5))) if rng.random() < 0.7 else rng.choice(OBJECTS) for _ in keys]
    join, end = rng.choice(((": ", "\n"), (" = ", "; "), (" is ", ". "), (" - ", ", ")))
    listing = end.join(f"{k}{join}{v}" for k, v in zip(keys, values)) + end.rstrip(" ")
    return listing, [Fact("", f"{k}{join}".rstrip(" "), f" {v}") for k, v in zip(keys, values)]


def pass_key_or_labelled(rng: Random, wide: bool = False) -> list[Fact]:
    """The plainest questions: one pass key, or one of a few labelled keys."""
    return [pass_key(rng, wide)] if rng.random() < 0.6 else labelled_keys(rng, 3, wide)


def facts(rng: Random, n: int, wide: bool = False) -> list[Fact]:
    """About `n` facts of mixed kinds, no two with the same question."""
    found: dict[str, Fact] = {}
    while len(found) < n:
        kind = rng.random()
        if kind < 0.45:
            new = [pass_key(rng, wide)]
        elif kind < 0.75:
            new = labelled_keys(rng, min(max(1, n - len(found)), rng.choice((2, 3, 3, 4))), wide)
        else:
            new = [needle(rng)]
        for fact in new:
            if fact.name not in {other.name for other in found.values()} and fact.question not in found:
                found[fact.question] = fact
    return list(found.values())


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
