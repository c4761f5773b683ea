"""The embedded world: prompts, a rule as judge, scored pairs and a tiny chat model, all made by the package itself.

It shows the whole method in minutes, on a CPU and without a download.

- `rule`: the score of a response, from 1 to 10.
- `world_data`: prompts, responses of graded quality, scored pairs.
- `base_model`: the tokenizer and the base model, trained on the spot.
- `make`: all of it, in a folder.

The names below are imported on first use: importing this package does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rap_lightning.world.make import make_world as make_world
    from rap_lightning.world.rule import attributes as attributes
    from rap_lightning.world.rule import score as score
    from rap_lightning.world.world_data import GOAL_MESSAGE as GOAL_MESSAGE
    from rap_lightning.world.world_data import WorldPair as WorldPair
    from rap_lightning.world.world_data import make_pairs as make_pairs
    from rap_lightning.world.world_data import make_prompts as make_prompts

_HOMES = {
    "attributes": "rule",
    "score": "rule",
    "GOAL_MESSAGE": "world_data",
    "WorldPair": "world_data",
    "make_pairs": "world_data",
    "make_prompts": "world_data",
    "make_world": "make",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
