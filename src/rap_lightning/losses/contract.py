"""A loss is tried on made-up numbers before anything is loaded: does it return what the trainer takes it for?"""

from __future__ import annotations

import copy
import inspect
import traceback
import warnings
from typing import Any

import torch
from torch import Tensor

from rap_lightning.batches.types import PairLogps, PairRewards, TokenLogps
from rap_lightning.errors import ConfigError
from rap_lightning.losses.base import PreferenceLoss


def check_loss(loss: PreferenceLoss) -> None:
    """Call a copy of a loss once, on a few pairs where policy and reference agree; takes milliseconds.

    Where that can't be done (it raises, is not finite, can't be copied) a warning says so, and the run goes on.

    Checked are: what ``forward`` is called with and returns, ``implicit_rewards``, that ``terms`` are those that
    ``term_names`` says, and that a step raises chosen and lowers rejected, unless ``at_zero_margin`` says why not.

    Raises:
        ConfigError: with what was expected, what was found, and what to do.
    """
    name = type(loss).__name__
    if "_modules" not in vars(loss):
        raise ConfigError(f"{name}.__init__ must call super().__init__(beta), before it sets anything.")
    _check_signature(loss)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return  # a loss that sums over ranks would wait for them, and the first module of the process was checked
    try:
        with torch.random.fork_rng(devices=[]):
            _try(loss)
    except _Untried as reason:
        warnings.warn(f"{name} could not be tried on made-up numbers: {reason}", stacklevel=2)


class _Untried(Exception):
    """Made-up numbers say nothing of this loss."""


def _try(loss: PreferenceLoss) -> None:
    name = type(loss).__name__
    try:
        loss = copy.deepcopy(loss).train()  # of a loss that keeps running means the run's own stay as they are
    except Exception as error:
        raise _Untried(f"it can't be copied: {error}") from error
    held = [*loss.parameters(), *loss.buffers()]
    if any(value.device.type != "cpu" for value in held):
        raise _Untried(f"it is on {held[0].device}")
    pairs = max(4, loss.least_pairs)
    chosen, rejected = (torch.full((pairs,), -30.0, requires_grad=True) for _ in range(2))
    policy = _logps(chosen, rejected, loss, collisions=loss.needs_collisions)
    same = _logps(chosen.detach(), rejected.detach(), loss)
    reference = same if loss.needs_reference else None
    rewards = PairRewards(torch.full((pairs,), 0.8), torch.full((pairs,), 0.3), torch.ones(pairs, dtype=torch.bool))
    with torch.enable_grad():
        losses = _called(loss, "forward", loss.per_pair, policy, reference, rewards)
        _check_values(f"{name}.forward", losses, pairs, "the loss of each pair, not their mean")
        if not losses.requires_grad:
            raise ConfigError(
                f"{name}.forward returns values without a gradient: nothing would be trained. Compute them from "
                "policy.chosen and policy.rejected (or policy.tokens.logps), without detach() or no_grad()."
            )
        slopes = torch.autograd.grad(losses.sum(), (chosen, rejected), allow_unused=True)
    _check_rewards(loss, policy, reference, pairs)
    _check_terms(loss, pairs)
    _check_direction(loss, *slopes)


def _check_signature(loss: PreferenceLoss) -> None:
    if type(loss).per_pair is not PreferenceLoss.per_pair:
        return  # it calls forward in its own way
    name = type(loss).__name__
    positional = [None, None] if loss.needs_reference else [None]
    keywords = {"rewards": None} if loss.needs_rewards else {}
    signature = inspect.signature(loss.forward)
    try:
        signature.bind(*positional, **keywords)
    except TypeError as error:
        called = ", ".join([*("policy", "reference")[: len(positional)], *(f"{key}={key}" for key in keywords)])
        hints = []
        if "rewards" in signature.parameters and not loss.needs_rewards:
            hints.append("needs_rewards = True in the class brings the judge's rewards")
        if keywords and "rewards" not in signature.parameters:
            hints.append("needs_rewards is True, so forward needs a keyword rewards")
        if "reference" not in signature.parameters and loss.needs_reference:
            hints.append("needs_reference = False in the class leaves the reference out")
        raise ConfigError(
            f"{name}.forward is called as forward({called}), and is written as forward{signature}: {error}. "
            + "; ".join(hints or ["give other arguments a default, or take them in __init__"])
        ) from error


