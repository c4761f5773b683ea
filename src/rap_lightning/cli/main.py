"""The entry point. Answers --help and --version itself: importing Lightning takes seconds."""

from __future__ import annotations

import os
import select
import sys
from importlib import import_module
from pickle import UnpicklingError

from rap_lightning import __version__
from rap_lightning.commands import COMMANDS, TRAINER_COMMANDS
from rap_lightning.errors import UserError, say

HELP = f"""rap-lightning {__version__}: reward-augmented preference alignment on Lightning

usage: rap-lightning COMMAND [options]
       rap-lightning COMMAND --help

train and measure (configs stack; any option of a config can be given as a flag):
  fit        train a policy:      rap-lightning fit --config configs/quickstart.yaml
  validate   metrics of a model on the validation split
  test       the same, logged as test/...
  predict    generate at a goal:  rap-lightning predict --config CONFIG --ckpt_path RUN/checkpoints/last.ckpt

before you pay (no GPU needed):
  plan       memory per rank, time of a step, whether it fits, and what to change:
                              rap-lightning plan --config CONFIG --devices 8 --nodes 4 --gpu h100-80gb

look at data (fast, no training):
  inspect    what would be trained on, with counts, rewards, lengths and examples:
                              rap-lightning inspect --source my-pairs/
  relabel    write the relabelled data as parquet:
                              rap-lightning relabel --source my-pairs/ --output relabelled/

measure:
  evaluate   does the goal steer? scores at each goal, unlearning, extrapolation, discrimination, length:
                              rap-lightning evaluate --model RUN/hf --source my-pairs/
                              --judge RewardModel --judge.model RM
             with --suite, answers for AlpacaEval 2, MT-Bench, Arena-Hard; lm-evaluation-harness:
                              rap-lightning evaluate --suite AlpacaEval --model MODEL --output answers/

on-policy data:
  generate   sample responses:  rap-lightning generate --prompts my-pairs/ --model MODEL --output samples.jsonl
  score      judge them:        rap-lightning score --source samples.jsonl --output scored.jsonl
                              --judge RewardModel --judge.model RM
  rounds     generate, score, select, relabel, fit, again:
                              rap-lightning rounds --config configs/rounds/world.yaml

take away:
  report     one page that compares runs:  rap-lightning report ra=runs/version_0 dpo=runs/version_1
  export     a checkpoint as a Hugging Face folder:  rap-lightning export --checkpoint LAST.ckpt --output DIR

configs, editor, shell:
  configs    those that come with rap-lightning, to use and to change:  rap-lightning configs --output configs
  schema     completes and checks configs:  rap-lightning schema --output rap-lightning.schema.json
  completion completes commands and options at Tab:  rap-lightning completion bash

Useful everywhere: --print_config shows every option with its value; -c base.yaml -c overlay.yaml stacks configs.
"""


def main(args: list[str] | None = None) -> None:
    """Run a command. Exits with 0 when it went well, 2 for what the user can mend, 130 after Ctrl-C."""
    try:
        try:
            _main(sys.argv[1:] if args is None else args)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends
        sys.exit(128 + 13)  # as a process ends that SIGPIPE ends: rap-lightning ... | head


def _nobody_reads() -> bool:
    """Whether standard output is a pipe whose other end is closed."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # no poll on Windows; no file behind what stands for stdout
        return False


def _main(args: list[str]) -> None:
    if not args or args[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        sys.exit(0 if args else 2)
    if args[0] in ("-V", "--version"):
        print(f"rap-lightning {__version__}")
        return
    if args[0] not in COMMANDS:
        from difflib import get_close_matches

        near = get_close_matches(args[0], COMMANDS, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        sys.exit(_fail(f"unknown command {args[0]!r}.{hint} The commands are {', '.join(COMMANDS)}."))
    sys.path.append(os.getcwd())  # so that a class in a file beside you can be named; last, so that it hides nothing
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # no warning when data workers fork
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait by spinning stall each other on busy cores
    from rap_lightning.progress_bar import adapt_to_terminal  # tqdm is not for --help

    adapt_to_terminal()
    try:
        from rap_lightning.commands.configs import refuse_absent

        refuse_absent(args)
        if args[0] in TRAINER_COMMANDS:
            from rap_lightning.cli.trainer_cli import run

            run(args)
        else:  # each command is a module, so that none pays for the imports of another
            command = import_module(f"rap_lightning.commands.{args[0]}")
            if code := command.run(args[1:]):
                sys.exit(code)
    except UserError as error:
        sys.exit(_fail(str(error)))
    except KeyboardInterrupt as stop:
        print(f"\n{stop}".rstrip() or "\nstopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    except UnpicklingError as error:
        reason = str(error).splitlines()[0]
        sys.exit(_fail(f"the checkpoint holds more than plain values and tensors, and is refused: {reason}"))
    except Exception as error:
        if not _is_lightnings_refusal(error):
            raise
        sys.exit(_fail(str(error)))


def _is_lightnings_refusal(error: Exception) -> bool:
    """Whether Lightning itself refused the trainer's options: its text says what to do, and its stack says nothing."""
    from rap_lightning.cli.error_messages import raised_in

    ours = isinstance(error, ValueError | TypeError) and raised_in(error) == "lightning"
    return ours or type(error).__name__ == "MisconfigurationException"


def _fail(message: str) -> int:
    say(message)
    return 2


if __name__ == "__main__":
    main()
