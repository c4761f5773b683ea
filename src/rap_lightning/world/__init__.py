"""The embedded world: prompts, a rule as judge, scored pairs and a tiny chat model, all made by the package itself.

It shows the whole method in minutes, on a CPU and without a download. Importing it does not import torch.

- `rule`: the score of a response, from 1 to 10.
- `world_data`: prompts, responses of graded quality, scored pairs.
- `base_model`: the tokenizer and the base model, trained on the spot.
- `make`: all of it, in a folder.
"""

from rap_lightning.world.make import make_world
from rap_lightning.world.rule import attributes, score
from rap_lightning.world.world_data import make_pairs, make_prompts

__all__ = ["attributes", "make_pairs", "make_prompts", "make_world", "score"]
