"""``python -m rap_lightning.world FOLDER``: make the embedded world with its base model (fit makes it itself).

For example: python -m rap_lightning.world runs/noisy --judge_noise 2 --families [words,numbers,words-backwards]
"""

import sys

from jsonargparse import auto_cli

from rap_lightning.world.make import make_world

if __name__ == "__main__":
    try:
        auto_cli(make_world, as_positional=True)
    except ValueError as error:
        sys.exit(f"error: {error}")
