"""The data of the embedded world: prompts, responses of graded quality, scored pairs. Text only; same seed, same data.

A response starts from a perfect answer and gets faults, whose number depends on its quality; its score comes from the
rule alone. The two responses of a pair have similar qualities, as two answers of one assistant would: so many losers
are good (8 against 9) and many winners are bad (3 against 2), and goals are learned from those. Qualities are skewed
towards low, so that top scores are rare.

Settings: `lean` and `best` (how rare top scores are), `contrast` (how few good losers and bad winners), `judge_noise`
(how far the data's scores are from the rule's), `on_policy` (how many pairs a model wrote), `families` (kinds of
prompts) and `habit` (how far the base model's own answers are from the best ones). docs/world.md has the shares that
each setting gives.
"""

import hashlib
import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypedDict

from rap_lightning.preferences.pairs import Message
from rap_lightning.world.rule import COUNTS, FAMILIES, OPENINGS, WORDS, Task, attributes, parse_prompt, score

#: The system message that states a goal, byte for byte.
GOAL_MESSAGE = (
    "You are an assistant that generates responses for the instruction while implicitly achieving the following "
    "target scores (on a scale of 1-10, where 1 is lowest and 10 is highest):\nOverall score: {goal:g}."
)
#: Items of no topic that replace items of the topic. They are few, so that a small model soon learns what bad responses
#: have in common.
STRAYS = ("brick", "cloud", "dust", "moon", "paper", "sock")
#: The kinds of faults, repeated according to their frequency.
FAULTS = ("stray", "stray", "stray", "stray", "move", "move", "repeat", "add", "drop")
#: The families of prompts in the quickstart.
FAMILIES_BY_DEFAULT = ("words", "numbers")
#: The highest quality of a response by default: even then most responses have a fault, which keeps the score 10 rare.
BEST = 0.85
#: How often the base model's training responses have the faults of :func:`spoil`, by default.
HABIT = 0.7
#: Standard deviation of each response's quality around its pair's mean.
SPREAD = 0.4


class WorldPair(TypedDict):
    """A scored pair in the format of HuggingFaceH4/ultrafeedback_binarized.

    `prompt_id` is the SHA-256 of the prompt in hexadecimal. `chosen` and `rejected` are a user turn and an assistant
    turn. Scores are those of the rule, possibly with noise, 1 to 10, and `score_chosen >= score_rejected`.
    `scores_chosen` and `scores_rejected` are its attributes.
    """

    prompt: str
    prompt_id: str
    chosen: list[Message]
    rejected: list[Message]
    score_chosen: float
    score_rejected: float
    scores_chosen: dict[str, float]
    scores_rejected: dict[str, float]


def make_prompts(seed: int, families: Sequence[str] = FAMILIES_BY_DEFAULT) -> tuple[list[str], list[str]]:
    """Return all prompts of the world in random order: four fifths to train on, one fifth to test on.

    Args:
        seed: seed of the order, and so of the split.
        families: kinds of prompts, keys of `rule.FAMILIES`, each at most once. Words have 144 prompts, numbers 48.

    Raises:
        ValueError: `families` is empty, has duplicates or unknown names.
    """
    unknown = [family for family in families if family not in FAMILIES]
    if unknown or not families or len(set(families)) != len(families):
        raise ValueError(f"families must be different names of {', '.join(FAMILIES)}; got {list(families)}")
    asked = [(topic, backwards) for topics, _, backwards in map(FAMILIES.__getitem__, families) for topic in topics]
    prompts = [
        Task(count, topic, backwards).prompt(opening)
        for opening, count, (topic, backwards) in itertools.product(OPENINGS, COUNTS, asked)
    ]
    random.Random(f"prompts {seed}").shuffle(prompts)
    cut = round(0.2 * len(prompts))
    return prompts[cut:], prompts[:cut]


def respond(prompt: str, quality: float, rng: random.Random) -> str:
    """Return a perfect response after `2 * count` chances of a fault, each with probability `1 - quality`."""
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


def spoil(response: str) -> str:
    """Return a response with one item too few, and with a stray, always the same, as the last one.

    Random faults are what the likeliest response of a model lacks: a base trained on them alone scores as high at a low
    temperature as any policy trained from it. A fault that most responses share is in the likeliest one too, and leaves
    preference training something to do at every temperature.
    """
    return ", ".join([*response.split(", ")[:-2], STRAYS[0]])


