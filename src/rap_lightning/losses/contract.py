"""Validation of a loss on synthetic inputs, before anything is loaded: does it return what the module expects?"""

from __future__ import annotations

import copy
import inspect
import traceback
import warnings
from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor

from rap_lightning.batches.types import PairLogps, PairRewards, TokenLogps
from rap_lightning.errors import ConfigError
from rap_lightning.losses.base import PreferenceLoss, Requirement


def check_loss(loss: PreferenceLoss) -> None:
    """Call a copy of a loss once, on a few pairs where policy and reference agree; takes milliseconds.

    Checked are ``requires``, what ``forward`` is called with and returns, ``implicit_rewards``, that ``terms`` has the
    names of ``term_names``, and that a step raises chosen and lowers rejected, unless ``at_zero_margin`` says why not.

    Where a loss can't be called on synthetic inputs (it raises, is not finite, can't be copied), a warning says so.

    Raises:
        ConfigError: with what was expected, what was found, and what to do.
    """
    name = type(loss).__name__
    if "_modules" not in vars(loss):
        raise ConfigError(f"{name}.__init__ must call super().__init__(beta), before it sets anything.")
    if unknown := set(loss.requires) - set(get_args(Requirement)):
        known = ", ".join(get_args(Requirement))
        raise ConfigError(f"{name}.requires has {', '.join(sorted(unknown))}, and can have {known}.")
    _check_signature(loss)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return  # a loss that sums over ranks would wait for the others, and the process's first module was checked
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            _check_call(loss)
    except _NotValidated as reason:
        warnings.warn(f"{name} could not be validated on synthetic inputs: {reason}", stacklevel=2)


class _NotValidated(Exception):
    """The loss can't be called on synthetic inputs, which need not be a fault."""


def _check_signature(loss: PreferenceLoss) -> None:
    """Check that ``forward`` can be called with what the class requires."""
    if type(loss).per_pair is not PreferenceLoss.per_pair:
        return  # it calls forward in its own way
    positional = ["policy", "reference"] if "reference" in loss.requires else ["policy"]
    keywords = ["rewards"] if "rewards" in loss.requires else []
    signature = inspect.signature(loss.forward)
    try:
        signature.bind(*positional, **dict.fromkeys(keywords))
    except TypeError as error:
        asked = {name for name in ("reference", "rewards") if name in signature.parameters}
        required = loss.requires & {"reference", "rewards"}
        hint = "Give other arguments a default, or take them in __init__."
        if asked != required:
            hint = f"To match forward, set in the class: requires = {_shown(loss.requires - required | asked)}."
        name, called = type(loss).__name__, ", ".join([*positional, *(f"{key}={key}" for key in keywords)])
        raise ConfigError(
            f"{name}.forward is called as forward({called}), because {name}.requires is {_shown(loss.requires)}; it is "
            f"defined as forward{signature}: {error}. {hint}"
        ) from error


def _shown(names: Any) -> str:
    return "{" + ", ".join(f'"{name}"' for name in sorted(names)) + "}" if names else "frozenset()"


