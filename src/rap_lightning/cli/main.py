"""The entry point: dispatch to a command and turn errors into exit codes.

It answers --help and --version itself, for importing torch and Lightning takes seconds.
"""

from __future__ import annotations

import errno
import os
import select
import sys
import warnings
from pickle import UnpicklingError

from rap_lightning import __version__
from rap_lightning.commands import COMMANDS, TRAINER_COMMANDS
from rap_lightning.errors import UserError, first_line, print_error

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR)
"""Reasons of the system that a user can remove; the name of the file says where."""

HELP = f"""rap-lightning {__version__}: reward-augmented preference alignment on Lightning

usage: rap-lightning COMMAND [options]
       rap-lightning COMMAND --help

train and evaluate (configs stack; every option of a config is also a flag):
  fit        train a policy:      rap-lightning fit --config configs/quickstart.yaml
  validate   metrics of a model on the validation split
  test       the same, logged as test/...
  predict    generate at a goal:  rap-lightning predict --config CONFIG --ckpt_path RUN/checkpoints/last.ckpt

before you rent GPUs (no GPU needed):
  plan       memory per rank, time per step, whether it fits, and what to change:
                              rap-lightning plan --config CONFIG --devices 8 --nodes 4 --gpu h100-80gb

look at data (fast, no training):
  inspect    the training pairs: counts, rewards, lengths and examples:
                              rap-lightning inspect --source my-pairs/
  relabel    write the relabelled data as parquet:
                              rap-lightning relabel --source my-pairs/ --output relabelled/

evaluate:
  evaluate   does the goal steer? scores at each goal, unlearning, extrapolation, discrimination, length:
                              rap-lightning evaluate --model RUN/hf --source my-pairs/
                              --judge RewardModel --judge.model RM
             with --suite, answers for AlpacaEval 2, MT-Bench, Arena-Hard; lm-evaluation-harness:
                              rap-lightning evaluate --suite AlpacaEval --model MODEL --output answers/

on-policy data:
  generate   sample responses:  rap-lightning generate --prompts my-pairs/ --model MODEL --output samples.jsonl
  score      judge them:        rap-lightning score --source samples.jsonl --output scored.jsonl
                              --judge RewardModel --judge.model RM
  rounds     generate, score, select, relabel, fit, repeat:
                              rap-lightning rounds --config configs/rounds/world.yaml

share results:
  report     one page that compares runs:  rap-lightning report ra=runs/version_0 dpo=runs/version_1
  export     a checkpoint as a Hugging Face folder:  rap-lightning export --checkpoint LAST.ckpt --output DIR

configs, editor, shell:
  configs    list or copy the shipped configs:  rap-lightning configs --output configs
  schema     JSON schema of configs, for editors:  rap-lightning schema --output rap-lightning.schema.json
  completion shell completion of commands and options:  rap-lightning completion bash

Useful everywhere: --print_config shows every option with its value; -c base.yaml -c overlay.yaml stacks configs.
"""


def main(args: list[str] | None = None) -> None:
    """Run a command.

    Exit codes: 0 on success; 1 where the command's answer is no (plan: it does not fit) or an unexpected error was
    raised; 2 for an error that the user can resolve; 3 where another rank failed or was lost; 130 after Ctrl-C.
    torchrun ends with 1 instead.
    """
    try:
        try:
            _main(sys.argv[1:] if args is None else args)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _stdout_is_closed():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at exit
        sys.exit(128 + 13)  # the status of a process ended by SIGPIPE: rap-lightning ... | head


def _stdout_is_closed() -> bool:
    """Whether standard output is a pipe whose reader has closed it."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # no poll on Windows; a stdout without a file descriptor
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
    sys.path.append(os.getcwd())  # classes in the working folder; last, so that it shadows nothing
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # no warning when data workers fork
    # peft, where an adapter is put on a model, with transformers from 5.24 on
    warnings.filterwarnings("ignore", message=r".*is_gradient_checkpointing.*")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads stall each other on busy cores
    from rap_lightning.progress_bar import adapt_to_terminal  # not above: --help does not need tqdm

    adapt_to_terminal()
    try:
        from rap_lightning.cli.config_files import copy_pipes
        from rap_lightning.commands.configs import refuse_absent

        refuse_absent(args)
        if (copied := copy_pipes(args)) != args:
            if args == sys.argv[1:]:
                sys.argv[1:] = copied  # processes of other devices are started with these
            args = copied
        if args[0] in TRAINER_COMMANDS:
            from rap_lightning.cli.trainer_cli import run

            run(args)
        else:  # one module per command, so that each imports only what it needs
            from rap_lightning.commands.options import runner_of

            if code := runner_of(args[0])(args[1:]):
                sys.exit(code)
    except UserError as error:
        sys.exit(_fail(str(error)))
    except KeyboardInterrupt as stop:
        print(f"\n{stop}".rstrip() or "\nstopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    except UnpicklingError as error:
        reason = f"which holds more than plain values and tensors: {first_line(error)}"
        sys.exit(_fail(f"refused to load the checkpoint, {reason}"))
    except OSError as error:
        if error.errno not in UNWRITABLE or error.filename is None:
            raise
        advice = "Make room there, let this user write to it, or name another place."
        sys.exit(_fail(f"{error.filename} can't be written or read: {error.strerror}. {advice}"))
    except Exception as error:
        if not _is_from_lightning(error):
            raise
        sys.exit(_fail(str(error)))


def _is_from_lightning(error: Exception) -> bool:
    """Whether Lightning itself refused the trainer's options: its text says what to do, its traceback nothing."""
    from rap_lightning.cli.error_messages import raised_in

    refused = isinstance(error, ValueError | TypeError) and raised_in(error) == "lightning"
    return refused or type(error).__name__ == "MisconfigurationException"


def _fail(message: str) -> int:
    print_error(message)
    return 2


if __name__ == "__main__":
    main()
