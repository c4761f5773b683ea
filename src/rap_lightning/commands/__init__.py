"""Commands beside the trainer's: typed functions that become command lines."""

TRAINER_COMMANDS = ("fit", "validate", "test", "predict")
COMMANDS = (
    *TRAINER_COMMANDS,
    "plan",
    "inspect",
    "relabel",
    "generate",
    "score",
    "rounds",
    "evaluate",
    "export",
    "report",
    "configs",
    "schema",
    "completion",
)