def _logps(chosen: Tensor, rejected: Tensor, loss: PreferenceLoss, *, collisions: bool = False) -> PairLogps:
    """Ten tokens a response, all alike; collisions are the policy's alone, as in a run."""
    sums, length = torch.stack((chosen, rejected), 1).flatten(), 10
    lengths = torch.full((len(sums),), length)
    tokens = None
    if loss.needs_tokens:
        segment = torch.repeat_interleave(torch.arange(len(sums)), length)
        log_collisions = torch.full((len(segment),), -1.5) if collisions else None
        tokens = TokenLogps.of((sums / length)[segment], segment, log_collisions)
    unrelated = sums.detach().roll(2) if loss.needs_unrelated else None
    return PairLogps.from_segments(sums, lengths, weights=torch.ones(len(chosen)), tokens=tokens, unrelated=unrelated)


def _called(loss: PreferenceLoss, method: str, function: Any, *args: Any) -> Any:
    try:
        return function(*args)
    except ConfigError:
        raise
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise _Untried(
            f"{method} raised {type(error).__name__}: {error} ({last.filename}, line {last.lineno}: {last.line}). "
            "docs/own-loss.md says what it is given."
        ) from error


def _check_values(what: str, values: Any, pairs: int, meaning: str) -> None:
    if not isinstance(values, Tensor):
        found = "nothing (is there a return?)" if values is None else f"a {type(values).__name__}"
    elif values.shape != (pairs,):
        found = f"a tensor of shape {list(values.shape)}"
    elif not values.is_floating_point():
        found = f"a tensor of {values.dtype}"
    elif not values.isfinite().all():
        raise _Untried(f"{what} returned {values.tolist()}")
    else:
        return
    raise ConfigError(f"{what} must return a tensor [B] of float32, {meaning}; of {pairs} pairs it returned {found}.")


def _check_rewards(loss: PreferenceLoss, policy: PairLogps, reference: PairLogps | None, pairs: int) -> None:
    what = f"{type(loss).__name__}.implicit_rewards"
    with torch.no_grad():
        found = _called(loss, "implicit_rewards", loss.implicit_rewards, policy, reference)
    if not (isinstance(found, tuple) and len(found) == 2):
        kind = type(found).__name__
        raise ConfigError(f"{what} must return two tensors [B], of chosen and of rejected, found a {kind}.")
    for values, side in zip(found, ("chosen", "rejected"), strict=True):
        _check_values(what, values, pairs, f"what {side} is worth to the loss")


def _check_terms(loss: PreferenceLoss, pairs: int) -> None:
    name, terms, said = type(loss).__name__, dict(loss.terms()), list(loss.term_names())
    if set(terms) != set(said):
        raise ConfigError(
            f"{name}.terms gives {sorted(terms) or 'nothing'}, and {name}.term_names says {said or 'nothing'}: they "
            "must be the same, or what is missing would not be logged."
        )
    for term, values in terms.items():
        _check_values(f"{name}.terms[{term!r}]", values, pairs, "to be averaged as the loss is")


def _check_direction(loss: PreferenceLoss, chosen: Tensor | None, rejected: Tensor | None) -> None:
    if loss.at_zero_margin:
        return
    raises = chosen is not None and bool((chosen < 0).all())
    lowers = rejected is not None and bool((rejected > 0).all())
    if raises and lowers:
        return
    says = [
        *([] if raises else [f"does not raise chosen (its slope there is {_slope(chosen)})"]),
        *([] if lowers else [f"does not lower rejected ({_slope(rejected)})"]),
    ]
    raise ConfigError(
        f"{type(loss).__name__}: where policy and reference agree, a step {' and '.join(says)}. Is a sign wrong? If it "
        'is meant to be so, say why in the class: at_zero_margin = "...".'
    )


def _slope(gradient: Tensor | None) -> str:
    return "none" if gradient is None else f"{float(gradient[0]):.3g}"
