"""Judge by a sequence-classification model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rap_lightning.errors import ConfigError
from rap_lightning.onpolicy.judges.model_judge import BatchJudge, EncodedResponse, ModelJudge
from rap_lightning.onpolicy.model_source import default_device, weights_dtype
from rap_lightning.preferences.chat_template import read_tokenizer
from rap_lightning.preferences.judge import Verdict, declared

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from rap_lightning.batches.encode import Encoder

LM_HEAD = r"^lm_head\."
"""Some reward models were saved with the head of the language model that they were made from; scores don't use it."""


class RewardModel(ModelJudge):
    """Any reward model that transformers loads for sequence classification: one score, or several heads.

    The model's own chat template renders conversation and response. The reward is the score of the only head, or what
    ``overall`` says. ArmoRM and similar models, whose output has ``rewards`` beside ``score``, need
    ``trust_remote_code``; name their heads in the order of the model card with ``heads``.

    Args:
        model: a Hugging Face folder or Hub id.
        attributes: further rewards to keep, under new names: {helpfulness: ultrafeedback-helpfulness}.
        heads: names of all heads, in order, if the model's config has none.
        overall: the head that is the reward, or mean for the average of the attributes; by default the model's own
            score.
        scale: lowest and highest reward, if the model has limits: [1, 10].
        chat_template: file of a chat template, for a tokenizer that lacks one.
        options: batch size, dtype and length.
    """

    def __init__(
        self,
        model: str,
        attributes: dict[str, str] | None = None,
        heads: list[str] | None = None,
        overall: str | None = None,
        scale: list[float] | None = None,
        chat_template: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, **options)
        if overall == "mean" and not attributes:
            raise ConfigError("--judge.overall mean needs --judge.attributes to take the mean of.")
        self.attributes, self.heads, self.overall = attributes or {}, heads, overall
        self.scale, self.template = declared(scale), ""
        if chat_template is not None:
            try:
                self.template = Path(chat_template).read_text(encoding="utf-8")
            except OSError as error:
                raise ConfigError(f"--judge.chat_template {chat_template} can't be read: {error.strerror}") from error

    def settings(self) -> dict[str, Any]:
        """Return the model, and how its numbers are read."""
        return super().settings() | {
            "attributes": self.attributes, "heads": self.heads, "overall": self.overall, "scale": self.scale,
            "template": self.template,
        }  # fmt: skip

    def load(self) -> tuple[Encoder, BatchJudge]:
        """Load model and tokenizer."""
        from transformers import AutoModelForSequenceClassification

        from rap_lightning.batches.encode import Encoder
        from rap_lightning.models.pretrained import load_pretrained, load_weights

        path, option, device = self.source.path, "--judge.model", default_device()
        hub = {"revision": self.source.revision, "trust_remote_code": self.source.trust_remote_code}
        tokenizer = load_pretrained("tokenizer", path, read_tokenizer, hub, option)
        load = partial(load_weights, AutoModelForSequenceClassification, option, LM_HEAD)
        dtype = weights_dtype(self.dtype, device)
        model = load_pretrained("reward model", path, load, hub | {"dtype": dtype}, option)
        if self.template:
            tokenizer.chat_template = self.template
        if not tokenizer.chat_template:
            raise ConfigError(
                f"--judge.model {path}: its tokenizer has no chat template, so how a conversation reads to it isn't "
                "known. Its card says; write that as a jinja file and name it with --judge.chat_template."
            )
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1_000_000
        encoder = Encoder(tokenizer, None, self.longest(self.max_length, context))
        names = self._head_names(model)
        model = model.to(device).eval()

        def judge_batch(batch: Sequence[EncodedResponse]) -> list[Verdict]:
            heads, scores = _forward(model, [[*one.prompt, *one.response] for one in batch])
            return [
                self._verdict(one.item.id, row, score, names)
                for one, row, score in zip(batch, heads.tolist(), scores, strict=True)
            ]

        return encoder, judge_batch

    def _head_names(self, model: PreTrainedModel) -> list[str]:
        """Return the names of all heads, from ``heads`` or the model's config; empty if nothing needs them."""
        count = int(model.config.num_labels)
        labels = [str(model.config.id2label.get(i, f"LABEL_{i}")) for i in range(count)]
        named = labels != [f"LABEL_{i}" for i in range(count)]
        names = self.heads or (labels if named else [])
        wanted = [*self.attributes.values(), *([self.overall] if self.overall not in (None, "mean") else [])]
        if wanted and not names:
            raise ConfigError(
                f"the reward model doesn't name its {count} heads: name them in order with --judge.heads."
            )
        if unknown := [name for name in wanted if name not in names]:
            raise ConfigError(f"the reward model has no head {unknown[0]!r}; there are {', '.join(names)}.")
        return list(names)

    def _verdict(self, item_id: str, heads: list[float], score: float | None, names: list[str]) -> Verdict:
        if names and len(names) != len(heads):
            raise ConfigError(f"--judge.heads names {len(names)} heads, and the reward model has {len(heads)}.")
        by_name = dict(zip(names, heads, strict=True)) if names else {}
        attributes = {ours: by_name[theirs] for ours, theirs in self.attributes.items()}
        if self.overall == "mean":
            reward: float | None = sum(attributes.values()) / len(attributes)
        else:
            reward = score if self.overall is None else by_name[self.overall]
        if reward is None:
            raise ConfigError(
                f"the reward model has {len(heads)} heads and no score of its own: say with --judge.overall which one "
                "is the reward, or mean."
            )
        return Verdict(item_id, reward, attributes)


def _forward(model: PreTrainedModel, rows: list[list[int]]) -> tuple[Tensor, list[float | None]]:
    """Return heads [B, heads] in float32, and each row's own score if the model has one."""
    import torch

    # transformers finds the end of a sequence by its padding, so the padding id must occur nowhere else; many
    # tokenizers use the end of turn as padding.
    used = {token for row in rows for token in row}
    pad = next(i for i in range(len(used) + 1) if i not in used)
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = pad
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=model.device)
    output = model(input_ids=ids, attention_mask=mask)
    logits = output.logits.float()
    rewards = getattr(output, "rewards", None)
    if rewards is not None and rewards.ndim == 2:  # ArmoRM: heads in `rewards`, their gated sum in `score`
        return rewards.float(), getattr(output, "score", logits).float().flatten().tolist()
    return logits, logits.flatten().tolist() if logits.shape[-1] == 1 else [None] * len(rows)
