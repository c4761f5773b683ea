"""Log-probabilities of the data's responses under goals, in a file that survives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rap_lightning.batches.at_goals import AtGoal, AtGoals, batch_of, in_passes, two_by_two
from rap_lightning.batches.encode import Encoder
from rap_lightning.errors import ConfigError
from rap_lightning.onpolicy.lines import Ledger, digest_of, read_rows
from rap_lightning.onpolicy.model import Model, free_memory
from rap_lightning.onpolicy.progress import Progress
from rap_lightning.preferences.pairs import Pair
from rap_lightning.preferences.report import DataReport

LAYOUT = "tree"
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

    def of(self, model: Model, path: Path, dtype: str, budget: int, what: str) -> dict[Key, tuple[float, float]]:
        """Log-probabilities of both responses of every item under a model, in nats; what is there already is read.

        Args:
            model: the policy, or its base.
            path: json lines.
            dtype: of the weights; log-probabilities are float32 whatever it is.
            budget: tokens in a forward pass.
            what: is measured, for the progress bar.

        Raises:
            ConfigError: the file is of other settings, or the model has another vocabulary.
        """
        settings = self._settings(model, dtype)
        key = digest_of(settings)
        ids = {id(item): digest_of(item.example.pair_id, item.text, key) for item in self.items}
        with Ledger(path, settings) as ledger:
            if any(ids[id(item)] not in ledger.done for item in self.items):
                self._measure(model, ledger, ids, dtype, budget, what)
        found = {row["id"]: row["logps"] for row in read_rows([path])}
        return {
            (item.example.pair_id, item.text): (found[ids[id(item)]][0], found[ids[id(item)]][1]) for item in self.items
        }

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
        self, model: Model, ledger: Ledger, ids: Mapping[int, str], dtype: str, budget: int, what: str
    ) -> None:
        import torch

        from rap_lightning.models.policy import Policy, check_head, check_sharing

        self._same_vocabulary(model)
        policy = Policy(model.load(getattr(torch, dtype), _device())).eval()
        check_head(policy)
        if reason := check_sharing(policy):
            print(f"{model.path} shares no prefixes: {reason}. Sequences go through it one at a time.")
        done = sum(one in ledger.done for one in ids.values())
        with Progress(what, len(self.items), done) as progress, torch.inference_mode():
            for items in in_passes(self.items, LAYOUT, budget):
                missing = [item for item in items if ids[id(item)] not in ledger.done]
                if not missing:
                    continue
                # a pass that was finished in part is computed whole, so that its numbers are an uninterrupted run's
                batch = batch_of(items, LAYOUT, pad_id=0).to(policy.device)
                logps = list(two_by_two(policy.logps(batch).tolist()))
                rows = {
                    ids[id(item)]: {
                        "id": ids[id(item)], "pair_id": item.example.pair_id, "goal": item.text, "logps": list(two),
                        "tokens": [len(item.example.chosen_ids), len(item.example.rejected_ids)],
                    }
                    for item, two in zip(items, logps, strict=True)
                }  # fmt: skip
                ledger.append([rows[ids[id(item)]] for item in missing])
                progress.add([_length(item) for item in missing])
        del policy
        free_memory()

    def _same_vocabulary(self, model: Model) -> None:
        if model.tokenizer().get_vocab() != self.encoder.tokenizer.get_vocab():
            raise ConfigError(
                f"{model.path} has another vocabulary than {self.model.path}: their log-probabilities are not of the "
                "same tokens. Give the model that training began with as --base."
            )


def make_encoder(model: Model, template: Any, max_length: int) -> Encoder:
    """As the data module makes it, for prompts and responses together of at most ``max_length`` tokens."""
    context = model.context()
    if not 2 <= max_length <= context:
        raise ConfigError(f"--max_length must be from 2 to what the model takes, {context:,}; found {max_length:,}.")
    return Encoder(model.tokenizer(), template, max_length)


def _length(item: AtGoal) -> int:
    example = item.example
    return len(example.prompt_ids) + len(example.chosen_ids) + len(example.rejected_ids)


def _device() -> Any:
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
