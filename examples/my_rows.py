"""Rows of one's own shape, turned into one that rap-lightning knows.

    rap-lightning inspect --source reviews.jsonl --format my_rows.adapt

`fit` takes the same function as --data.format my_rows.adapt. Here a row is a question with answers that people gave
stars to: {"question": "...", "answers": [{"text": "...", "stars": 4}, ...], "flagged": false}.
"""

from typing import Any


def adapt(row: dict[str, Any]) -> dict[str, Any] | None:
    """The `completions` layout; None leaves a row out, and the report counts it.

    >>> adapt({"question": "2 + 2?", "answers": [{"text": "4", "stars": 5}, {"text": "5", "stars": 1}]})
    {'prompt': '2 + 2?', 'completions': [{'response': '4', 'overall_score': 5}, {'response': '5', 'overall_score': 1}]}
    """
    if row.get("flagged"):
        return None
    answers = [{"response": answer["text"], "overall_score": answer["stars"]} for answer in row["answers"]]
    return {"prompt": row["question"], "completions": answers}
