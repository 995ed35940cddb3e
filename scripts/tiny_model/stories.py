"""Sentences and short stories from templates: what gives `tinsmith/tiny` its English.

Everything is drawn from the generator that the caller passes in; no state is kept.
"""

from __future__ import annotations

import random

from . import words


def article(phrase: str) -> str:
    """`phrase` with "a" or "an" before it."""
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def sentence_about(rng: random.Random, topic: str) -> str:
    """One sentence with `topic` in it, as an animal, food, place or thing."""
    place, time, name = rng.choice(words.PLACES), rng.choice(words.TIMES), rng.choice(words.NAMES)
    adjective, other = rng.choice(words.ADJECTIVES), rng.choice(words.ADJECTIVES)
    colour, looks = rng.choice(words.COLOURS), rng.choice(words.THING_ADJECTIVES)
    if topic in words.ANIMALS:
        options = [
            f"The {topic} is {adjective} and {other}.",
            f"The {adjective} {topic} lives near the {place}.",
            f"One {time} the {topic} ran to the {place}.",
            f"{name} saw {article(f'{adjective} {topic}')} in the {place}.",
        ]
    elif topic in words.FOODS:
        options = [
            f"{name} eats {article(topic)} every {time}.",
            f"The {topic} on the table is {looks}.",
            f"{name} bought {article(f'{looks} {topic}')} at the market.",
            f"I like {topic} with {rng.choice(words.FOODS)}.",
        ]
    elif topic in words.PLACES:
        options = [
            f"The {topic} is {rng.choice(words.WEATHER)} in the {time}.",
            f"{name} walked to the {topic} with {article(rng.choice(words.ANIMALS))}.",
            f"There is {article(f'{colour} {rng.choice(words.THINGS)}')} in the {topic}.",
        ]
    else:
        options = [
            f"The {topic} is {colour} and {looks}.",
            f"{name} has {article(f'{looks} {topic}')}.",
            f"{name} left the {colour} {topic} in the {place}.",
            f"There is {article(f'{colour} {topic}')} on the table.",
        ]
    return rng.choice(options)


def story(rng: random.Random, hero: str | None = None) -> str:
    """A story of four to eight sentences; `hero` is an animal or a name, drawn when not given."""
    hero = hero or rng.choice(words.ANIMALS + words.NAMES)
    is_person = hero in words.NAMES
    adjective = rng.choice(words.ADJECTIVES)
    called = hero if is_person else f"the {hero}"
    friend = rng.choice([animal for animal in words.ANIMALS if animal != hero])
    thing = f"{rng.choice(words.THING_ADJECTIVES)} {rng.choice(words.THINGS)}"
    place = rng.choice(words.PLACES)
    if is_person:
        opening = rng.choice(
            [
                f"{hero} lived near {article(place)} and was very {adjective}.",
                f"Once there was {article(f'{adjective} child')} called {hero}.",
                f"{hero} woke up on {article(rng.choice(words.WEATHER))} {rng.choice(words.DAYS)}"
                f" and felt {adjective}.",
            ]
        )
    else:
        opening = rng.choice(
            [
                f"Once upon a time there was {article(f'{adjective} {hero}')}.",
                f"{article(f'{adjective} {hero}').capitalize()} lived in the {place}.",
                f"In the {place} there lived {article(f'{adjective} {hero}')}.",
            ]
        )
    middle = _middle(rng, called, friend, thing)
    return " ".join([opening, *middle, _ending(rng, called, friend, thing)])


def _middle(rng: random.Random, called: str, friend: str, thing: str) -> list[str]:
    subject = called[0].upper() + called[1:]
    weather, time, place = rng.choice(words.WEATHER), rng.choice(words.TIMES), rng.choice(words.PLACES)
    start = rng.choice(
        [
            f"One {weather} {time} {called} went to the {place}.",
            f"Every {time} {called} walked to the {place}.",
            f"One {time} {called} wanted to see the {place}.",
        ]
    )
    find = rng.choice(
        [
            f"There {called} found {article(thing)}.",
            f"On the way {called} saw {article(thing)}.",
            f"Near the {place} lay {article(thing)}.",
        ]
    )
    meet = rng.choice(
        [
            f"Then {article(f'{rng.choice(words.ADJECTIVES)} {friend}')} came along.",
            f"Soon {called} met {article(friend)}.",
            f"{article(friend).capitalize()} was looking for it.",
        ]
    )
    talk = rng.choice(
        [
            f'"Is this your {thing.rsplit(maxsplit=1)[-1]}?" asked {called}. "Yes, thank you!" said the {friend}.',
            f'"Hello, my name is {rng.choice(words.NAMES)}," said the {friend}. "Let us play."',
            f'"Can you help me?" asked the {friend}. "Of course," said {called}.',
            f"{subject} gave the {friend} some {rng.choice(words.FOODS)}.",
            f'"I am {rng.choice(words.FEELINGS)}," said the {friend}.',
        ]
    )
    extra = rng.choice(
        [
            f"They shared {article(rng.choice(words.FOODS))} and some {rng.choice(words.FOODS)}.",
            f"Together they went to the {rng.choice(words.PLACES)}.",
            f"The {friend} was {rng.choice(words.FEELINGS)}.",
            f"It began to rain, but {called} was not {rng.choice(words.FEELINGS)}.",
        ]
    )
    lines = [start, find, meet, talk, extra]
    return lines[: rng.randint(3, 5)]


def _ending(rng: random.Random, called: str, friend: str, thing: str) -> str:
    return rng.choice(
        [
            "From that day on they were best friends.",
            f"In the end {called} was very {rng.choice(words.FEELINGS)}.",
            f"Then {called} went home and slept well.",
            f"{called[0].upper() + called[1:]} kept the {thing} for ever.",
            f"And the {friend} never forgot {called}.",
            "They played until the sun went down.",
        ]
    )
