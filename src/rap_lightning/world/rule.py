"""The judge of the embedded world: the score of a response by a rule that can be checked by hand.

A prompt asks for some items of a topic in an order, a response is items with commas between them:

    List 5 fruits in alphabetical order.        apple, cherry, fig, lemon, plum

A response of m items to a prompt that asks for n has four shares between 0 and 1:

- `topic`: items that belong to the topic, over m;
- `distinct`: different items, over m;
- `count`: `1 - |m - n| / n`, never below 0;
- `order`: items in place, over m. The first item is in place, and each later one that comes strictly after
  its neighbour on the left (words by alphabet, numbers by size; strictly before it where the prompt asks for that).

The overall score is `1 + 9 * topic * distinct * count * (1 + order) / 2`, rounded to half points, quarters up. So it is
10 only if everything is right, each fault costs its share of the rest (order at half weight), and garbage scores 1. The
attributes are the four shares as `1 + 9 * share`, unrounded.

A worked example. Of four items three are fruits (3/4), all four differ (4/4), four came where five were asked (4/5),
and "apple", "plum" and "tiger" are in place but "fig" is not, for it sorts before "plum" (3/4). So the score is
1 + 9 * 0.75 * 1 * 0.8 * 0.875 = 5.725, which rounds to 5.5.

>>> asked = "List 5 fruits in alphabetical order."
>>> attributes(asked, "apple, plum, fig, tiger")
{'topic': 7.75, 'distinct': 10.0, 'count': 8.2, 'order': 7.75}
>>> score(asked, "apple, plum, fig, tiger")
5.5
>>> score(asked, "apple, cherry, fig, lemon, plum"), score(asked, "Sorry, I can't."), score(asked, "")
(10.0, 1.0, 1.0)

There are four families of prompts: words in alphabetical order, numbers in rising order, and both backwards ("in
reverse alphabetical order", "in falling order").

>>> score("List 3 fruits in reverse alphabetical order.", "plum, fig, apple")
10.0

Scores are half points, because goals are printed with at most one decimal: there are 19 goals, few enough for each to
occur often.
"""

import math
import re
from dataclasses import dataclass
from itertools import pairwise

#: Topic -> its words, in alphabetical order. No word is in two topics, so "off topic" is well defined.
WORDS: dict[str, tuple[str, ...]] = {
    topic: tuple(words.split())
    for topic, words in {
        "fruits": "apple banana cherry fig grape kiwi lemon plum",
        "animals": "ape bear cat dog fox horse lion wolf",
        "colours": "amber black cyan green pink red violet white",
        "tools": "axe brush drill file hammer ladder nail saw",
        "drinks": "beer cider gin juice milk rum tea water",
        "sports": "boxing chess diving golf hockey judo rugby tennis",
    }.items()
}
#: Topic -> its numbers, ascending.
NUMBERS: dict[str, tuple[int, ...]] = {
    "numbers below fifty": tuple(range(10, 50)),
    "numbers above fifty": tuple(range(51, 100)),
}
#: How a prompt may open.
OPENINGS = ("List", "Name", "Give me", "Show me", "Tell me", "Write")
#: Numbers of items in the prompts of the data. The rule itself reads any number from 1.
COUNTS = range(3, 7)

#: Family of prompts -> its topics, the order it asks for, and whether that order is backwards.
FAMILIES: dict[str, tuple[tuple[str, ...], str, bool]] = {
    "words": (tuple(WORDS), "alphabetical", False),
    "numbers": (tuple(NUMBERS), "rising", False),
    "words-backwards": (tuple(WORDS), "reverse alphabetical", True),
    "numbers-backwards": (tuple(NUMBERS), "falling", True),
}

#: The backward orders.
BACKWARDS = tuple(order for _, order, backwards in FAMILIES.values() if backwards)
_TOPICS = "|".join(f"(?:{'|'.join(topics)}) in {order}" for topics, order, _ in FAMILIES.values())
_PROMPT = re.compile(rf"(?:{'|'.join(OPENINGS)}) ([1-9]\d*) ({_TOPICS}) order\.")


@dataclass(frozen=True)
class Task:
    """The task of a prompt: `count` items, at least 1, of `topic`, a key of `WORDS` or `NUMBERS`, maybe backwards."""

    count: int
    topic: str
    backwards: bool = False

    @property
    def family(self) -> str:
        """The kind of prompt, a key of `FAMILIES`."""
        return next(name for name, (topics, _, b) in FAMILIES.items() if self.topic in topics and b == self.backwards)

    @property
    def items(self) -> tuple[str, ...]:
        """All items of the topic, in the requested order."""
        items = tuple(map(str, NUMBERS[self.topic])) if self.topic in NUMBERS else WORDS[self.topic]
        return items[::-1] if self.backwards else items

    def prompt(self, opening: str = "List") -> str:
        """Return the prompt of this task, beginning with `opening`, one of `OPENINGS`."""
        return f"{opening} {self.count} {self.topic} in {FAMILIES[self.family][1]} order."


def parse_prompt(prompt: str) -> Task:
    """Return the task of a prompt; surrounding spaces are ignored.

    Raises:
        ValueError: the prompt is not of this world. A response may be any text, but a prompt that the rule can't read
            has no score, and a made-up number would hide an error.
    """
    match = _PROMPT.fullmatch(prompt.strip())
    if match is None:
        raise ValueError(f"not a prompt of this world: {prompt!r}; one looks like {Task(5, 'fruits').prompt()!r}")
    topic, _, order = match[2].partition(" in ")
    return Task(int(match[1]), topic, order in BACKWARDS)


def attributes(prompt: str, response: str) -> dict[str, float]:
    """Return the attributes `topic`, `distinct`, `count` and `order` of a response, each from 1 to 10, unrounded.

    Case, spaces around items and a final full stop are ignored.

    Raises:
        ValueError: `prompt` is not of this world.
    """
    return {name: round(1 + 9 * share, 6) for name, share in _shares(parse_prompt(prompt), response).items()}


def score(prompt: str, response: str) -> float:
    """Return the overall score of a response: 1, 1.5, ... 10.

    Raises:
        ValueError: `prompt` is not of this world.
    """
    shares = _shares(parse_prompt(prompt), response)
    overall = 1 + 9 * shares["topic"] * shares["distinct"] * shares["count"] * (1 + shares["order"]) / 2
    # The small term rounds a quarter such as 5.25 up, whatever the rounding error of the product.
    return math.floor(2 * overall + 0.5 + 1e-9) / 2


def _shares(task: Task, response: str) -> dict[str, float]:
    items = [item.strip() for item in response.strip().removesuffix(".").casefold().split(",")]
    on_topic = set(task.items)
    return {
        "topic": sum(item in on_topic for item in items) / len(items),
        "distinct": len(set(items)) / len(items),
        "count": max(0.0, 1 - abs(len(items) - task.count) / task.count),
        "order": (1 + sum(_follows(left, right, task.backwards) for left, right in pairwise(items))) / len(items),
    }


def _follows(left: str, right: str, backwards: bool) -> bool:
    first, second = (right, left) if backwards else (left, right)
    return _sort_key(first) < _sort_key(second)


def _sort_key(item: str) -> tuple[int, str]:
    # Numbers by size and before words, so that words among numbers (and the reverse) are still ordered.
    return (len(item) if item.isdecimal() else 1000, item)
