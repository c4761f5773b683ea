"""Where a model comes from and how it is loaded: a Hugging Face folder or Hub id, an adapter folder, or a checkpoint.

Engines, judges and the evaluation take their models as :class:`ModelSource`; nothing is loaded before it is used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rap_lightning.errors import ConfigError
from rap_lightning.onpolicy.requested_goals import GoalRecord, read_goal_record, without_own_goal
from rap_lightning.preferences.chat_template import read_tokenizer
from rap_lightning.preferences.template_options import TemplateOptions

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from rap_lightning.models.checkpoint.saved_policy import SavedPolicy
    from rap_lightning.models.policy import Policy
    from rap_lightning.models.policy_config import PolicyConfig

OWN_TEMPLATE = TemplateOptions()
DIGEST_BYTES = 1 << 20
"""Bytes at either end of a weights file that enter its digest: training changes all of them."""
WEIGHT_FILES = (".safetensors", ".json", ".jinja", ".bin", ".distcp", ".pt")


class ModelSource:
    """A model by its path: a folder, a Hub id, or a .ckpt that fit wrote. Error messages name it by ``option``."""

    def __init__(
        self, path: str, revision: str | None = None, trust_remote_code: bool = False, option: str = "--model",
        template: TemplateOptions = OWN_TEMPLATE,
    ) -> None:  # fmt: skip
        self.path, self.revision, self.trust_remote_code, self.option = path, revision, trust_remote_code, option
        self.place = Path(path).expanduser()
        if revision is not None and self.place.exists():
            raise ConfigError("--revision has no effect on a local model; leave it out.")
        self.template = template
        self._saved: SavedPolicy | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def is_checkpoint(self) -> bool:
        """Whether it is a checkpoint of fit."""
        return self.path.endswith(".ckpt")

    @property
    def is_adapter(self) -> bool:
        """Whether it is the folder of an adapter, which names its base model."""
        return (self.place / "adapter_config.json").is_file()

    @property
    def adapts(self) -> bool:
        """Whether it is an adapter on a base model, or a checkpoint of one."""
        return self._config().adapts

    @property
    def name(self) -> str:
        """The folder's name, or the last part of a Hub id."""
        return self.place.resolve().name if self.place.exists() else self.path.rstrip("/").rpartition("/")[2]

    def record(self, goal_from: str | None = None) -> GoalRecord | None:
        """Return the goal record of the model, or of the folder ``goal_from`` instead, which must have one."""
        if goal_from is not None:
            record = read_goal_record(goal_from)
            if record is None:
                raise ConfigError(f"--goal_from {goal_from}: no goal.json there")
            return record
        return self._checkpoint().record.get("goal") if self.is_checkpoint else read_goal_record(self.path)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer, with a chat template that writes no goal by itself."""
        if self._tokenizer is None:
            self._tokenizer = without_own_goal(self.fit_tokenizer(), self.record())
        return self._tokenizer

    def fit_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer as fit does, with the chat template of a checkpoint's run."""
        with _naming(self.option):
            tokenizer = self._config().load_tokenizer()
            if self.is_checkpoint:  # that of training, not that of the base model's folder now
                tokenizer.chat_template = self._checkpoint().record.get("chat_template") or tokenizer.chat_template
            return self.template.applied(tokenizer)

    def tokenizer_as_saved(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer of a local folder, with the chat template that a server reads there."""
        from rap_lightning.models.pretrained import load_pretrained

        with _naming(self.option):
            found: PreTrainedTokenizerBase = load_pretrained(
                "tokenizer", self.path, read_tokenizer, {"trust_remote_code": self.trust_remote_code}
            )
        return found

    def context(self) -> int:
        """Return the longest sequence in tokens, from the model's config and the tokenizer."""
        with _naming(self.option):
            text = self._config().load_config().get_text_config()
        limits = (getattr(text, "max_position_embeddings", None), self.tokenizer().model_max_length)
        return min([int(limit) for limit in limits if limit is not None and 0 < limit < 1e9], default=1_000_000)

    def load(self, dtype: torch.dtype, device: torch.device | str) -> Any:
        """Return the causal LM in evaluation mode, with its adapter."""
        with _naming(self.option):
            return self._load(dtype).to(device).eval()

    def load_policy(self, dtype: torch.dtype, device: torch.device) -> Policy:
        """Return the model as a frozen policy whose head was checked against the model's own logits."""
        from rap_lightning.models.model_checks import check_head
        from rap_lightning.models.policy import Policy

        policy = Policy(self.load(dtype, device)).requires_grad_(False).eval()
        check_head(policy)
        return policy

    def identity(self) -> dict[str, Any]:
        """Return plain values that identify the model and the template options that its prompts are rendered with.

        A local model is its name and a digest of its files' sizes, beginnings and ends.
        """
        asked = {"template": [self.template.name, dict(self.template.kwargs)]} if self.template else {}
        if not self.place.exists():
            return {"path": self.path, "revision": self.revision} | asked
        files = [self.place] if self.place.is_file() else sorted(
            file for file in self.place.iterdir() if file.suffix in WEIGHT_FILES
        )  # fmt: skip
        digest = hashlib.sha256()
        for file in files:
            size = file.stat().st_size
            with file.open("rb") as content:
                digest.update(f"{file.name if len(files) > 1 else ''} {size}".encode() + content.read(DIGEST_BYTES))
                if size > DIGEST_BYTES:
                    content.seek(-DIGEST_BYTES, 2)
                    digest.update(content.read())
        base = {"base": self.adapter_base()} if self.is_adapter else {}
        return {"path": self.name, "digest": digest.hexdigest()[:24]} | base | asked

    def trained_from(self) -> dict[str, Any]:
        """Return the recorded options of the policy with which a checkpoint's run began."""
        return dict(self._checkpoint().record["policy"])

    def adapter_base(self) -> str:
        """Return the base model that an adapter folder names."""
        found = json.loads((self.place / "adapter_config.json").read_text(encoding="utf-8"))
        return str(found["base_model_name_or_path"])

    def _config(self) -> PolicyConfig:
        from rap_lightning.models.checkpoint.saved_policy import config_of
        from rap_lightning.models.policy_config import PolicyConfig

        if self.is_checkpoint:
            return config_of(self.trained_from(), self.place, trust_remote_code=self.trust_remote_code)
        if self.is_adapter:
            return PolicyConfig(self.adapter_base(), adapter=self.path, trust_remote_code=self.trust_remote_code)
        return PolicyConfig(self.path, self.revision, trust_remote_code=self.trust_remote_code)

    def _load(self, dtype: torch.dtype) -> Any:
        from rap_lightning.models.checkpoint.saved_policy import restored

        config = self._config()
        if not self.is_checkpoint:
            return config.load_initial(dtype)
        model = restored(self._checkpoint(), config, dtype).model
        return model if config.adapts else model.to(dtype)

    def _checkpoint(self) -> SavedPolicy:
        from rap_lightning.models.checkpoint.open_saved import open_saved

        if self._saved is None:
            self._saved = open_saved(self.place)
        return self._saved


def default_device(rank: int = 0) -> torch.device:
    """Return the accelerator of a local rank, or the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", rank % torch.cuda.device_count())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def weights_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """Return the dtype of this name; by default bfloat16 on an accelerator and float32 on a CPU."""
    import torch

    if name is not None:
        found: torch.dtype = getattr(torch, name)
        return found
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def free_memory() -> None:
    """Return unused memory to the device, because the next stage may be another process."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def _naming(option: str) -> Iterator[None]:
    """Have errors name the option of these commands instead of fit's."""
    try:
        yield
    except ConfigError as error:
        from rap_lightning.models.pretrained import trust_option

        text = str(error).replace("--model.policy.path", option)
        raise ConfigError(text.replace("--model.policy.trust_remote_code", trust_option(option))) from error
