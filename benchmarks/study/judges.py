"""What a real instruct model is asked for, and judges of its responses that anyone can check, 1 to 10."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any


def reading_ease(prompt: str, response: str) -> float:
    """Flesch's reading ease (1948), 206.835 - 1.015 words/sentence - 84.6 syllables/word, from 0-100 to 1-10.

    Syllables are groups of vowels, a silent e at the end left out. Below 15 words the score is 1, because the shortest
    texts would be the easiest.

    >>> reading_ease("", "The cat sat on the mat. " * 4), reading_ease("", "Too short.")
    (10.0, 1.0)
    """
    words = re.findall(r"[a-z']+", response.lower())
    if len(words) < 15:
        return 1.0
    syllables = sum(max(1, len(re.findall(r"[aeiouy]+", word.removesuffix("e")))) for word in words)
    ease = 206.835 - 1.015 * len(words) / len(_sentences(response)) - 84.6 * syllables / len(words)
    return 1 + 9 * min(1.0, max(0.0, ease / 100))


def sentiment(prompt: str, response: str) -> float:
    """VADER's compound score (Hutto and Gilbert 2014), from -1 to 1, as 1 to 10; 1 below 15 words."""
    if len(response.split()) < 15:
        return 1.0
    return 5.5 + 4.5 * float(_vader().polarity_scores(response)["compound"])


@cache
def _vader() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


CONSTRAINTS: dict[str, Callable[[str], bool]] = {
    "Use fewer than 25 words.": lambda text: 8 <= len(text.split()) < 25,
    "Write exactly two sentences.": lambda text: len(_sentences(text)) == 2 and text.rstrip()[-1:] in ".!?",
    "Do not use commas.": lambda text: "," not in text,
    "Use the word today.": lambda text: "today" in re.findall(r"[a-z]+", text.lower()),
    "Start with the word Well.": lambda text: re.match(r"\W*well\b", text.lower()) is not None,
    "End with a question.": lambda text: text.rstrip().endswith("?"),
}
"""What a prompt may ask for in its own words, and whether a response does it."""


def constraints(prompt: str, response: str) -> float:
    """The share of the prompt's constraints that the response meets, as 1 to 10; 1 below 8 words.

    >>> constraints("Talk of ink. Do not use commas. End with a question.", "Ink is as old as writing is, is it not?")
    5.5
    """
    if len(response.split()) < 8:
        return 1.0
    asked = [met for text, met in CONSTRAINTS.items() if text in prompt]
    return 1 + 9 * sum(met(response) for met in asked) / len(asked)


def _sentences(text: str) -> list[str]:
    return re.findall(r"[^.!?]*[.!?]+", text) or [text]


@dataclass(frozen=True)
class Task:
    """What the model is asked about a topic, and the judge of what it says."""

    ask: Callable[[str], str]
    judge: Callable[[str, str], float]


def _constrained(topic: str) -> str:
    return " ".join([f"Say something about {topic}.", *random.Random(topic).sample(list(CONSTRAINTS), 3)])


TASKS = {
    "reading": Task(lambda topic: f"Explain {topic} in two or three sentences.", reading_ease),
    "sentiment": Task(lambda topic: f"Describe {topic} in two or three sentences.", sentiment),
    "constraints": Task(_constrained, constraints),
}
