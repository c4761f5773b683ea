"""Raw openbmb/UltraFeedback."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rap_lightning.preferences.formats.base import Row, RowFormat
from rap_lightning.preferences.formats.completions import a_list, an_object, read_each, response_text
from rap_lightning.preferences.formats.scored_pairs import as_turns
from rap_lightning.preferences.pairs import BadRow, Judged, Response, read_number

CONTRADICTING = "overall_score 10 though the mean rating is 2 or less (a known error of early UltraFeedback)"


class UltraFeedback(RowFormat):
    """``instruction`` and ``completions`` with ``overall_score`` and ``annotations.<attribute>.Rating`` from 1 to 5.

    The reward is overall_score. As in the paper, a response with any rating "N/A" is left out; so is one whose
    overall_score contradicts its ratings. Attributes are the ratings; declare a scale from 1 to 5 for them.
    """

    name = "ultrafeedback"
    expects = "instruction and completions [{response, overall_score, annotations}]"
    columns = ({"instruction", "completions"},)
    reads = frozenset({"instruction", "completions"})

    def read(self, rows: Sequence[Row]) -> Judged:
        (row,) = rows
        history = as_turns(row.get("instruction"), "instruction")
        completions = a_list(row.get("completions"), "completions")
        good, bad = read_each([(f"completions[{i}]", c) for i, c in enumerate(completions)], self._response)
        return Judged(tuple(history), good, bad)

    def _response(self, entry: Any, where: str) -> Response:
        fields = an_object(entry, where)
        text = response_text(fields.get("response"), f"{where}.response")
        if self.blind:
            return Response(text, column=where)
        overall = read_number(fields.get("overall_score"), f"{where}.overall_score")
        ratings = self._ratings(fields.get("annotations"), f"{where}.annotations")
        if overall == 10 and ratings and sum(ratings.values()) / len(ratings) <= 2:
            raise BadRow(f"{where}.overall_score", CONTRADICTING)
        return Response(text, overall, self.wanted(ratings, f"{where}.annotations"), where)

    def _ratings(self, annotations: Any, column: str) -> dict[str, float]:
        if annotations is None:
            return {}
        if not isinstance(annotations, dict):
            raise BadRow(column, "not an object with a rating for each attribute", annotations, stops=True)
        return {name: _rating(given, f"{column}.{name}") for name, given in annotations.items()}


def _rating(given: Any, column: str) -> float:
    if not isinstance(given, dict):
        raise BadRow(column, "not an object with one Rating", given, stops=given is not None)
    rating, where = given.get("Rating"), f"{column}.Rating"
    if rating is None or rating == "N/A":
        raise BadRow(where, "a rating N/A or null")
    if isinstance(rating, str):  # UltraFeedback writes its ratings as text
        if not rating.strip().isdigit():
            raise BadRow(where, "a rating that is not a whole number", rating)
        return float(rating)
    return read_number(rating, where)