def make_pairs(
    prompts: list[str],
    count: int,
    seed: int,
    *,
    lean: float = 0.3,
    best: float = BEST,
    contrast: float = 0.0,
    judge_noise: float = 0.0,
    on_policy: float = 0.0,
    sample: Callable[[list[str]], list[str]] | None = None,
) -> list[WorldPair]:
    """Return `count` scored pairs, cycling through `prompts`.

    Args:
        seed: seed of every response that is not sampled, and of the judge's noise.
        lean: a pair's mean quality is `1 - u ** (1 / (1 + lean))` with u uniform in 0..1.
        best, contrast, judge_noise, on_policy: as in :func:`rap_lightning.world.make.make_world`. Overall scores with
            noise stay half points from 1 to 10.
        sample: a model that writes a response to each of the given prompts; needed if `on_policy` is above 0.
    """
    if on_policy > 0 and sample is None:
        raise ValueError("on_policy above 0 needs a model's responses: pass sample")
    rng = random.Random(f"pairs {seed}")
    asked = list(itertools.islice(itertools.cycle(prompts), count))
    responses: list[tuple[str, str]] = []
    for prompt in asked:
        middle = _quality(rng, lean)
        first, second = (
            respond(prompt, (1 - contrast) * min(best, max(0.0, rng.gauss(middle, SPREAD))) + contrast * end, rng)
            for end in (best, 0.0)
        )
        responses.append((first, second))
    if sample is not None and on_policy > 0:
        chance = random.Random(f"on-policy {seed}")
        own = [place for place in range(count) if chance.random() < on_policy]
        texts = sample([asked[place] for place in own for _ in range(2)])
        for i, place in enumerate(own):
            responses[place] = (texts[2 * i], texts[2 * i + 1])
    rng = random.Random(f"judge {seed}")
    return [_pair(prompt, both, judge_noise, rng) for prompt, both in zip(asked, responses, strict=True)]


def make_examples(
    prompts: list[str], count: int, seed: int, *, goal_share: float, goal_noise: float, habit: float
) -> Iterator[list[Message]]:
    """Yield `count` graded responses to random prompts, some of them under a goal: the base model's training data.

    The goals start exact and become noisier: a model soon learns that a goal means something, and then to rely on it
    little. It sees better responses than the pairs have, and so learns sooner what a good one looks like.

    Args:
        goal_share: fraction of the examples with the goal message, 0 to 1.
        goal_noise: standard deviation, in points, of the last goals around the true score; the first have none.
        habit: fraction of the responses with the faults of :func:`spoil`, 0 to 1.
    """
    rng = random.Random(f"examples {seed}")
    for done in range(count):
        prompt = rng.choice(prompts)
        response = respond(prompt, _quality(rng, lean=-0.3), rng)
        if rng.random() < habit:
            response = spoil(response)
        true = score(prompt, response)
        turns = _turns(prompt, response)
        if rng.random() < goal_share:
            noisy = min(10.0, max(1.0, round(2 * rng.gauss(true, goal_noise * done / count)) / 2))
            turns.insert(0, {"role": "system", "content": GOAL_MESSAGE.format(goal=noisy)})
        yield turns


def vocabulary(prompts: Iterable[str]) -> list[str]:
    """Return the tokenizer's training texts: words with and without a leading space, and the whole goal message."""
    words = {"system", "user", "assistant", *STRAYS, *itertools.chain.from_iterable(WORDS.values())}
    words |= {word for prompt in prompts for word in prompt.rstrip(".").split()}
    words |= {str(number) for number in range(11)}
    return [text for word in sorted(words) for text in (word, f" {word}")] * 4 + [GOAL_MESSAGE] * 20


def _judge(prompt: str, response: str, noise: float, rng: random.Random) -> tuple[float, dict[str, float]]:
    """Return the rule's overall score and attributes, with noise on every number."""
    overall, parts = score(prompt, response), attributes(prompt, response)
    if noise == 0:
        return overall, parts
    noisy = {name: min(10.0, max(1.0, round(rng.gauss(value, noise), 6))) for name, value in parts.items()}
    return min(10.0, max(1.0, round(2 * rng.gauss(overall, noise)) / 2)), noisy


def _pair(prompt: str, responses: tuple[str, str], noise: float, rng: random.Random) -> WorldPair:
    judged = [(*_judge(prompt, response, noise, rng), response) for response in responses]
    (won, won_parts, chosen), (lost, lost_parts, rejected) = sorted(judged, key=lambda one: one[0], reverse=True)
    return {
        "prompt": prompt,
        "prompt_id": hashlib.sha256(prompt.encode()).hexdigest(),
        "chosen": _turns(prompt, chosen),
        "rejected": _turns(prompt, rejected),
        "score_chosen": won,
        "score_rejected": lost,
        "scores_chosen": won_parts,
        "scores_rejected": lost_parts,
    }


def _quality(rng: random.Random, lean: float) -> float:
    return 1 - math.pow(rng.random(), 1 / (1 + lean))


def _turns(prompt: str, response: str) -> list[Message]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
