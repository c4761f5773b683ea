"""A judge of one's own: a function of prompt and response.

    rap-lightning score --source samples.jsonl --output scored.jsonl --judge Function --judge.function my_judge.brevity

What it returns beside `overall_score` becomes an attribute, which `--data.goal AttributeGoal` can state.
"""


def brevity(prompt: str, response: str) -> dict[str, float]:
    """From 1 to 10: ten words or fewer are best, and repeating the prompt is not an answer.

    >>> brevity("Name a fruit.", "An apple.")
    {'overall_score': 10.0, 'words': 10.0}
    >>> brevity("Name a fruit.", "Name a fruit.")["overall_score"]
    1.0
    """
    count = len(response.split())
    words = 10.0 if count <= 10 else max(1.0, 10.0 - (count - 10) / 5)
    return {"overall_score": 1.0 if response.strip() in ("", prompt.strip()) else words, "words": words}
