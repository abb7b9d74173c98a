"""Synthetic retrieval text: facts to hide in prose, and the questions that ask them back.

Knows templates, words and random numbers. Knows nothing about tokens, lengths or models.

A question form decides the form of its answer, so that the right answer is one string. Names are put together from two lists
and questions from many, so that a reader has to copy the name and to follow the question instead of knowing them by heart.
Everything in `HELD_OUT_*` is kept away from training and serves tests only.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

COMMON_NAMES = (
    "pass key", "pass key", "pass key", "passkey", "password", "secret number", "secret code", "access code", "special number",
    "code for the safe", "key of the vault", "number of the room", "pin", "passcode", "lucky number", "registration number", "page number",
)  # fmt: skip
LABELS = (
    "red blue green yellow white black grey brown purple orange silver golden amber crimson scarlet violet pink "
    "north south east west upper lower inner outer first second third last left right front back old new little great "
    "iron copper oak pine stone glass paper linen ivory pearl ruby emerald sapphire marble velvet leather wooden brass "
    "secret hidden private special lucky final main true general royal public winter summer morning evening holy English French"
).split()
KINDS = (
    "key", "code", "number", "pass key", "card", "ticket", "pin", "password", "passcode", "account", "price", "sum", "bill", "mark",
    "figure", "total", "score", "combination", "page", "count", "debt", "licence",
)  # fmt: skip
PEOPLE = (
    "Alice Arthur Bertha Charles Clara Daniel Dora Edward Ellen Emily Felix Frank George Grace Harold Helen Henry Ida "
    "James Jane John Julia Laura Lewis Lucy Martha Mary Nora Oliver Oscar Paul Peter Philip Ralph Robert Rose Ruth Samuel "
    "Sarah Simon Sophia Stephen Susan Thomas Walter William"
).split()
CITIES = (
    "London Paris Rome Vienna Berlin Madrid Dublin Boston Chicago Venice Naples Geneva Athens Cairo Lisbon Moscow Oxford Bristol "
    "Florence Genoa Milan Munich Prague Warsaw Stockholm Copenhagen Edinburgh Glasgow Liverpool Richmond Baltimore San-Francisco New-York"
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
    "walk along the river", "eat fresh bread", "sit in the park on a sunny day", "listen to the bells", "watch the ships",
    "drink a cup of coffee", "climb the great tower", "hear the music in the square", "feed the birds", "look at the pictures",
    "buy flowers", "dance until midnight", "row upon the lake", "eat a sandwich and rest under a tree", "take the {object} to the {place}",
    "see the old {place} and the {place2}", "buy a {label} {object}", "draw the {label} {place}", "look for a {object} in the {place}",
)  # fmt: skip
HELD_OUT_NAME = "magic number"

STATEMENTS = (
    "The {name} is {value}. Remember it. {value} is the {name}.",
    "The {name} is {value}. Remember it. {value} is the {name}.",
    "The {name} is {value}. Remember it. {value} is the {name}.",
    "The {name} is {value}.",
    "The {name} is {value}.",
    "The {name} is {value}. Do not forget it.",
    "The {name} is {value}. Keep it in mind.",
    "Remember that the {name} is {value}.",
    "Please remember this: the {name} is {value}.",
    "Here is something important: the {name} is {value}.",
    "Let it be known that the {name} is {value}.",
    "Note well, the {name} is {value}; it may be of use later.",
    "By the way, the {name} is {value}.",
    "I was told that the {name} is {value}.",
    "The {name}, as everybody knows, is {value}.",
    "(The {name} is {value}.)",
    "Write this down: the {name} is {value}.",
    "{value} is the {name}.",
    "Attention: {value} is the {name}. You will need it.",
)
# The value before its name: at the value nothing tells yet whose it is, so that the name has to be found first and the value behind it.
VALUE_FIRST = (
    "{value} is the {name}.", "{value} is the {name}.", "Attention: {value} is the {name}. You will need it.", "Of all numbers {value} is the {name}.",
    "I was told that {value} is the {name}.", "Remember that {value} is the {name}.", "{value} was chosen as the {name}.",
)  # fmt: skip
HELD_OUT_STATEMENT = "Please note: the {name} is {value}; you will be asked for it."

STANDARD_QUESTION = "What is the {name}?"
SENTENCE, VALUE = " The {name} is {value}.", " {value}."
LEADS = ("", "", "", "", "", "Now, ", "Question: ", "Well, ", "Then ", "And ", "Tell me, ", "Q: ")
ASKING = (
    "what is the {name}?", "what was the {name}?", "what is the {name} in the text above?", "what is the {name} mentioned in the text?",
    "what is the {name} that was given above?", "what did the text say the {name} is?", "according to the text, what is the {name}?",
    "do you remember the {name}?", "do you know the {name}?", "do you recall what the {name} is?", "could you say what the {name} is?",
    "can you remember what the {name} was?", "can you find the {name}?", "can you repeat the {name}?", "can you name the {name}?",
    "could you give me the {name}?", "could anybody name the {name}?", "will you repeat the {name}?", "would you tell us the {name}?",
    "which number is the {name}?", "I have forgotten the {name}. What is it?", "who can say what the {name} is?", "may I ask what the {name} is?",
    "tell me the {name}.", "please tell me the {name}.", "please give the {name}.", "say the {name}.", "repeat the {name}.", "name the {name}.",
    "I want to know the {name}.", "I should like to hear the {name}.", "you read about the {name}. What is it?", "and the {name}?", "the {name}?",
    "how does the {name} read?", "find the {name} in the text.", "try to remember the {name}.", "what number is the {name}?",
)  # fmt: skip
# (question, answer) forms that ask for the value alone.
SHORT_FORMS = (
    ("Question: What is the {name}?\nAnswer:", VALUE),
    ("Q: What is the {name}?\nA:", VALUE),
    ("What is the {name}? Answer with the number only.", VALUE),
    ("Give me the {name}:", VALUE),
    ("The {name} is", VALUE),
    ("The {name} is", VALUE),
)
HELD_OUT_QUESTION = "Can you tell me the {name}?"

NAME_FIRST = tuple(dict.fromkeys(form for form in STATEMENTS if form.index("{name}") < form.index("{value}") and form.count("{value}") == 1))

# (statement, question); the answer is the statement.
NEEDLES = (
    ("{person} keeps the {object} in the {place}.", "Where does {person} keep the {object}?"),
    ("{person} hid the {object} in the {place}.", "Where did {person} hide the {object}?"),
    ("{person} lost the {object} near the {place}.", "Where did {person} lose the {object}?"),
    ("The {label} {object} lies in the {place}.", "Where is the {label} {object}?"),
    ("The best thing to do in {city} is to {activity}.", "What is the best thing to do in {city}?"),
    ("The best thing to do in {city} is {activity}.", "What is the best thing to do in {city}?"),
    ("The first thing to do in {city} is to {activity}.", "What should one do first in {city}?"),
    ("{person} was born in {city}.", "Where was {person} born?"),
    ("{person} came from {city} with {person2}.", "Who came from {city}?"),
    ("The {label} {object} belongs to {person}.", "Who owns the {label} {object}?"),
    ("{person} sold the {object} to {person2}.", "To whom did {person} sell the {object}?"),
    ("{person} bought a {label} {object} in {city}.", "What did {person} buy in {city}?"),
    ("{person} gave {person2} a {label} {object}.", "What did {person} give {person2}?"),
    ("In the {place} {person} found a {object}.", "What did {person} find in the {place}?"),
    ("{person} likes to {activity}.", "What does {person} like?"),
    ("{person} carried the {object} from the {place} to the {place2}.", "What did {person} carry to the {place2}?"),
    ("{person} sent a {label} {object} to {city}.", "What did {person} send to {city}?"),
    ("{person} left the {object} behind in {city}.", "What did {person} leave behind in {city}?"),
    ("{person} and {person2} met in {city}.", "Where did {person} meet {person2}?"),
    ("{person} paid for the {label} {object}.", "Who paid for the {label} {object}?"),
    ("{person} sat in the {place} with {person2}.", "Who sat with {person2}?"),
    ("{person} painted the {place} {label}.", "What did {person} paint?"),
    ("{person} went to {city} to {activity}.", "Why did {person} go to {city}?"),
    ("{person} asked {person2} for the {object}.", "What did {person} ask {person2} for?"),
    ("{person} brought the {object} home from {city}.", "What did {person} bring from {city}?"),
    ("{person} returned from {city} without the {object}.", "Who returned from {city}?"),
    ("{person} broke the {object} of {person2}.", "Whose {object} did {person} break?"),
    ("Behind the {place} stands a {label} {place2}.", "What stands behind the {place}?"),
    ("The people of {city} love the {label} {object}.", "What do the people of {city} love?"),
    ("The {object} of {person} is {label}.", "What is the {object} of {person} like?"),
    ("There is a {label} {object} in the {place} of {city}.", "What is in the {place} of {city}?"),
)
# Numbers that nobody asks for: what a pass key must not be taken for.
OTHER_NUMBERS = (
    "In {year} {person} went to {city}.", "It was the {small}th of May, {year}.", "{person} was then {small} years old.", "That was in {year}.",
    "The {label} {object} cost {number} pounds.", "There were {number} men in {city}.", "From {year} to {year2} nothing happened.", "CHAPTER {small}.",
    "The road from {city} to the {place} is {number} miles long.", "{thousands} people live in {city}.", "The sum was {thousands} dollars.",
    "(See page {number}.)", "The ship of {person} carried {number} tons.", "{person} lived in number {small}.", "The year is {year}.", "No. {number}.",
    "The height of the tower is {number} feet.", "{person} had {number} sheep, {number2} goats and {small} cows.", "The letter was dated {small} June {year}.",
    "It is {small} degrees in {city}.", "The war of {year} lasted {small} years.", "The {object} weighs {number} grains.", "{person} died in {year}.",
    "The regiment lost {number} men and {number2} horses.", "At {small} o'clock {person} came back.", "The answer of {person} was {number}.",
)  # fmt: skip
# Needle sentences are also put together from verbs, places and times: (sentence, questions).
ACTS = tuple(
    pair.split("/") for pair in (
        "hid/hide lost/lose found/find left/leave bought/buy sold/sell saw/see broke/break kept/keep put/put buried/bury forgot/forget dropped/drop "
        "cleaned/clean mended/mend carried/carry threw/throw stole/steal drew/draw burned/burn opened/open washed/wash placed/place stored/store "
        "packed/pack hung/hang wrapped/wrap wanted/want used/use held/hold showed/show caught/catch won/win made/make"
    ).split()
)  # fmt: skip
MOVES = tuple(
    pair.split("/") for pair in "went/go came/come ran/run rode/ride sailed/sail walked/walk drove/drive hurried/hurry moved/move returned/return".split()
)
TIMES = (
    "", "", "", "", "", "", "On Monday ", "At night ", "In the morning ", "Last summer ", "Before dinner ", "After the war ", "One day ", "In the end ",
    "Long ago ", "To our surprise ", "Every evening ", "On the first of May ", "As we all know, ", "It is said that ", "Somebody told me that ", "Years later ",
)  # fmt: skip
JOBS = "doctor mayor baker king queen painter captain teacher judge bishop gardener printer banker singer tailor governor butcher owner keeper friend".split()
COMPOSED = (
    (
        "{time}{person} {past} the {object} in the {place}.",
        "Where did {person} {base} the {object}?", "What did {person} {base} in the {place}?", "Who {past} the {object} in the {place}?",
    ),
    ("{time}{person} {past} a {label} {object} in {city}.", "What did {person} {base} in {city}?", "Where did {person} {base} a {label} {object}?"),
    ("In {city} {person} {past} the {object} of {person2}.", "Whose {object} did {person} {base}?", "What did {person} {base} in {city}?"),
    ("{time}{person} and {person2} {past} the {label} {object}.", "Who {past} the {label} {object}?", "What did {person} and {person2} {base}?"),
    ("In the {place} of {city} {person} {past} a {object}.", "What did {person} {base} in {city}?", "Who {past} a {object} in {city}?"),
    ("The {object} that {person} {past} was {label}.", "What was the {object} of {person} like?", "Who {past} the {label} {object}?"),
    ("{time}{person} {went} to {city} with {person2}.", "Who {went} to {city}?", "With whom did {person} {go} to {city}?"),
    ("{time}{person} {went} from {city} to the {place} of {city2}.", "Where did {person} {go}?", "From where did {person} {go} to {city2}?"),
    ("{time}{person} {went} to the {place} to {activity}.", "Why did {person} {go} to the {place}?", "Who {went} to the {place}?"),
    ("The {job} of {city} is {person}.", "Who is the {job} of {city}?"),
    ("{person} is the {job} of {person2}.", "Who is the {job} of {person2}?", "What is {person} to {person2}?"),
    (
        "The {job} of {city} keeps a {label} {object} in the {place}.",
        "What does the {job} of {city} keep in the {place}?", "Where is the {object} of the {job} of {city}?",
    ),
    ("The {label2} thing to see in {city} is the {label} {object}.", "What is the {label2} thing to see in {city}?"),
    ("The town of {city} has a {label} {place}.", "What does the town of {city} have?"),
    ("In its {place} the town of {city} has a {label} {object}.", "What does the town of {city} have in its {place}?"),
    ("In the {place} there is a {label} {object}.", "What is there in the {place}?"),
)  # fmt: skip
ABOUT = ("What does the text say about {0}?", "What was said about {0}?", "Tell me about {0}.", "What do you know about {0}?", "What about {0}?", "{0}?")
HELD_OUT_NEEDLE = ("{person} travelled to {city} with the {object}.", "What did {person} take to {city}?")

OPENINGS = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you about the important information there.",
    "Read the text and remember the facts in it.",
)
GRASS = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@dataclass(frozen=True)
class Fact:
    """One statement to hide, and the question whose answer it is. `answer` begins with the separator it needs; `name` is what is asked for.

    A question about several statements is a fact without a statement; those statements are facts without a question.
    `random` marks a statement that nobody can foresee, such as hexadecimal digits.
    """

    statement: str
    question: str
    answer: str
    name: str
    random: bool = False


def number(rng: Random, digits: int | None = None) -> str:
    """A number without a leading zero: five digits mostly, else two to seven."""
    n = digits or (5 if rng.random() < 0.65 else rng.choice((2, 3, 4, 6, 7)))
    return str(rng.randrange(10 ** (n - 1), 10**n))


def value_of(rng: Random, name: str, statement: str, digits: int | None = None, standard: float = 0.35) -> Fact:
    """A named number; `standard` is the share of questions in the standard form."""
    value = number(rng, digits)
    kind = rng.random()
    if kind < standard:
        question, answer = STANDARD_QUESTION, SENTENCE
    elif kind < standard + 0.2:
        question, answer = rng.choice(SHORT_FORMS)
    else:
        question, answer = capital(rng.choice(LEADS) + rng.choice(ASKING)), SENTENCE
    filled = capital(statement.format(name=name, value=value))
    return Fact(filled, question.format(name=name), answer.format(name=name, value=value), name)


def composed_name(rng: Random) -> str:
    kind = rng.random()
    if kind < 0.6:
        return f"{rng.choice(LABELS)} {rng.choice(KINDS)}"
    return f"{rng.choice(KINDS)} {rng.choice(('of', 'for', 'on', 'in'))} the {rng.choice(OBJECTS + PLACES)}"


def pass_key(rng: Random, standard: float = 0.35) -> Fact:
    name = rng.choice(COMMON_NAMES) if rng.random() < 0.5 else composed_name(rng)
    return value_of(rng, name, rng.choice(STATEMENTS), standard=standard)


def standard_pass_key(rng: Random) -> Fact:
    """What the demonstration asks."""
    return value_of(rng, "pass key", STATEMENTS[0], digits=5, standard=1.0)


def held_out_pass_key(rng: Random) -> Fact:
    value, name = number(rng, 5), HELD_OUT_NAME
    return Fact(
        capital(HELD_OUT_STATEMENT.format(name=name, value=value)), HELD_OUT_QUESTION.format(name=name), SENTENCE.format(name=name, value=value), name
    )


def labelled_keys(rng: Random, n: int, standard: float = 0.6, value_first: bool | None = None) -> list[Fact]:
    """`n` facts that differ in their label only, so that the label must be read. `value_first`: drawn if None."""
    if value_first is None:
        value_first = rng.random() < 0.35
    kind, statement = rng.choice(KINDS), rng.choice(VALUE_FIRST if value_first else NAME_FIRST)
    return [value_of(rng, f"{label} {kind}", statement, standard=standard) for label in rng.sample(LABELS, n)]


def other_number(rng: Random) -> str:
    """A sentence with a number that no question asks for."""
    words = _words(rng) | {
        "year": str(rng.randint(1066, 1925)), "year2": str(rng.randint(1066, 1925)), "small": str(rng.randint(2, 99)),
        "number": number(rng), "number2": number(rng), "thousands": f"{rng.randrange(1000, 10 ** rng.randint(4, 7)):,}",
    }  # fmt: skip
    return rng.choice(OTHER_NUMBERS).format(**words)


def needle(rng: Random, form: tuple[str, ...] | None = None) -> Fact:
    """A sentence to be asked back: in whole, or its end, when the question is followed by its beginning."""
    words = _words(rng)
    words["activity"] = rng.choice(ACTIVITIES).format(**words)
    statement, question = _filled(rng, words, form or rng.choice(NEEDLES))
    return Fact(statement, question, " " + statement, question)


def composed_needle(rng: Random, form: tuple[str, ...] | None = None) -> Fact:
    """A needle whose question names what it asks for, or only one of its words, or goes on to the beginning of the answer."""
    words = _words(rng)
    words["activity"] = rng.choice(ACTIVITIES).format(**words)
    statement, question = _filled(rng, words, form or rng.choice((*COMPOSED, *NEEDLES)))
    kind = rng.random()
    if kind < 0.25:
        named = [words[name] for name in ("person", "person2", "city") if words[name] in statement]
        named += [f"the {words[name]}" for name in ("object", "place") if words[name] in statement]
        question = rng.choice(ABOUT).format(rng.choice(named))
    elif kind < 0.55:
        parts = statement.split(" ")
        cut = rng.randint(max(1, len(parts) - 6), len(parts) - 1)
        return Fact(statement, f"{question} {' '.join(parts[:cut])}", " " + " ".join(parts[cut:]), question)
    return Fact(statement, question, " " + statement, question)


def needles(rng: Random, n: int) -> list[Fact]:
    """Sentences of one form that differ in their words."""
    form = rng.choice(COMPOSED)
    return [composed_needle(rng, form) for _ in range(n)]


def _filled(rng: Random, words: dict[str, str], form: tuple[str, ...]) -> tuple[str, str]:
    return capital(form[0].format(**words)), rng.choice(form[1:]).format(**words)


def _words(rng: Random) -> dict[str, str]:
    (past, base), (went, go) = rng.choice(ACTS), rng.choice(MOVES)
    return {
        "person": rng.choice(PEOPLE), "person2": rng.choice(PEOPLE), "city": rng.choice(CITIES).replace("-", " "), "object": rng.choice(OBJECTS),
        "place": rng.choice(PLACES), "place2": rng.choice(PLACES), "label": rng.choice(LABELS), "label2": rng.choice(LABELS), "past": past, "base": base,
        "went": went, "go": go, "time": rng.choice(TIMES), "job": rng.choice(JOBS), "city2": rng.choice(CITIES).replace("-", " "),
    }  # fmt: skip


def pairs(rng: Random, n: int) -> tuple[str, list[Fact]]:
    """A short list of `n` key-value pairs as one statement, and one fact per pair."""
    keys = rng.sample(LABELS + [p.lower() for p in PEOPLE] + OBJECTS + PLACES, n)
    values = [number(rng, rng.choice((2, 3, 4, 5))) if rng.random() < 0.8 else rng.choice(OBJECTS) for _ in keys]
    join, end = rng.choice(((": ", "\n"), (" = ", "; "), (" is ", ". "), (" - ", ", ")))
    listing = end.join(f"{k}{join}{v}" for k, v in zip(keys, values)) + end.rstrip(" ")
    return listing, [Fact("", f"{k}{join}".rstrip(" "), f" {v}", k) for k, v in zip(keys, values)]


def facts(rng: Random, n: int) -> list[Fact]:
    """`n` facts of mixed kinds, no two of one name."""
    found: dict[str, Fact] = {}
    while len(found) < n:
        kind = rng.random()
        if kind < 0.4 or n - len(found) < 2:
            new = [pass_key(rng)]
        elif kind < 0.75:
            new = labelled_keys(rng, min(n - len(found), rng.choice((2, 3, 3, 4, 5))))
        elif kind < 0.82:
            new = [needle(rng)]
        elif kind < 0.93:
            new = [composed_needle(rng)]
        else:
            new = needles(rng, min(n - len(found), rng.choice((2, 3))))
        for fact in new:
            found.setdefault(fact.name, fact)
    return list(found.values())


def capital(text: str) -> str:
    return text[0].upper() + text[1:]
