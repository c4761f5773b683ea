"""Log-probabilities of the data's responses under goals, in a file that survives."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from rap_lightning.batches.at_goals import AtGoal, AtGoals, batch_of, in_passes, two_by_two
from rap_lightning.batches.encode import Encoder
from rap_lightning.errors import ConfigError
from rap_lightning.onpolicy.jsonl_ledger import Ledger, digest_of, read_rows
from rap_lightning.onpolicy.request_progress import Progress
from rap_lightning.onpolicy.sampled_model import Model, free_memory
from rap_lightning.preferences.data_report import DataReport
from rap_lightning.preferences.pairs import Pair

LAYOUT = "tree"
MAX_LENGTH = 1024
"""The data module's default."""
Key = tuple[str, str | None]
"""A pair's id, and the text of the goal in its prompt."""


class Likelihoods:
    """What is measured: pairs, each under its goals, as token ids.

    Args:
        model: whose tokenizer writes the prompts.
        pairs: of the data.
        encode: says which goals each pair is wanted under.
        report: gets what was repaired, cut or left out.
    """

    def __init__(self, model: Model, pairs: Sequence[Pair], encode: AtGoals, report: DataReport) -> None:
        self.model, self.encoder = model, encode.encoder
        self.items = encode.examples(pairs, report)

    def tokens(self) -> dict[str, tuple[int, int]]:
        """Pair id to the tokens of its two responses, end of turn included."""
        return {i.example.pair_id: (len(i.example.chosen_ids), len(i.example.rejected_ids)) for i in self.items}

    def of(
        self, model: Model, wanted: Container[Key], path: Path, dtype: str, budget: int, what: str
    ) -> dict[Key, tuple[float, float]]:
        """Log-probabilities of both responses of wanted items under a model, in nats; what is there already is read.

        Args:
            model: the policy, or its base.
            wanted: which pairs under which goals.
            path: json lines.
            dtype: of the weights; log-probabilities are float32 whatever it is.
            budget: tokens in a forward pass.
            what: is measured, for the progress bar.

        Raises:
            ConfigError: the file is of other settings, or the model has another vocabulary.
        """
        settings = self._settings(model, dtype)
        key = digest_of(settings)
        items = {digest_of(*key_of(item), key): item for item in self.items if key_of(item) in wanted}
        with Ledger(path, settings) as ledger:
            if not items.keys() <= ledger.done:
                self._measure(model, ledger, items, dtype, budget, what)
        found = {row["id"]: row["logps"] for row in read_rows([path])}
        return {key_of(item): (found[one][0], found[one][1]) for one, item in items.items()}

    def _settings(self, model: Model, dtype: str) -> dict[str, Any]:
        encoder = self.encoder
        return {
            "model": model.identity(),
            "dtype": dtype,
            "prompts": {
                "tokenizer": digest_of(encoder.tokenizer.backend_tokenizer.to_str()),
                "template": digest_of(encoder.tokenizer.chat_template),
                "max_length": encoder.max_length,
                "max_prompt_length": encoder.max_prompt_length,
                "placement": encoder.placement,
            },
        }

    def _measure(
        self, model: Model, ledger: Ledger, items: Mapping[str, AtGoal], dtype: str, budget: int, what: str
    ) -> None:
        import torch

        from rap_lightning.models.model_checks import check_head, check_sharing
        from rap_lightning.models.policy import Policy

        policy = Policy(model.load(getattr(torch, dtype), _device())).eval()
        check_head(policy)
        if reason := check_sharing(policy):
            print(f"{model.path} shares no prefixes: {reason}. Sequences go through it one at a time.")
        ids = {id(item): one for one, item in items.items()}
        with Progress(what, len(items), sum(one in ledger.done for one in items)) as progress, torch.inference_mode():
            for together in in_passes(list(items.values()), LAYOUT, budget):
                missing = [ids[id(item)] for item in together if ids[id(item)] not in ledger.done]
                if not missing:
                    continue
                # a pass that was finished in part is computed whole, so that its numbers are an uninterrupted run's
                batch = batch_of(together, LAYOUT, pad_id=0).to(policy.device)
                logps = two_by_two(policy.logps(batch).tolist())
                rows = {ids[id(item)]: _row(item, two) for item, two in zip(together, logps, strict=True)}
                ledger.append([{"id": one, **rows[one]} for one in missing])
                progress.add([_length(items[one]) for one in missing])
        del policy
        free_memory()


def check_base(base: Model, model: Model) -> None:
    """Raise ConfigError where the base can't be read, or its tokens are others than the model's."""
    if base.tokenizer().get_vocab() != model.tokenizer().get_vocab():
        raise ConfigError(
            f"{base.path} has another vocabulary than {model.path}: their log-probabilities are not of the same "
            "tokens. Give the model that training began with as --base."
        )


def make_encoder(model: Model, template: Any, max_length: int | None) -> Encoder:
    """As the data module makes it, for prompts and responses together of at most ``max_length`` tokens.

    By default what the data module takes, or the model's context where that is less.
    """
    context = model.context()
    longest = min(MAX_LENGTH, context) if max_length is None else max_length
    if not 2 <= longest <= context:
        raise ConfigError(f"--max_length must be from 2 to what the model takes, {context:,}; found {longest:,}.")
    return Encoder(model.tokenizer(), template, longest)


def key_of(item: AtGoal) -> Key:
    """What an item's log-probabilities are found by."""
    return item.example.pair_id, item.text


def _row(item: AtGoal, logps: tuple[float, float]) -> dict[str, Any]:
    example = item.example
    tokens = [len(example.chosen_ids), len(example.rejected_ids)]
    return {"pair_id": example.pair_id, "goal": item.text, "logps": list(logps), "tokens": tokens}


def _length(item: AtGoal) -> int:
    example = item.example
    return len(example.prompt_ids) + len(example.chosen_ids) + len(example.rejected_ids)


def _device() -> Any:
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
