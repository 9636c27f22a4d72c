"""The micro-world: every text the pocket model has ever read, made from a seed.

Three kinds of text come out of one small world of people, places and things:

* **stories** (`story_text`): a few facts ("Anna went to the garden at noon."), some weather, and
  often a dialogue in which somebody asks about the story and somebody answers. Answering is what
  teaches the model to *read*.
* **almanac** entries (`almanac_text`): 240 invented people with a fixed town, job and animal. They
  can only be learnt by heart, which is why they show so clearly what four bits cost (notebook 03).
* **instructions** (`instruction_rows`): the same kinds of question in Alpaca's columns
  *instruction, input, output*. The base model never sees this form; fine-tuning (notebook 06)
  teaches it.
* **sentences** (`sentence_rows`): a sentence of a story, and the question that it answers. A second
  adapter learns to ask (notebook 07).

One (person, noun) pair in ten is *held out*: no story and no training instruction contains it, and
every held-out instruction asks about such a pair.
"""

from __future__ import annotations

import random
import tomllib
import zlib
from dataclasses import dataclass
from pathlib import Path

_WORDS = tomllib.loads((Path(__file__).with_suffix(".toml")).read_text(encoding="utf-8"))
PEOPLE: list[str] = _WORDS["she"] + _WORDS["he"]
PLACES: dict[str, str] = _WORDS["places"]
OBJECTS: list[str] = _WORDS["objects"]
THINGS: list[str] = _WORDS["things"]
KINDS = ["where", "what", "who", "how many", "what colour", "when"]


@dataclass(frozen=True)
class Fact:
    """One sentence of a story, remarks that may follow it, and every question it answers: {kind:
    [(question, answer), …]}.
    """

    person: str
    noun: str
    sentence: str
    remarks: list[str]
    questions: dict[str, list[tuple[str, str]]]


def held_out(person: str, noun: str) -> bool:
    """True for the one (person, noun) pair in ten that no training text may contain.

    >>> sum(held_out(p, n) for p in PEOPLE for n in OBJECTS) / (len(PEOPLE) * len(OBJECTS)) < 0.15
    True
    """
    return zlib.crc32(f"{person}|{noun}".encode()) % 10 == 0


