"""A loss that is not what the trainer takes it for is refused before anything is loaded."""

import threading
from typing import Any

import pytest
import torch

from loss_cases import LOSSES, make
from rap_lightning import DPO, Hinge, PreferenceLoss, PreferenceModule
from rap_lightning.errors import ConfigError
from rap_lightning.losses import SFT, WPO, Mixture
from rap_lightning.losses.base import logratios, margin
from rap_lightning.losses.contract import check_loss
from rap_lightning.models.policy_config import PolicyConfig


class _Of(PreferenceLoss):
    """The hinge's value, and what a test makes of it."""

    def made(self, values: torch.Tensor) -> Any:
        return values

    def forward(self, policy: Any, reference: Any) -> Any:
        return self.made(torch.relu(1 - self.beta * margin(policy, reference)))


def forward_is(change: Any, **attributes: Any) -> PreferenceLoss:
    return type("Mine", (_Of,), {"made": lambda self, values: change(values), **attributes})(0.1)


@pytest.mark.parametrize("kind", LOSSES)
def test_every_loss_of_the_package_passes_and_is_left_as_it_was(kind: Any) -> None:
    loss = make(kind)
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    check_loss(loss)
    assert loss.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in loss.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (torch.mean, r"Mine\.forward must return a tensor \[B\].*not their mean.*shape \[\]"),
        (lambda v: torch.cat([v, v]), r"of 4 pairs it returned a tensor of shape \[8\]"),
        (lambda v: v[:, None], r"shape \[4, 1\]"),
        (lambda v: (v, {}), "a tuple"),
        (lambda v: None, "is there a return"),
        (torch.detach, "without a gradient"),
        (torch.neg, r"a step does not raise chosen \(its gradient is 0\.1\) and does not lower rejected"),
    ],
)
def test_what_forward_returns_is_checked(change: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_loss(forward_is(change))


class _Locked(_Of):
    def __init__(self) -> None:
        super().__init__(0.1)
        self.lock = threading.Lock()


def _on_meta() -> PreferenceLoss:
    loss = DPO()
    loss.register_buffer("mean", torch.zeros(1, device="meta"))
    return loss


@pytest.mark.parametrize(
    ("loss", "why"),
    [
        (forward_is(lambda v: v / 0), "forward returned .*inf"),
        (forward_is(lambda v: v + missing), "raised NameError.*test_losses_contract.py, line"),  # noqa: F821
        (_Locked(), "it can't be copied"),
        (_on_meta(), "it is on meta"),
    ],
)
def test_a_loss_that_synthetic_inputs_do_not_suit_is_let_through_with_a_warning(loss: PreferenceLoss, why: str) -> None:
    with pytest.warns(UserWarning, match=f"could not be validated on synthetic inputs.*{why}"):
        check_loss(loss)


def test_random_numbers_of_the_run_are_those_without_the_check() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    check_loss(forward_is(lambda v: v * (1 + torch.rand(4))))
    assert torch.equal(torch.rand(2), expected)


def test_a_sign_that_is_meant_is_let_through_with_its_reason() -> None:
    check_loss(forward_is(torch.neg, at_zero_margin="it unlearns on purpose"))


class _Asks(PreferenceLoss):
    def forward(self, policy: Any, reference: Any, rewards: Any) -> torch.Tensor:
        return -(rewards.chosen - rewards.rejected) * margin(policy, reference)


def test_what_forward_is_given_is_checked_against_what_the_class_says() -> None:
    with pytest.raises(
        ConfigError, match=r'called as forward\(policy, reference\), .*requires = {"reference", "rewards"}\.'
    ):
        check_loss(_Asks())
    check_loss(type("Asks", (_Asks,), {"requires": {"reference", "rewards"}})())
    with pytest.raises(ConfigError, match=r'rewards=rewards.*requires = {"reference"}\.'):
        check_loss(forward_is(torch.abs, requires={"reference", "rewards"}))
    alone = type("Alone", (PreferenceLoss,), {"forward": lambda self, policy: policy.rejected - policy.chosen})
    with pytest.raises(ConfigError, match=r"requires = frozenset\(\)\."):
        check_loss(alone())
    with pytest.raises(ConfigError, match=r"Mine\.requires has reward, and can have reference, rewards, tokens"):
        check_loss(forward_is(torch.abs, requires={"reference", "reward"}))


def test_a_constructor_that_forgets_its_parents_is_told() -> None:
    class Forgets(DPO):
        def __init__(self, focus: float = 1.0) -> None:
            self.__dict__["focus"] = focus

    with pytest.raises(ConfigError, match=r"Forgets\.__init__ must call super\(\)\.__init__"):
        check_loss(Forgets())


class _Logs(DPO):
    said: tuple[str, ...] = ("chosen",)

    def forward(self, policy: Any, reference: Any) -> torch.Tensor:
        self._chosen = logratios(policy, reference)[0].detach()
        return super().forward(policy, reference)

    def terms(self) -> dict[str, torch.Tensor]:
        return {"chosen": self._chosen}

    def term_names(self) -> tuple[str, ...]:
        return self.said


@pytest.mark.parametrize("said", [(), ("other",), ("chosen", "other")])
def test_terms_that_would_not_be_logged_are_refused(said: tuple[str, ...]) -> None:
    check_loss(_Logs())
    with pytest.raises(ConfigError, match=r"terms gives \['chosen'\].*term_names says"):
        check_loss(type("Logs", (_Logs,), {"said": said})())


def test_a_term_must_be_of_pairs() -> None:
    scalar = type("Logs", (_Logs,), {"terms": lambda self: {"chosen": self._chosen.mean()}})
    with pytest.raises(ConfigError, match=r"Logs\.terms\['chosen'\] must return a tensor \[B\].*shape \[\]"):
        check_loss(scalar())


def test_parts_of_a_mixture_keep_their_own_terms() -> None:
    mixed = Mixture([_Logs(), SFT(), _Logs()])
    check_loss(mixed)
    assert list(mixed.term_names()) == ["_Logs", "_Logs/chosen", "SFT", "_Logs-2", "_Logs-2/chosen"]
    assert list(WPO(_Logs()).term_names()) == ["chosen"]


def test_implicit_rewards_are_checked() -> None:
    wrong = type("Wrong", (Hinge,), {"implicit_rewards": lambda self, policy, reference: policy.chosen})
    with pytest.raises(ConfigError, match=r"Wrong\.implicit_rewards must return two tensors"):
        check_loss(wrong())


def test_the_module_refuses_such_a_loss_before_it_loads_a_model() -> None:
    with pytest.raises(ConfigError, match=r"Mine\.forward must return"):
        PreferenceModule(PolicyConfig("there-is-no-such-model"), forward_is(torch.mean))


def test_a_module_that_calls_its_loss_in_its_own_way_may() -> None:
    class Own(PreferenceModule):
        def pair_losses(self, policy: Any, reference: Any, rewards: Any) -> Any:
            return self.loss(policy, reference, rewards), self.loss.implicit_rewards(policy, reference)

    Own(PolicyConfig("there-is-no-such-model"), _Asks())
