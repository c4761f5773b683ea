"""A model to sample from: a Hugging Face folder or Hub id, an adapter's folder, or a checkpoint of fit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rap_lightning.errors import ConfigError
from rap_lightning.onpolicy import asked_goals as goals

if TYPE_CHECKING:
    from rap_lightning.models.checkpoint.saved_policy import SavedPolicy

SAMPLE = 1 << 20  # bytes at either end of a weights file that its digest reads: training changes all of them


class Model:
    """Where a model is, what is known of it, and how it is loaded. Nothing is loaded before it is asked for.

    Args:
        path: folder, Hub id, or a .ckpt that fit wrote: a file, or the folder of a sharded one.
        revision: of a Hub id.
        trust_remote_code: run Python code that comes with the model.
        option: that names it, for messages.
    """

    def __init__(
        self, path: str, revision: str | None = None, trust_remote_code: bool = False, option: str = "--model"
    ) -> None:
        self.option = option
        self.path, self.revision, self.trust_remote_code = path, revision, trust_remote_code
        self.place = Path(path).expanduser()
        if revision is not None and self.place.exists():
            raise ConfigError("--revision has no effect on a model that lies here; leave it out.")
        self._saved: SavedPolicy | None = None
        self._tokenizer: Any = None

    @property
    def is_checkpoint(self) -> bool:
        """Whether fit wrote it."""
        return self.path.endswith(".ckpt")

    @property
    def is_adapter(self) -> bool:
        """Whether it is an adapter alone, which names its base model."""
        return (self.place / "adapter_config.json").is_file()

    def record(self) -> goals.Record | None:
        """What the model knows of goals."""
        if self.is_checkpoint:
            found: goals.Record | None = self._checkpoint().record.get("goal")
            return found
        return goals.read_record(self.path)

    def record_or(self, goal_from: str | None) -> goals.Record | None:
        """What the model knows of goals, or what the folder of ``--goal_from`` says instead.

        Raises:
            ConfigError: that folder says nothing.
        """
        if goal_from is None:
            return self.record()
        record = goals.read_record(goal_from)
        if record is None:
            raise ConfigError(f"--goal_from {goal_from}: no goal.json there")
        return record

    def tokenizer(self) -> Any:
        """The tokenizer, its chat template without a goal of its own."""
        if self._tokenizer is None:
            with _named(self.option):
                self._tokenizer = goals.bare(self._config().load_tokenizer(), self.record())
        return self._tokenizer

    def fit_tokenizer(self) -> Any:
        """A fresh one as fit loads it."""
        return self._config().load_tokenizer()

    def tokenizer_as_it_is(self) -> Any:
        """A fresh one, whatever its chat template writes."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(
            self.path, revision=self.revision, trust_remote_code=self.trust_remote_code
        )

    def context(self) -> int:
        """The longest sequence that the model takes, in tokens, as far as it says."""
        from transformers import AutoConfig

        config, tokenizer = self._config(), self.tokenizer()
        path = self.adapter_base() if self.is_adapter else config.path
        text = AutoConfig.from_pretrained(
            path, revision=None if self.is_adapter else config.revision, trust_remote_code=self.trust_remote_code
        ).get_text_config()
        limits = [getattr(text, "max_position_embeddings", None), getattr(tokenizer, "model_max_length", None)]
        known = [int(limit) for limit in limits if limit is not None and 0 < limit < 1e9]
        return min(known) if known else 1_000_000

    def load(self, dtype: Any, device: Any) -> Any:
        """The causal LM in evaluation mode, an adapter attached.

        Raises:
            ConfigError: it can't be loaded.
        """
        config = self._config()
        with _named(self.option):
            if self.is_checkpoint:
                from rap_lightning.models.checkpoint.saved_policy import restored

                model = restored(self._checkpoint(), config, dtype).model
                model = model if config.adapts else model.to(dtype)
            elif self.is_adapter:
                model = self._with_adapter(dtype)
            else:
                model = config.load_model(dtype)
        return model.to(device).eval()

    def identity(self) -> dict[str, Any]:
        """What tells this model from another: name, and digest of its files' sizes, beginnings and ends."""
        if not self.place.exists():
            return {"path": self.path, "revision": self.revision}
        files = [self.place] if self.place.is_file() else sorted(
            f for f in self.place.iterdir() if f.suffix in (".safetensors", ".json", ".jinja", ".bin", ".distcp", ".pt")
        )  # fmt: skip
        digest = hashlib.sha256()
        for file in files:
            size = file.stat().st_size
            with file.open("rb") as content:
                digest.update(f"{file.name if len(files) > 1 else ''} {size}".encode() + content.read(SAMPLE))
                if size > SAMPLE:
                    content.seek(-SAMPLE, 2)
                    digest.update(content.read())
        name = self.place.resolve().name
        return {"path": name, "digest": digest.hexdigest()[:24]} | (
            {"base": self.adapter_base()} if self.is_adapter else {}
        )

    def began_with(self) -> tuple[str, str | None]:
        """(path, adapter) of the policy that a checkpoint's run began with."""
        options = self.trained_from()
        return str(options["path"]), options.get("adapter")

    def _config(self) -> Any:
        from rap_lightning.models.checkpoint.saved_policy import config_of
        from rap_lightning.models.policy_config import PolicyConfig

        if not self.is_checkpoint:
            return PolicyConfig(self.path, self.revision, trust_remote_code=self.trust_remote_code)
        options = self._checkpoint().record["policy"]
        return config_of(options, self.place, trust_remote_code=self.trust_remote_code)

    def _checkpoint(self) -> SavedPolicy:
        from rap_lightning.models.checkpoint.saved_policy import open_saved

        if self._saved is None:
            self._saved = open_saved(self.place)
        return self._saved

    def trained_from(self) -> dict[str, Any]:
        """Of a checkpoint, the recorded options of the policy that training began with."""
        return dict(self._checkpoint().record["policy"])

    def adapter_base(self) -> str:
        """Of an adapter's folder, the base model that it names."""
        found = json.loads((self.place / "adapter_config.json").read_text(encoding="utf-8"))
        return str(found["base_model_name_or_path"])

    def _with_adapter(self, dtype: Any) -> Any:
        from peft import PeftModel

        from rap_lightning.models.policy_config import PolicyConfig

        if not (self.place / "adapter_model.safetensors").is_file():
            raise ConfigError(
                f"{self.path} has no adapter_model.safetensors; other formats can hold code, and aren't read."
            )
        base = PolicyConfig(self.adapter_base(), trust_remote_code=self.trust_remote_code).load_model(dtype)
        return PeftModel.from_pretrained(base, str(self.place))


def weights_dtype(name: str | None, device: Any) -> Any:
    """The dtype by its name; by default bfloat16 on an accelerator and float32 on a CPU."""
    import torch

    if name is not None:
        return getattr(torch, name)
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def free_memory() -> None:
    """Give memory that nothing uses any more back, an accelerator's too: the next stage is another process."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def _named(option: str) -> Iterator[None]:
    """Errors name the option of these commands, not fit's."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(str(error).replace("--model.policy.path", option)) from error
