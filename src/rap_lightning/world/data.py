"""The data of the small world: prompts, responses of graded quality, scored pairs. Text only; same seed, same data.

A response starts from a perfect answer and gets faults, so its score comes from the rule and from nothing else. How
many faults is a matter of its quality. The two responses of a pair have qualities near each other, as two answers of
one assistant would: that is why many losers are good (8 against 9) and many winners are bad (3 against 2), and those
are what goals are learnt from. Qualities lean low, so that top scores are rare.
"""

import hashlib
import itertools
import math
import random
from collections.abc import Iterable, Iterator
from typing import TypedDict

from rap_lightning.world.rule import COUNTS, NUMBERS, OPENINGS, WORDS, Task, parse_prompt, score

#: What the system message says before the goal, byte for byte.
GOAL_MESSAGE = (
    "You are an assistant that generates responses for the instruction while implicitly achieving the following "
    "target scores (on a scale of 1-10, where 1 is lowest and 10 is highest):\nOverall score: {goal:g}."
)
#: What stands where an item on the topic should: odds and ends, of no topic. They are few, so that a small model sees
#: soon what bad responses have in common.
STRAYS = ("brick", "cloud", "dust", "moon", "paper", "sock")
#: The kinds of faults, each as often as it is to happen.
FAULTS = ("stray", "stray", "stray", "stray", "move", "move", "repeat", "add", "drop")
#: The highest quality in a pair: even then most responses have a fault, which keeps the score 10 rare.
BEST = 0.85


class Message(TypedDict):
    """One turn: `role` is `system`, `user` or `assistant`."""

    role: str
    content: str


class Pair(TypedDict):
    """A scored pair in the layout of HuggingFaceH4/ultrafeedback_binarized.

    `prompt_id` is the SHA-256 of the prompt in hexadecimal. `chosen` and `rejected` are a user turn and an assistant
    turn. Scores are the rule's, 1 to 10, and `score_chosen >= score_rejected`.
    """

    prompt: str
    prompt_id: str
    chosen: list[Message]
    rejected: list[Message]
    score_chosen: float
    score_rejected: float


class Example(TypedDict):
    """A response for supervised training: its turns, the last of them the assistant's, and its true score, 1 to 10."""

    messages: list[Message]
    score: float


def make_prompts(seed: int, test_share: float = 0.2) -> tuple[list[str], list[str]]:
    """All prompts of the world in random order, cut into train and test: no prompt is in both.

    Args:
        seed: decides the order, and so the cut.
        test_share: part of the prompts that is kept for testing, between 0 and 1.

    Raises:
        ValueError: `test_share` is not between 0 and 1, both excluded.
    """
    if not 0 < test_share < 1:
        raise ValueError(f"test_share must lie between 0 and 1, both excluded; got {test_share}")
    prompts = [
        Task(count, topic).prompt(opening)
        for opening, count, topic in itertools.product(OPENINGS, COUNTS, [*WORDS, *NUMBERS])
    ]
    random.Random(f"prompts {seed}").shuffle(prompts)
    cut = round(test_share * len(prompts))
    return prompts[cut:], prompts[:cut]


def respond(prompt: str, quality: float, rng: random.Random) -> str:
    """A response to `prompt`: a perfect one with `2 * count` chances of a fault, each taken with `1 - quality`.

    Args:
        prompt: a prompt of this world.
        quality: from 0 (riddled with faults) to 1 (perfect).
        rng: where the chances come from.

    Raises:
        ValueError: `prompt` is not of this world, or `quality` is not from 0 to 1.
    """
    if not 0 <= quality <= 1:
        raise ValueError(f"quality must be from 0 to 1; got {quality}")
    task = parse_prompt(prompt)
    right = task.items
    items = [right[k] for k in sorted(rng.sample(range(len(right)), task.count))]
    for _ in range(2 * task.count):
        if rng.random() < quality:
            continue
        place = rng.randrange(len(items))
        match rng.choice(FAULTS):
            case "stray":
                items[place] = rng.choice(STRAYS)
            case "repeat":
                items[place] = rng.choice(items)
            case "move":
                items.insert(rng.randrange(len(items)), items.pop(place))
            case "add":
                items.insert(place, rng.choice(right))
            case _ if len(items) > 1:
                del items[place]
    return ", ".join(items)