def _a(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def _went(rng: random.Random, person: str, place: str) -> Fact:
    past = rng.choice(_WORDS["going"])
    time = rng.choice(_WORDS["times"]) if rng.random() < 0.7 else ""
    questions = {
        "where": [
            (f"Where is {person}?", f"{PLACES[place].capitalize()} the {place}"),
            (f"Where did {person} go?", f"To the {place}"),
        ],
        "who": [(f"Who {past} to the {place}?", person)],
    }
    if time:
        questions["when"] = [(f"When did {person} go to the {place}?", time.capitalize())]
    sentence = f"{person} {past} to the {place}{' ' + time if time else ''}."
    return Fact(person, place, sentence, _WORDS["place_notes"], questions)


def _got(rng: random.Random, person: str, thing: str) -> Fact:
    past, base = rng.choice(_WORDS["getting"])
    colour = rng.choice(_WORDS["colours"])
    questions = {
        "what": [(f"What did {person} {base}?", _a(f"{colour} {thing}").capitalize())],
        "what colour": [(f"What colour is the {thing}?", colour.capitalize())],
        "who": [(f"Who {past} the {thing}?", person)],
    }
    return Fact(
        person,
        thing,
        f"{person} {past} {_a(f'{colour} {thing}')}.",
        _WORDS["object_notes"],
        questions,
    )


def _counted(rng: random.Random, person: str, things: str) -> Fact:
    past, base = rng.choice(_WORDS["counting"])
    number = rng.choice(_WORDS["numbers"])
    questions = {
        "how many": [(f"How many {things} did {person} {base}?", number.capitalize())],
        "who": [(f"Who {past} the {things}?", person)],
    }
    return Fact(
        person, things, f"{person} {past} {number} {things}.", _WORDS["thing_notes"], questions
    )


_MAKERS = [(_went, list(PLACES)), (_got, OBJECTS), (_counted, THINGS)]


def _fact(
    rng: random.Random,
    maker: tuple,
    people: list[str],
    nouns: list[str],
    want_held_out: bool = False,
) -> Fact:
    """One fact of the maker's sort about a person and a noun not used before; both are taken off
    their lists.
    """
    make, its_nouns = maker
    while True:
        person, noun = rng.choice(people), rng.choice(its_nouns)
        if noun in nouns and held_out(person, noun) == want_held_out:
            people.remove(person)
            nouns.remove(noun)
            return make(rng, person, noun)


def _story(
    rng: random.Random, makers: list[tuple], held_out_at: int | None = None
) -> tuple[str, list[Fact]]:
    """Text and facts of a story, one fact for each maker; the one at `held_out_at` is about a
    held-out pair.
    """
    people, nouns = list(PEOPLE), [*PLACES, *OBJECTS, *THINGS]
    facts = [_fact(rng, maker, people, nouns, i == held_out_at) for i, maker in enumerate(makers)]
    lines = [rng.choice(_WORDS["openings"])] if rng.random() < 0.5 else []
    for fact in facts:
        lines.append(fact.sentence)
        if rng.random() < 0.3:
            pronoun = "She" if fact.person in _WORDS["she"] else "He"
            lines.append(
                rng.choice(
                    [f"{pronoun} was {rng.choice(_WORDS['feelings'])}.", rng.choice(fact.remarks)]
                )
            )
    if rng.random() < 0.5:
        lines.append(rng.choice(_WORDS["endings"]))
    return " ".join(lines), facts


def _one_of_each(rng: random.Random) -> list[tuple]:
    """One maker of each sort in random order: the stories that instructions are about."""
    return rng.sample(_MAKERS, len(_MAKERS))


def _recap(rng: random.Random, fact: Fact) -> str:
    """A sentence that repeats a fact, looked up by its person or by its noun."""
    if rng.random() < 0.5:
        return f"So {fact.sentence}"
    preposition = PLACES.get(fact.noun, "with")
    return f"The one {preposition} the {fact.noun} was {fact.person}."


def story_text(rng: random.Random, hard_share: float = 0.4) -> str:
    """One document of a story, mostly with a recap and a dialogue of questions about it.

    Recap and dialogue are what teaches reading: their words follow from the story alone. Most
    stories tell one thing of each sort (a place, an object, a number); the share of hard ones tells
    several of a sort, where it matters whom one asks about.
    """
    makers = (
        rng.choices(_MAKERS, k=rng.randint(2, 5))
        if rng.random() < hard_share
        else _one_of_each(rng)
    )
    text, facts = _story(rng, makers)
    if rng.random() < 0.3:
        text += "".join(" " + _recap(rng, fact) for fact in facts)
    if rng.random() < 0.9:
        listeners = [p for p in PEOPLE if p not in {f.person for f in facts}]
        pairs = [(q, a) for f in facts for kind in f.questions for q, a in f.questions[kind]]
        rng.shuffle(pairs)
        for question, answer in pairs[: rng.randint(3, 7)]:
            asker, teller = rng.sample(listeners, 2)
            with_names, plain = (
                f'{asker} asked, "{question}" "{answer}," said {teller}.',
                f'"{question}" "{answer}."',
            )
            text += " " + rng.choice([with_names, plain, plain])
    return text


@dataclass(frozen=True)
class Entry:
    """One invented person of the almanac: fixed facts that can only be known by heart."""

    name: str
    town: str
    job: str
    animal: str


def almanac(seed: int = 2305) -> list[Entry]:
    """The 240 almanac entries (24 first names × 10 surnames), the same on every machine.

    >>> len(almanac()), almanac()[0].name
    (240, 'Anna Vale')
    """
    rng = random.Random(seed)
    return [
        Entry(
            f"{first} {last}",
            rng.choice(_WORDS["towns"]),
            rng.choice(_WORDS["jobs"]),
            rng.choice(_WORDS["animals"]),
        )
        for first in PEOPLE
        for last in _WORDS["surnames"]
    ]


def almanac_prompts(entries: list[Entry] | None = None) -> list[tuple[str, str]]:
    """(prompt, the one word that completes it), three for each person: what notebook 03 asks the
    quantized models.
    """
    entries = entries or almanac()
    return [
        pair
        for e in entries
        for pair in (
            (f"{e.name} lives in", e.town),
            (f"{e.name} works as a", e.job),
            (f"{e.name} keeps a", e.animal),
        )
    ]


def almanac_text(rng: random.Random, entries: list[Entry]) -> str:
    """One document: two or three almanac entries, their sentences in random order."""
    lines = []
    for e in rng.sample(entries, rng.randint(2, 3)):
        own = [
            f"{e.name} lives in {e.town}.",
            f"{e.name} works as a {e.job}.",
            f"{e.name} keeps a {e.animal}.",
        ]
        rng.shuffle(own)
        lines += own
    return " ".join(lines)


def documents(seed: int, n: int, almanac_share: float = 0.12, hard_share: float = 0.4) -> list[str]:
    """`n` training documents: stories and, in the given share, almanac pages."""
    rng, entries = random.Random(seed), almanac()
    return [
        almanac_text(rng, entries) if rng.random() < almanac_share else story_text(rng, hard_share)
        for _ in range(n)
    ]


_PHRASINGS = {
    "where": ["{q}", "Say where {person} is."],
    "what": ["{q}", "Name the thing. {q}"],
    "who": ["{q}", "Name the person. {q}"],
    "how many": ["{q}", "Give the number. {q}"],
    "what colour": ["{q}", "Give the colour of the {noun}."],
    "when": ["{q}", "Give the time. {q}"],
}


def instruction_rows(split: str, n: int, seed: int = 0) -> list[dict[str, str]]:
    """`n` rows with Alpaca's columns (instruction, input, output) and `kind`, the kinds taking
    turns.

    Args:
        split: "train" (no held-out pair anywhere) or "test" (each row asks about a held-out pair).
        n: number of rows.
        seed: another seed gives other rows; both splits stay disjoint for every seed.

    >>> row = instruction_rows("train", 1)[0]
    >>> sorted(row)
    ['input', 'instruction', 'kind', 'output']
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', not {split!r}")
    rng, rows = random.Random(f"{split}-{seed}"), []
    while len(rows) < n:
        kind = KINDS[len(rows) % len(KINDS)]
        makers = _one_of_each(rng)
        asked = rng.randrange(len(makers))
        text, facts = _story(rng, makers, held_out_at=asked if split == "test" else None)
        fact = facts[asked]
        if kind not in fact.questions:
            continue
        question, answer = rng.choice(fact.questions[kind])
        instruction = rng.choice(_PHRASINGS[kind]).format(
            q=question, person=fact.person, noun=fact.noun
        )
        rows.append(
            {"instruction": instruction, "input": text, "output": f"{answer}.", "kind": kind}
        )
    return rows


ASK = "Make a question of it."
"""The one instruction of the rows that teach a model to ask."""


def sentence_rows(split: str, n: int, seed: int = 0) -> list[dict[str, str]]:
    """`n` different rows as `instruction_rows` has them: a sentence of a story as input, as output
    the question for its place, its thing or its number, the kinds taking turns. The verb changes
    its form on the way ("found" becomes "did … find").

    >>> sorted(sentence_rows("test", 1)[0])
    ['input', 'instruction', 'kind', 'output']
    """
    rng = random.Random(f"sentences-{split}-{seed}")
    rows = []
    while len(rows) < n:
        kind = ("where", "what", "how many")[len(rows) % 3]
        maker = _MAKERS[len(rows) % 3]
        nouns = [*PLACES, *OBJECTS, *THINGS]
        fact = _fact(rng, maker, list(PEOPLE), nouns, want_held_out=split == "test")
        question, _ = fact.questions[kind][-1]
        row = {"instruction": ASK, "input": fact.sentence, "output": question, "kind": kind}
        if row not in rows:
            rows.append(row)
    return rows
