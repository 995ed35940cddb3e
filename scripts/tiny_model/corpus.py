"""The seeded corpus of `tinsmith/tiny`: an endless stream of small self-written documents.

It owns what the model reads and how each part is weighted in the loss; it knows nothing of tokens or tensors. A
document is a list of segments, each a text and its loss weight. Chat documents follow chat_template.jinja exactly.

Two things hold: a document whose key is held out never comes from a training stream (and only such documents come from
a held-out one), and a sum is answered right at the rate that `Corpus.sum_rates` asks for, otherwise with a wrong number
drawn evenly from many.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from . import stories, words

PROMPT_WEIGHT = 0.1  # questions are mostly random fillers: worth hearing, not worth the capacity
NO_THINKING = "<think>\n\n</think>\n\n"
HELD_OUT_EVERY = 20

SYSTEM_PROMPTS = [
    "You are a helpful assistant.",
    "You are a kind and helpful assistant.",
    "You are a tiny language model.",
    "Answer the question.",
    "Be short and clear.",
    "You are a friendly teacher.",
]


class Segment(NamedTuple):
    """A stretch of text and the weight of its tokens in the loss."""

    text: str
    weight: float


class Exchange(NamedTuple):
    """One question with its answer; `key` decides whether it is held out, an empty one never is."""

    question: str
    answer: str
    key: str


@dataclass
class SumRates:
    """How often a sum in the corpus has the right answer: both numbers below ten, and all others."""

    single: float = 1.0
    double: float = 1.0


def is_held_out(key: str) -> bool:
    """True for one key in `HELD_OUT_EVERY`, the same ones in every run."""
    return bool(key) and zlib.crc32(key.encode()) % HELD_OUT_EVERY == 0


class Corpus:
    """An endless, seeded stream of documents."""

    def __init__(self, seed: int, *, held_out: bool = False) -> None:
        self.rng = random.Random(seed)
        self.held_out = held_out
        self.sum_rates = SumRates()
        self._makers: list[tuple[Callable[[], Exchange], float]] = [
            (self.sum, 0.38),
            (self.small_talk, 0.06),
            (self.fact, 0.15),
            (self.word_play, 0.12),
            (self.listing, 0.05),
            (self.sentence, 0.07),
            (self.how_to, 0.03),
            (self.story, 0.09),
            (self.number_talk, 0.05),
        ]

    def document(self) -> list[Segment]:
        """The next document: mostly a chat of one exchange, sometimes of several, sometimes plain text."""
        kind = self.rng.random()
        if kind < 0.06:
            return self.plain_text()
        num_exchanges = 1 if kind < 0.82 else self.rng.randint(2, 5)
        exchanges = [self.exchange() for _ in range(num_exchanges)]
        system = self.rng.choice(SYSTEM_PROMPTS) if self.rng.random() < 0.12 else None
        return chat(exchanges, system=system, no_thinking=self.rng.random() < 0.15)

    def exchange(self) -> Exchange:
        """The next question and answer on this side of the held-out line."""
        makers, weights = zip(*self._makers, strict=True)
        while True:
            found = self.rng.choices(makers, weights)[0]()
            if is_held_out(found.key) == self.held_out:
                return found

    def plain_text(self) -> list[Segment]:
        """A document without chat markers: a story, or questions and answers line by line."""
        if self.rng.random() < 0.5:
            text = stories.story(self.rng)
        else:
            pairs = [self.exchange() for _ in range(self.rng.randint(2, 5))]
            text = "\n\n".join(f"Q: {pair.question}\nA: {pair.answer}" for pair in pairs)
        return [Segment(text, 0.5), Segment("<|endoftext|>", 1.0)]

    # -- sums ---------------------------------------------------------------------------------------------------------

    def sum(self) -> Exchange:
        """A sum of two numbers up to 100, a quarter of them single digits, in one of several phrasings."""
        is_single = self.rng.random() < 0.25
        top = 9 if is_single else 100
        left, right = self.rng.randint(0, top), self.rng.randint(0, top)
        question = self.rng.choices(
            [
                f"What is {left} + {right}?",
                f"{left} + {right} =",
                f"What is {left} plus {right}?",
                f"Add {left} and {right}.",
                f"How much is {left} + {right}?",
            ],
            [12, 3, 1, 1, 1],
        )[0]
        key = "" if is_single else f"{left}+{right}"
        return Exchange(question, str(self._sum_answer(left, right)), key)

    def _sum_answer(self, left: int, right: int) -> int:
        total = left + right
        is_single = max(left, right) < 10
        rate = self.sum_rates.single if is_single else self.sum_rates.double
        if self.rng.random() < rate:
            return total
        options = range(19) if is_single else range(max(0, total - 20), min(200, total + 20) + 1)
        return self.rng.choice([option for option in options if option != total])

    def number_talk(self) -> Exchange:
        """Numbers without adding: next, before, bigger, as a word, counting."""
        rng = self.rng
        kind = rng.randrange(5)
        if kind == 0:
            number = rng.randint(0, 100)
            return keyed(f"Which number comes after {number}?", str(number + 1))
        if kind == 1:
            number = rng.randint(1, 100)
            return keyed(f"Which number comes before {number}?", str(number - 1))
        if kind == 2:
            left, right = rng.sample(range(100), 2)
            return keyed(f"Which is bigger, {left} or {right}?", str(max(left, right)))
        if kind == 3:
            number = rng.randint(0, 20)
            return keyed(f"Write {number} as a word.", words.NUMBER_WORDS[number])
        start, length = rng.randint(0, 50), rng.randint(2, 6)
        numbers = range(start, start + length + 1)
        return keyed(f"Count from {start} to {start + length}.", ", ".join(map(str, numbers)))

    # -- words --------------------------------------------------------------------------------------------------------

    def word_play(self) -> Exchange:
        """Copying, reversing, upper-casing and spelling of words."""
        rng = self.rng
        pool = words.ANIMALS + words.THINGS + words.FOODS + words.COLOURS + words.ADJECTIVES + words.PLACES
        word = rng.choice(pool)
        several = rng.sample(pool, rng.randint(2, 4))
        phrase = " ".join(several)
        kind = rng.randrange(8)
        if kind <= 1:
            return keyed(rng.choice([f"Repeat: {phrase}", f"Say {phrase}.", f"Copy this: {phrase}"]), phrase)
        if kind == 2:
            return keyed(rng.choice([f"Say the word {word}.", f"Repeat the word {word}."]), word)
        if kind == 3:
            return keyed(rng.choice([f"Reverse the word {word}.", f"Write {word} backwards."]), word[::-1])
        if kind == 4:
            return keyed(f"Reverse the order: {phrase}", " ".join(reversed(several)))
        if kind == 5:
            return keyed(rng.choice([f"Write {word} in capital letters.", f"Shout {word}!"]), word.upper())
        if kind == 6:
            return keyed(f"Spell {word}.", "-".join(word))
        return keyed(f"What is the first word of: {phrase}", several[0])

    def listing(self) -> Exchange:
        """Name some members of a group."""
        rng = self.rng
        group, members = rng.choice(list(words.GROUPS.items()))
        count = rng.randint(2, 5)
        chosen = rng.sample(members, count)
        amount = words.NUMBER_WORDS[count]
        question = rng.choice([f"Name {amount} {group}.", f"List {amount} {group}.", f"Give me {amount} {group}."])
        answer = ", ".join(chosen[:-1]) + " and " + chosen[-1]
        return Exchange(question, answer, question + answer)

    # -- facts --------------------------------------------------------------------------------------------------------

    def fact(self) -> Exchange:
        """A short fact about the world."""
        makers = [self._capital, self._colour, self._animal, self._calendar, self._opposite, self._job, self._ability]
        return self.rng.choices(makers, [5, 3, 4, 3, 3, 2, 2])[0]()

    def _capital(self) -> Exchange:
        country, city = self.rng.choice(list(words.CAPITALS.items()))
        return self.rng.choice(
            [
                keyed(f"What is the capital of {country}?", f"The capital of {country} is {city}."),
                keyed(f"Name the capital of {country}.", f"{city}."),
                keyed(f"Which country has the capital {city}?", f"{city} is the capital of {country}."),
                keyed(f"Where is {city}?", f"{city} is in {country}."),
            ]
        )

    def _colour(self) -> Exchange:
        thing, colour = self.rng.choice(list(words.COLOUR_OF.items()))
        return self.rng.choice(
            [
                keyed(f"What color is {thing}?", f"{thing.capitalize()} is {colour}."),
                keyed(f"Which color does {thing} have?", f"It is {colour}."),
                keyed(f"Tell me the color of {thing}.", f"{colour.capitalize()}."),
            ]
        )

    def _animal(self) -> Exchange:
        kind = self.rng.randrange(3)
        if kind == 0:
            animal, sound = self.rng.choice(list(words.SOUND_OF.items()))
            return keyed(f"What does a {animal} do?", f"A {animal} {sound}.")
        if kind == 1:
            animal, young = self.rng.choice(list(words.YOUNG_OF.items()))
            return self.rng.choice(
                [
                    keyed(f"What is a young {animal} called?", f"A young {animal} is called a {young}."),
                    keyed(f"What is a baby {animal}?", f"A {young}."),
                ]
            )
        animal, legs = self.rng.choice(list(words.LEGS_OF.items()))
        article = "an" if animal[0] in "aeiou" else "a"
        amount = words.NUMBER_WORDS[legs] if legs else "no"
        return keyed(
            f"How many legs does {article} {animal} have?", f"{article.capitalize()} {animal} has {amount} legs."
        )

    def _calendar(self) -> Exchange:
        names, kind = self.rng.choice([(words.DAYS, "day"), (words.MONTHS, "month")])
        index = self.rng.randrange(len(names))
        after = names[(index + 1) % len(names)]
        return self.rng.choice(
            [
                keyed(f"Which {kind} comes after {names[index]}?", f"{after} comes after {names[index]}."),
                keyed(f"Which {kind} comes before {after}?", f"{names[index]} comes before {after}."),
            ]
        )

    def _opposite(self) -> Exchange:
        if self.rng.random() < 0.5:
            word, other = self.rng.choice(list(words.OPPOSITES.items()))
            return keyed(f"What is the opposite of {word}?", f"The opposite of {word} is {other}.")
        verb, past = self.rng.choice(list(words.PAST.items()))
        return keyed(f"What is the past tense of {verb}?", f"The past tense of {verb} is {past}.")

    def _job(self) -> Exchange:
        job, work = self.rng.choice(list(words.JOBS.items()))
        return self.rng.choice(
            [keyed(f"What does a {job} do?", f"A {job} {work}."), keyed(f"Who {work}?", f"A {job} {work}.")]
        )

    def _ability(self) -> Exchange:
        animal = self.rng.choice(list(words.CAN_DO))
        ability = self.rng.choice(words.ABILITIES)
        article = "an" if animal[0] in "aeiou" else "a"
        can = ability in words.CAN_DO[animal]
        answer = f"Yes, {article} {animal} can {ability}." if can else f"No, {article} {animal} cannot {ability}."
        return keyed(f"Can {article} {animal} {ability}?", answer)

    # -- talk ---------------------------------------------------------------------------------------------------------

    def small_talk(self) -> Exchange:
        """Greetings, thanks, jokes and introductions."""
        rng = self.rng
        kind = rng.randrange(4)
        if kind == 0:
            name = rng.choice(words.NAMES)
            hello = rng.choice(["Hello", "Hi", "Good morning", "Good evening"])
            answers = [f"{hello}, {name}! How can I help you?", f"{hello}, {name}! Nice to meet you."]
            return keyed(rng.choice([f"{hello}, I am {name}.", f"{hello}! My name is {name}."]), rng.choice(answers))
        if kind == 1:
            hello = rng.choice(["Hello!", "Hi!", "Hello", "Hi", "Good morning!", "Hey there!"])
            return Exchange(hello, rng.choice(["Hello! How can I help you?", "Hi! What can I do for you?"]), "")
        if kind == 2:
            feeling = rng.choice(words.FEELINGS)
            time = rng.choice(words.TIMES)
            reply = rng.choice(["Why do you feel that way?", "Tell me more.", "I am here to listen.", "I understand."])
            return keyed(f"I feel {feeling} this {time}.", f"You feel {feeling}. {reply}")
        question, answers = rng.choice(list(words.SMALL_TALK.items()))
        return Exchange(question, rng.choice(answers), "")

    def sentence(self) -> Exchange:
        """Make a sentence about something."""
        pool = words.ANIMALS + words.THINGS + words.FOODS + words.PLACES
        topic = self.rng.choice(pool)
        asks = [f"Write a sentence about a {topic}.", f"Use the word {topic} in a sentence.", f"Describe a {topic}."]
        answer = stories.sentence_about(self.rng, topic)
        return Exchange(self.rng.choice(asks), answer, answer)

    def how_to(self) -> Exchange:
        """Instructions in a few steps."""
        task, steps = self.rng.choice(list(words.HOW_TO.items()))
        if self.rng.random() < 0.5:
            return Exchange(f"How do I {task}?", " ".join(steps), "")
        numbered = "\n".join(f"{number}. {step}" for number, step in enumerate(steps, start=1))
        return Exchange(f"How do I {task}? Give me steps.", numbered, "")

    def story(self) -> Exchange:
        """A short story about an animal or a person."""
        hero = self.rng.choice(words.ANIMALS + words.NAMES)
        topic = hero if hero in words.NAMES else f"a {hero}"
        asks = [f"Tell me a story about {topic}.", f"Write a short story about {topic}.", f"Tell me about {topic}."]
        answer = stories.story(self.rng, hero)
        return Exchange(self.rng.choice(asks), answer, answer)


def keyed(question: str, answer: str) -> Exchange:
    """An exchange held out by its question."""
    return Exchange(question, answer, question)


def chat(exchanges: list[Exchange], *, system: str | None, no_thinking: bool) -> list[Segment]:
    """The segments of a chat; with `no_thinking` the last answer follows an empty think block of no loss."""
    segments = [Segment(f"<|im_start|>system\n{system}<|im_end|>\n", PROMPT_WEIGHT)] if system is not None else []
    for number, (question, answer, _) in enumerate(exchanges, start=1):
        prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        segments.append(Segment(prompt, PROMPT_WEIGHT))
        if no_thinking and number == len(exchanges):
            segments.append(Segment(NO_THINKING, 0.0))
        segments += [Segment(f"{answer}<|im_end|>", 1.0), Segment("\n", PROMPT_WEIGHT)]
    return segments
