"""ShareGPT-style conversations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rap_lightning.preferences.formats.base import Row
from rap_lightning.preferences.formats.scored_pairs import ScoredPairs
from rap_lightning.preferences.pairs import BadRow, Judged

ROLE_OF = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


class ShareGPT(ScoredPairs):
    """``conversations`` [{from, value}] with the two responses in ``chosen`` and ``rejected`` {from, value}."""

    name = "sharegpt"
    expects = (
        "conversations [{from, value}], chosen {from, value}, rejected {from, value}, score_chosen, score_rejected"
    )
    columns = ({"conversations", "chosen", "rejected"},)
    reads = ScoredPairs.reads - {"prompt"} | {"conversations"}

    def look(self, rows: Sequence[Row]) -> None:
        super().look(rows)
        self.plain = False

    def read(self, rows: Sequence[Row]) -> Judged:
        (row,) = rows
        turns = row.get("conversations")
        if not isinstance(turns, list):
            raise BadRow("conversations", "not a list of turns", turns, stops=turns is not None)
        prompt = [_message(turn, f"conversations[{i}]") for i, turn in enumerate(turns)]
        sides = {side: [_message(row.get(side), side)] for side in ("chosen", "rejected")}
        return super().read([{**row, "prompt": prompt, **sides}])


def _message(turn: Any, where: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise BadRow(where, "not a turn with from and value", turn, stops=turn is not None)
    if not isinstance(turn.get("from"), str) or turn["from"] not in ROLE_OF:
        raise BadRow(f"{where}.from", f"none of {', '.join(ROLE_OF)}", turn.get("from"))
    return {"role": ROLE_OF[turn["from"]], "content": turn.get("value")}
