"""HelpSteer and HelpSteer2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rap_lightning.preferences.formats.base import Row, RowFormat
from rap_lightning.preferences.formats.completions import read_each, response_text
from rap_lightning.preferences.formats.context_columns import CONTEXT_COLUMNS
from rap_lightning.preferences.formats.scored_pairs import as_turns
from rap_lightning.preferences.pairs import Judged, Response


class HelpSteer(RowFormat):
    """Rows of ``prompt``, ``response`` and five attributes from 0 to 4; neighbouring rows share a prompt.

    The overall reward is helpfulness; declare a scale from 0 to 4.
    """

    name = "helpsteer"
    expects = "prompt, response, helpfulness, correctness, coherence, complexity, verbosity"
    columns = ({"prompt", "response", "helpfulness"},)
    reads = frozenset({"prompt", "response", "helpfulness"})
    grouped = True

    def group_key(self, row: Row) -> Any:
        prompt = row.get("prompt")
        context = [row.get(name) for name in CONTEXT_COLUMNS]
        return [prompt if isinstance(prompt, str) else repr(prompt), *context]

    def read(self, rows: Sequence[Row]) -> Judged:
        history = as_turns(rows[0].get("prompt"))
        good, bad = read_each(
            [(f"response (row {i + 1} of its prompt)", r) for i, r in enumerate(rows)], self._response
        )
        return Judged(tuple(history), good, bad)

    def _response(self, row: Row, where: str) -> Response:
        text = response_text(row.get("response"), where)
        reward = self.reward(row.get("helpfulness"), "helpfulness")
        return Response(text, reward, self.wanted(row, "row"), where)
