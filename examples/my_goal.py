"""A goal text of one's own: short, in words, before the user's turn.

    rap-lightning fit --config configs/quickstart.yaml --data.goal my_goal.Stars --data.goal.scale.high 10

Start rap-lightning beside this file, or put its folder on PYTHONPATH. `rap-lightning inspect` with the same options
shows two pairs as they are trained on.
"""

from collections.abc import Sequence

from rap_lightning import GoalTemplate, RewardScale
from rap_lightning.preferences.goal_spec import Number, Wording
from rap_lightning.preferences.goals import OVERALL, Placement


class Stars(GoalTemplate):
    """``Wanted: 4.5 of 10 stars.``

    >>> Stars(RewardScale(1, 10)).text(4.5)
    'Wanted: 4.5 of 10 stars.'
    """

    def __init__(self, scale: RewardScale = RewardScale(), placement: Placement = "user") -> None:  # noqa: B008
        super().__init__(scale, placement)

    def text(self, goal: float, attributes: Sequence[float] = ()) -> str:
        """The sentence for one goal, on the scale that goals state."""
        return f"Wanted: {self.scale.printed(goal)} of {self.scale.printed(self.scale.high)} stars."

    def wording(self) -> Wording:
        """The same as words around a number: with it, the exported chat template can be asked for other goals."""
        scale = self.scale
        number = Number(OVERALL, scale.low, scale.high, scale.decimals, scale.best)
        return Wording(("Wanted: ", f" of {scale.printed(scale.high)} stars."), (number,), OVERALL)