def make_pairs(prompts: list[str], count: int, seed: int, *, lean: float = 0.3, spread: float = 0.4) -> list[Pair]:
    """`count` scored pairs, going through `prompts` in turn as often as it takes.

    Args:
        prompts: prompts of this world, at least one.
        count: number of pairs.
        seed: decides every response.
        lean: how far qualities lean low. A pair's middle quality is `1 - u ** (1 / (1 + lean))`, u even in 0..1.
        spread: how far, in quality, the two responses lie from the middle: the standard deviation of each.

    Raises:
        ValueError: there are no prompts, or one is not of this world.
    """
    if not prompts:
        raise ValueError("make_pairs needs at least one prompt")
    rng = random.Random(f"pairs {seed}")
    return [_pair(prompt, rng, lean, spread) for prompt in itertools.islice(itertools.cycle(prompts), count)]


def make_examples(
    prompts: list[str], count: int, seed: int, *, goal_share: float, goal_noise: float, lean: float = -0.3
) -> Iterator[Example]:
    """`count` graded responses to random prompts, some of them under a goal, to train the base model on, in this order.

    The goals begin exact and get worse: a model learns soon that a goal means something, and then to trust it little.

    Args:
        prompts: prompts of this world, at least one.
        count: number of examples.
        seed: decides everything.
        goal_share: part of the examples that have the goal message, 0 to 1.
        goal_noise: standard deviation, in points, of the last goals around the true score; the first have none.
        lean: how far qualities lean low, as in `make_pairs`; below 0 they lean high. By default the base sees better
            responses than the pairs hold, and so learns sooner what a good one looks like.
    """
    rng = random.Random(f"examples {seed}")
    for done in range(count):
        prompt = rng.choice(prompts)
        response = respond(prompt, _quality(rng, lean), rng)
        true = score(prompt, response)
        turns = _turns(prompt, response)
        if rng.random() < goal_share:
            noisy = min(10.0, max(1.0, round(2 * rng.gauss(true, goal_noise * done / count)) / 2))
            turns.insert(0, {"role": "system", "content": GOAL_MESSAGE.format(goal=noisy)})
        yield {"messages": turns, "score": true}


def vocabulary(prompts: Iterable[str]) -> list[str]:
    """The words of the world, each as often as it helps to learn it: what the tokenizer is trained on.

    Words of prompts and responses stand alone, with and without the space before them. The goal message stands whole.
    """
    words = {"system", "user", "assistant", *STRAYS, *itertools.chain.from_iterable(WORDS.values())}
    words |= {word for prompt in prompts for word in prompt.rstrip(".").split()}
    words |= {str(number) for number in range(11)}
    return [text for word in sorted(words) for text in (word, f" {word}")] * 4 + [GOAL_MESSAGE] * 20


def _pair(prompt: str, rng: random.Random, lean: float, spread: float) -> Pair:
    middle = _quality(rng, lean)
    first, second = (respond(prompt, min(BEST, max(0.0, rng.gauss(middle, spread))), rng) for _ in range(2))
    chosen, rejected = sorted((first, second), key=lambda response: score(prompt, response), reverse=True)
    return {
        "prompt": prompt,
        "prompt_id": hashlib.sha256(prompt.encode()).hexdigest(),
        "chosen": _turns(prompt, chosen),
        "rejected": _turns(prompt, rejected),
        "score_chosen": score(prompt, chosen),
        "score_rejected": score(prompt, rejected),
    }


def _quality(rng: random.Random, lean: float) -> float:
    return 1 - math.pow(rng.random(), 1 / (1 + lean))


def _turns(prompt: str, response: str) -> list[Message]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
