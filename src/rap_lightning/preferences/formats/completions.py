"""One prompt with several responses: scored, or ranked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rap_lightning.preferences.formats.base import Row, RowFormat
from rap_lightning.preferences.formats.scored_pairs import as_turns, spoken_turns, tools_of
from rap_lightning.preferences.pairs import BadRow, Judged, Response, is_blank, read_text, read_thoughts, with_thoughts

TEXT_NAMES = ("response", "text", "content", "answer", "completion")
SCORE_NAMES = ("overall_score", "score", "reward", "rating")


class ScoredCompletions(RowFormat):
    """``prompt`` (text or messages) and ``completions``, each ``{response, overall_score}`` and attributes beside or in
    ``scores``; or two lists of one length, ``responses`` and ``scores``.
    """

    name = "completions"
    expects = "prompt and completions [{response, overall_score}], or prompt, responses and scores"
    columns = ({"prompt", "completions"}, {"prompt", "responses", "scores"})
    reads = frozenset({"prompt", "completions", "responses", "scores", "tools", "prompt_id"})

    def read(self, rows: Sequence[Row]) -> Judged:
        (row,) = rows
        history = as_turns(row.get("prompt"))
        good, bad = read_each(self._entries(row), self._response)
        return Judged(tuple(history), good, bad, tools=tools_of(row), prompt_id=row.get("prompt_id"))

    def _entries(self, row: Row) -> list[tuple[str, Any]]:
        if row.get("responses") is not None and "completions" not in row:
            texts, scores = (a_list(row.get(name), name) for name in ("responses", "scores"))
            if len(texts) != len(scores):
                raise BadRow("responses, scores", "two lists of different lengths")
            return [
                (f"responses[{i}]", {"response": text, "overall_score": score})
                for i, (text, score) in enumerate(zip(texts, scores, strict=True))
            ]
        return [(f"completions[{i}]", c) for i, c in enumerate(a_list(row.get("completions"), "completions"))]

    def _response(self, entry: Any, where: str) -> Response:
        fields = an_object(entry, where)
        text_name = next((name for name in TEXT_NAMES if name in fields), TEXT_NAMES[0])
        text = response_text(fields.get(text_name), f"{where}.{text_name}")
        text = with_thoughts(read_thoughts(fields, where), text, f"{where}.{text_name}")
        score_name = next((name for name in SCORE_NAMES if name in fields), SCORE_NAMES[0])
        attributes = self.wanted(fields["scores"] if isinstance(fields.get("scores"), dict) else fields, where)
        if attributes and score_name not in fields:
            return Response(text, sum(attributes) / len(attributes), attributes, where)
        return Response(text, self.reward(fields.get(score_name), f"{where}.{score_name}"), attributes, where)


class RankedAnswers(RowFormat):
    """``prompt`` and ``answers``, each ``{answer, rank}`` with 1 for the best, as in Nectar.

    Ranks are converted to rewards: of k answers the one of rank r has the reward k + 1 - r, so that more is better.
    Declare a scale from 1 to k, or use a QuantileScale. Prompts written as "Human: ... Assistant:" become turns.
    """

    name = "ranked"
    expects = "prompt and answers [{answer, rank}]"
    columns = ({"prompt", "answers"},)
    reads = frozenset({"prompt", "answers"})

    def read(self, rows: Sequence[Row]) -> Judged:
        (row,) = rows
        prompt = row.get("prompt")
        history = spoken_turns(prompt) if isinstance(prompt, str) and "Human:" in prompt else as_turns(prompt)
        entries = a_list(row.get("answers"), "answers")
        good, bad = read_each(
            [(f"answers[{i}]", entry) for i, entry in enumerate(entries)],
            lambda entry, where: self._response(entry, where, len(entries)),
        )
        return Judged(tuple(history), good, bad)

    def _response(self, entry: Any, where: str, count: int) -> Response:
        fields = an_object(entry, where)
        text = response_text(fields.get("answer"), f"{where}.answer")
        rank = self.reward(fields.get("rank"), f"{where}.rank")
        if not self.blind and not 1 <= rank <= count:
            raise BadRow(f"{where}.rank", "a rank that is not from 1 to the number of answers", rank)
        return Response(text, count + 1 - rank, self.wanted(fields, where), where)


def a_list(value: Any, column: str) -> list[Any]:
    """Return a list; raise BadRow for anything else."""
    if value is None:
        raise BadRow(column, "null")
    if not isinstance(value, list):
        raise BadRow(column, "not a list", value, stops=True)
    return value


def an_object(value: Any, where: str) -> dict[str, Any]:
    """Return an object; raise BadRow for anything else."""
    if not isinstance(value, dict):
        raise BadRow(where, "not an object with a response and its score", value, stops=value is not None)
    return value


def response_text(value: Any, column: str) -> str:
    """Return the text of a response that is not blank."""
    text = read_text(value, column)
    if is_blank(text):
        raise BadRow(column, "an empty response", text)
    return text


def read_each(
    entries: Sequence[tuple[str, Any]], read: Callable[[Any, str], Response]
) -> tuple[list[Response], list[BadRow]]:
    """Return the responses that can be read, and why others can't; of equal texts the first is kept."""
    good: list[Response] = []
    bad: list[BadRow] = []
    seen: set[str] = set()
    for where, entry in entries:
        try:
            response = read(entry, where)
            if response.text.strip() in seen:
                raise BadRow(where, "the same text as another response to this prompt")
        except BadRow as problem:
            if problem.stops:
                raise
            bad.append(problem)
            continue
        seen.add(response.text.strip())
        good.append(response)
    return good, bad
