"""A sequence-classification model as judge."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from rap_lightning.errors import ConfigError
from rap_lightning.onpolicy.judges.base import Item, Judge, Verdict, declared
from rap_lightning.onpolicy.sampled_model import Model, free_memory, weights_dtype
from rap_lightning.preferences.pairs import BadRow

OVERALL = "overall_score"


class RewardModel(Judge):
    """Any reward model that transformers loads for sequence classification: one score, or several heads.

    Conversation and response are written by the model's own chat template. The reward is the score of the only head, or
    what ``overall`` says. ArmoRM and models like it, whose output has ``rewards`` beside ``score``, need
    ``trust_remote_code``; name their heads in the order of the model's card with ``heads``.

    Args:
        model: a Hugging Face folder or Hub id.
        batch_size: responses at a time, of similar length.
        dtype: of the weights; by default bfloat16 on an accelerator and float32 on a CPU.
        max_length: longest conversation and response in tokens; prompts are cut first. By default the model's context.
        attributes: further rewards to keep, under names of yours: {helpfulness: ultrafeedback-helpfulness}.
        heads: names of all heads, in order, where the model's config has none.
        overall: the head that is the reward, or mean for the average of the attributes; by default the model's own
            score.
        scale: lowest and highest reward, where the model has ends: [1, 10].
        chat_template: file of a template, for a tokenizer that lacks one.
        revision: of the model on the Hub.
        trust_remote_code: run Python code that comes with the model. Only for authors you trust.
    """

    def __init__(
        self,
        model: str,
        batch_size: int = 16,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        max_length: int | None = None,
        attributes: dict[str, str] | None = None,
        heads: list[str] | None = None,
        overall: str | None = None,
        scale: list[float] | None = None,
        chat_template: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ConfigError(f"--judge.batch_size must be at least 1, found {batch_size}")
        if overall == "mean" and not attributes:
            raise ConfigError("--judge.overall mean needs --judge.attributes to take the mean of.")
        self.source = Model(model, revision, trust_remote_code)
        self.batch_size, self.dtype, self.max_length = batch_size, dtype, max_length
        self.attributes, self.heads, self.overall = attributes or {}, heads, overall
        self.scale, self.chat_template = declared(scale), chat_template
        self._template = ""
        if chat_template is not None:
            try:
                self._template = Path(chat_template).read_text(encoding="utf-8")
            except OSError as error:
                raise ConfigError(f"--judge.chat_template {chat_template} can't be read: {error.strerror}") from error

    def settings(self) -> dict[str, Any]:
        """Model, and how its numbers are read."""
        return {
            "class": "RewardModel", "model": self.source.identity(), "dtype": self.dtype, "max_length": self.max_length,
            "attributes": self.attributes, "heads": self.heads, "overall": self.overall, "scale": self.scale,
            "template": self._template,
        }  # fmt: skip

    def judge(self, items: Sequence[Item]) -> Iterator[list[Verdict]]:
        """The longest first."""
        import torch

        model, encoder, names = self._load()
        encoded: list[tuple[Item, list[int]]] = []
        for item in items:
            try:
                encoded.append((item, self._encode(encoder, item)))
            except BadRow as problem:
                yield [Verdict(item.id, error=f"{problem.column}: {problem.reason}")]
        encoded.sort(key=lambda pair: (-len(pair[1]), pair[0].id))
        for first in range(0, len(encoded), self.batch_size):
            part = encoded[first : first + self.batch_size]
            with torch.inference_mode():
                heads, own = self._forward(model, [ids for _, ids in part])
            yield [
                self._verdict(item, row, score, names)
                for (item, _), row, score in zip(part, heads.tolist(), own, strict=True)
            ]
        del model
        free_memory()

    def _load(self) -> tuple[Any, Any, list[str]]:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        from rap_lightning.batches.encode import Encoder

        path = self.source.path
        options = {"revision": self.source.revision, "trust_remote_code": self.source.trust_remote_code}
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = weights_dtype(self.dtype, device)
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, **options)
            model = AutoModelForSequenceClassification.from_pretrained(
                path, dtype=dtype, use_safetensors=True, **options
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            code = "" if self.source.trust_remote_code or "trust_remote_code" not in str(error) else (
                " It brings code of its own: --judge.trust_remote_code true, if you trust its authors."
            )  # fmt: skip
            raise ConfigError(f"--judge.model {path}: no reward model can be loaded from it: {reason}{code}") from error
        if self._template:
            tokenizer.chat_template = self._template
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError(
                f"--judge.model {path}: its tokenizer has no chat template, so how a conversation reads to it "
                "isn't known. Its "
                "card says; write that as a jinja file and name it with --judge.chat_template."
            )
        text = model.config.get_text_config()
        limits = [self.max_length, getattr(text, "max_position_embeddings", None)]
        longest = min(limit for limit in [*limits, 1_000_000] if limit)
        if self.max_length is not None and self.max_length > longest:
            raise ConfigError(f"--judge.max_length {self.max_length}: the model takes {longest} tokens.")
        return model.to(device).eval(), Encoder(tokenizer, None, longest), self._names(model)

    def _names(self, model: Any) -> list[str]:
        count = int(model.config.num_labels)
        labels = [str(model.config.id2label.get(i, f"LABEL_{i}")) for i in range(count)]
        named = not all(label == f"LABEL_{i}" for i, label in enumerate(labels))
        names = self.heads or (labels if named else [])
        if not names and (self.attributes or (self.overall not in (None, "mean"))):
            raise ConfigError(
                f"the reward model doesn't name its {count} heads: name them in order with --judge.heads."
            )
        wanted = [*self.attributes.values(), *([self.overall] if self.overall not in (None, "mean") else [])]
        if unknown := [name for name in wanted if name not in names]:
            raise ConfigError(f"the reward model has no head {unknown[0]!r}; there are {', '.join(names)}.")
        return list(names)

    def _encode(self, encoder: Any, item: Item) -> list[int]:
        from rap_lightning.batches.encode import Notes

        notes = Notes()
        prompt = encoder.prompt(item.history, None, notes)
        response = encoder.response(prompt, item.response, notes, "response")
        fitted = encoder.fit(prompt, item.history, len(response))
        ids: list[int] = [*fitted.ids, *response]
        self.counts.update(f"repaired: {what}" for what in notes.repaired)
        if fitted.cut:
            self.counts["cut: prompts that didn't fit"] += 1
        if len(ids) > encoder.max_length:
            self.counts["cut: ends of responses that didn't fit"] += 1
            ids = ids[: encoder.max_length]
        return ids

    def _forward(self, model: Any, rows: list[list[int]]) -> tuple[Any, list[float | None]]:
        """([B, heads] float32, each row's own score where the model gives one)."""
        import torch

        # transformers finds a sequence's end by its first or last padding, so that must be an id that stands nowhere
        # else; many tokenizers name the end of turn as padding
        used = {token for row in rows for token in row}
        pad = next(i for i in range(len(used) + 1) if i not in used)
        model.config.pad_token_id = model.config.get_text_config().pad_token_id = pad
        width = max(map(len, rows))
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=model.device)
        output = model(input_ids=ids, attention_mask=mask)
        logits = output.logits.float()
        rewards = getattr(output, "rewards", None)
        own: list[float | None] = [None] * len(rows)
        if (
            rewards is not None and rewards.ndim == 2
        ):  # ArmoRM: heads in `rewards`, what a gate makes of them in `score`
            own = getattr(output, "score", logits).float().flatten().tolist()
            return rewards.float(), own
        if logits.shape[-1] == 1:
            own = logits.flatten().tolist()
        return logits, own

    def _verdict(self, item: Item, heads: list[float], own: float | None, names: list[str]) -> Verdict:
        if names and len(names) != len(heads):
            raise ConfigError(f"--judge.heads names {len(names)} heads, and the reward model has {len(heads)}.")
        by_name = dict(zip(names, heads, strict=True)) if names else {}
        attributes = {ours: by_name[theirs] for ours, theirs in self.attributes.items()}
        if self.overall == "mean":
            reward: float | None = sum(attributes.values()) / len(attributes)
        else:
            reward = own if self.overall is None else by_name[self.overall]
        if reward is None:
            raise ConfigError(
                f"the reward model has {len(heads)} heads and no score of its own: say with --judge.overall "
                "which one is the "
                "reward, or mean."
            )
        if not all(map(math.isfinite, [reward, *attributes.values()])):
            return Verdict(item.id, error="the reward model gave a number that is not finite")
        return Verdict(item.id, reward, attributes)