def _check_call(loss: PreferenceLoss) -> None:
    name = type(loss).__name__
    try:
        loss = copy.deepcopy(loss).train()  # running means of the loss itself stay as they are
    except Exception as error:
        raise _NotValidated(f"it can't be copied: {error}") from error
    if elsewhere := [v.device for v in (*loss.parameters(), *loss.buffers()) if v.device.type != "cpu"]:
        raise _NotValidated(f"it is on {elsewhere[0]}")
    pairs = max(4, loss.least_pairs)
    chosen, rejected = (torch.full((pairs,), -30.0, requires_grad=True) for _ in range(2))
    policy = _logps(chosen, rejected, loss, collisions="collisions" in loss.requires)
    reference = _logps(chosen.detach(), rejected.detach(), loss) if "reference" in loss.requires else None
    rewards = PairRewards(torch.full((pairs,), 0.8), torch.full((pairs,), 0.3), torch.full((pairs,), 0.8))

    losses = _call("forward", lambda: loss.per_pair(policy, reference, rewards))
    _check_values(f"{name}.forward", losses, pairs, "the loss of each pair, not their mean")
    if not losses.requires_grad:
        raise ConfigError(
            f"{name}.forward returns values without a gradient: nothing would be trained. Compute them from "
            "policy.chosen and policy.rejected (or policy.tokens.logps), without detach() or no_grad()."
        )
    _check_direction(loss, *torch.autograd.grad(losses.sum(), (chosen, rejected), allow_unused=True))

    implicit = _call("implicit_rewards", lambda: loss.implicit_rewards(policy, reference))
    if not (isinstance(implicit, tuple) and len(implicit) == 2):
        raise ConfigError(
            f"{name}.implicit_rewards must return two tensors [B], of chosen and of rejected, found a "
            f"{type(implicit).__name__}."
        )
    for values, side in zip(implicit, ("chosen", "rejected"), strict=True):
        _check_values(f"{name}.implicit_rewards", values, pairs, f"the reward of {side}")

    terms, names = dict(loss.terms()), list(loss.term_names())
    if set(terms) != set(names):
        raise ConfigError(
            f"{name}.terms gives {sorted(terms) or 'nothing'}, and {name}.term_names says {names or 'nothing'}: they "
            "must be the same, because only announced terms are logged."
        )
    for term, values in terms.items():
        _check_values(f"{name}.terms[{term!r}]", values, pairs, "averaged over pairs like the loss")


def _logps(chosen: Tensor, rejected: Tensor, loss: PreferenceLoss, *, collisions: bool = False) -> PairLogps:
    """Make responses of ten equal tokens; only the policy has collisions, as in a run."""
    sums, length = torch.stack((chosen, rejected), 1).flatten(), 10
    tokens = None
    if "tokens" in loss.requires:
        segment = torch.repeat_interleave(torch.arange(len(sums)), length)
        log_collisions = torch.full((len(segment),), -1.5) if collisions else None
        tokens = TokenLogps.of((sums / length)[segment], segment, log_collisions)
    unrelated = sums.detach().roll(2) if "unrelated" in loss.requires else None
    lengths, weights = torch.full((len(sums),), length), torch.ones(len(chosen))
    return PairLogps.from_segments(sums, lengths, weights=weights, tokens=tokens, unrelated=unrelated)


def _call(method: str, function: Callable[[], Any]) -> Any:
    try:
        return function()
    except ConfigError:
        raise
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise _NotValidated(
            f"{method} raised {type(error).__name__}: {error} ({last.filename}, line {last.lineno}: {last.line}). "
            "docs/own-loss.md lists its inputs."
        ) from error


def _check_values(what: str, values: Any, pairs: int, meaning: str) -> None:
    if not isinstance(values, Tensor):
        found = "nothing (is there a return?)" if values is None else f"a {type(values).__name__}"
    elif values.shape != (pairs,):
        found = f"a tensor of shape {list(values.shape)}"
    elif not values.is_floating_point():
        found = f"a tensor of {values.dtype}"
    elif not values.isfinite().all():
        raise _NotValidated(f"{what} returned {values.tolist()}")
    else:
        return
    raise ConfigError(f"{what} must return a tensor [B] of float32, {meaning}; of {pairs} pairs it returned {found}.")


def _check_direction(loss: PreferenceLoss, chosen: Tensor | None, rejected: Tensor | None) -> None:
    """Check the signs of the gradients with respect to the log-probabilities of chosen and rejected."""
    if loss.at_zero_margin:
        return
    faults = []
    if chosen is None or not bool((chosen < 0).all()):
        faults.append(f"does not raise chosen (its gradient is {_first(chosen)})")
    if rejected is None or not bool((rejected > 0).all()):
        faults.append(f"does not lower rejected ({_first(rejected)})")
    if faults:
        raise ConfigError(
            f"{type(loss).__name__}: where policy and reference agree, a step {' and '.join(faults)}. Is a sign wrong? "
            'If it is intended, say why in the class: at_zero_margin = "...".'
        )


def _first(gradient: Tensor | None) -> str:
    return "none" if gradient is None else f"{float(gradient[0]):.3g}"
