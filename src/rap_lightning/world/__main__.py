"""``python -m rap_lightning.world FOLDER``: make the small world, its base model among it, for anything but fit."""

import sys

from rap_lightning.world.make import make_world

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m rap_lightning.world FOLDER")
    try:
        make_world(sys.argv[1])
    except ValueError as error:
        sys.exit(f"error: {error}")
