"""Load a trained LoRA adapter, to continue it or as a reference: a peft folder or Hub id, safetensors only."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rap_lightning.errors import ConfigError, first_line, join_some
from rap_lightning.models.digests import weights_digest

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

BESIDE = ("adapter_*", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.jinja")
"""Files of an adapter on the Hub that are downloaded."""
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
EMBEDDINGS = re.compile(r"\b(embed_tokens|lm_head|wte|word_embeddings|embed_in|embed_out|output_layer)\.weight$")
VARIANTS = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "monteclora_config", "use_bdlora",
    "use_qalora", "velora_config",
)  # fmt: skip
"""Options of peft's LoraConfig with which an adapter computes something else than LoRA, DoRA or rsLoRA."""
KEEP_BASE = ("gaussian", "eva", "mica")
"""Initialisations by name that leave the base model's weights as they are."""
WEIGHTS, PICKLE, CONFIG = "adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"


def adapter_folder(path: str, revision: str | None = None) -> Path:
    """Return the folder of an adapter, after downloading it from the Hub where ``path`` is not a folder.

    Raises:
        ConfigError: there is none, or its weights are a pickle.
    """
    folder = Path(path)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(path, revision=revision, allow_patterns=list(BESIDE)))
        except Exception as error:  # the Hub's client raises many types for a wrong name or a missing connection
            reason = first_line(error) or type(error).__name__
            raise ConfigError(f"adapter {path}: no such folder, and the Hub has none: {reason}") from error
    elif revision is not None:
        raise ConfigError(f"adapter {path} is a folder, so adapter_revision {revision} has no effect; remove it.")
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"adapter {path}: expected a peft adapter ({CONFIG} and {WEIGHTS}), found no {CONFIG}.")
    if not (folder / WEIGHTS).is_file():
        if (folder / PICKLE).is_file():
            raise ConfigError(
                f"adapter {path}: its weights are a pickle ({PICKLE}), which can run code when it is read. Write them "
                f"as {WEIGHTS}, on a machine that may run that code."
            )
        raise ConfigError(f"adapter {path}: {CONFIG} is there, but no {WEIGHTS}.")
    return folder


def has_tokenizer(folder: Path) -> bool:
    """Return whether the folder of an adapter holds a tokenizer of its own."""
    return any((folder / name).is_file() for name in TOKENIZER)


def own_template(folder: Path) -> str | None:
    """Return the chat template that an adapter's folder holds without a tokenizer."""
    file = folder / "chat_template.jinja"
    return file.read_text(encoding="utf-8") if file.is_file() else None


def embedding_rows(folder: Path) -> int | None:
    """Return the rows of the embeddings that an adapter brings, for tokens that were added; None without any."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            names = [name for name in file.keys() if EMBEDDINGS.search(name)]  # noqa: SIM118 (not a dict)
            rows = {file.get_slice(name).get_shape()[0] for name in names}
    except (SafetensorError, OSError):
        return None  # `attach` reads it again, and says what is wrong
    return max(rows, default=None)


def adapter_digest(path: str, revision: str | None = None) -> str:
    """Return a digest of an adapter's weights and of the options in its config that change its numbers."""
    folder = adapter_folder(path, revision)
    try:
        config = dict(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    except (ValueError, TypeError, OSError) as error:
        raise ConfigError(f"adapter {path}: {CONFIG} can't be read: {error}") from error
    for name in ("base_model_name_or_path", "inference_mode", "revision"):  # where, not what
        config.pop(name, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    with (folder / WEIGHTS).open("rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def attach(model: PreTrainedModel, path: str, revision: str | None, base: str, *, dropout: bool) -> PeftModel:
    """Put an adapter on ``model`` and return the peft model, with the adapter trainable.

    Args:
        model: the base model.
        path, revision: the adapter.
        base: where ``model`` was loaded from, to compare with what the adapter was made for.
        dropout: keep the dropout that the adapter's config asks for.

    Raises:
        ConfigError: it is not a LoRA adapter, is damaged, or was made for another base model.
    """
    from peft import LoraConfig, PeftConfig, get_peft_model, set_peft_model_state_dict
    from peft.utils import get_peft_model_state_dict

    folder = adapter_folder(path, revision)
    state = _read_weights(folder, path)
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # peft raises many types for a config it doesn't know
        raise ConfigError(f"adapter {path}: {CONFIG} can't be read: {type(error).__name__}: {error}") from error
    if not isinstance(config, LoraConfig):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ConfigError(f"adapter {path}: expected a LoRA adapter (DoRA and rsLoRA among them), found {kind}.")
    if variant := next((name for name in VARIANTS if getattr(config, name, None)), None):
        raise ConfigError(
            f"adapter {path}: expected a LoRA adapter (DoRA and rsLoRA among them), and {CONFIG} sets {variant}, which "
            "isn't supported. Merge it into the base model with peft (merge_and_unload), and train that."
        )
    if isinstance(config.init_lora_weights, str) and config.init_lora_weights not in KEEP_BASE:
        raise ConfigError(
            f"adapter {path} began as {config.init_lora_weights} (init_lora_weights), which changes the base model's "
            "weights: it doesn't add to those of the base model. Convert it with peft (save_pretrained with "
            "path_initial_model_for_weight_conversion), or merge it into its base model."
        )
    _refuse_other_base(config.base_model_name_or_path, base, path)
    tied = [name for name in config.modules_to_save or () if EMBEDDINGS.search(f"{name}.weight")]
    if tied and model.config.get_text_config().tie_word_embeddings:
        raise ConfigError(
            f"adapter {path} has weights of its own for {', '.join(tied)} (modules_to_save), which {base} ties to its "
            "other embedding. Merge the adapter into the base model, and train that."
        )
    config.inference_mode = False
    config.init_lora_weights = True  # all of them are loaded
    if not dropout:
        config.lora_dropout = 0.0
    try:
        adapted = get_peft_model(model, config)
        result = set_peft_model_state_dict(adapted, state)
    except (RuntimeError, ValueError, KeyError) as error:
        facts = " ".join(line.strip() for line in str(error).splitlines()[:3])[:400]
        raise ConfigError(f"adapter {path} doesn't fit the model at {base}: {facts}") from error
    expected, unknown = set(get_peft_model_state_dict(adapted)), list(result.unexpected_keys)
    missing = sorted(expected - set(state))
    # peft loads a tensor under any name that the adapted model has, weights of the base model among them
    own = adapted.state_dict(keep_vars=True)
    if beside := sorted(
        name for name in set(state) - expected - set(unknown) if name in own or EMBEDDINGS.search(name)
    ):
        raise ConfigError(
            f"adapter {path} holds {join_some(beside)}, which its config doesn't name as trained: it replaces a weight "
            "of the base model, and an export would leave it out. Add it to modules_to_save, or merge the adapter into "
            "the base model and train that."
        )
    if missing or unknown:
        raise ConfigError(
            f"adapter {path} doesn't fit the model at {base}: "
            f"{len(missing)} weights missing ({', '.join(missing[:2]) or 'none'}), "
            f"{len(unknown)} unknown to the model ({', '.join(unknown[:2]) or 'none'})."
        )
    return adapted


def is_adapter(path: str) -> bool:
    """Return whether ``path`` is a folder with an adapter and without a model."""
    folder = Path(path)
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def _read_weights(folder: Path, path: str) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state: dict[str, Any] = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        reason = first_line(error) or type(error).__name__
        raise ConfigError(
            f"adapter {path}: {WEIGHTS} can't be read: {reason}. It is cut off, or not a safetensors file."
        ) from error
    if broken := [name for name, value in state.items() if not value.isfinite().all()]:
        raise ConfigError(f"adapter {path}: {broken[0]} is not finite (and {len(broken) - 1} more weights).")
    return state


def _refuse_other_base(named: str | None, base: str, path: str) -> None:
    """Raise ConfigError where the adapter names another base model that is on this machine.

    Names alone prove nothing (the same model can be a folder or a Hub id), so files are compared.
    """
    if not named or named == base or not Path(named).is_dir() or not Path(base).is_dir():
        return
    if Path(named).resolve() != Path(base).resolve() and weights_digest(named, None) != weights_digest(base, None):
        raise ConfigError(
            f"adapter {path} was trained on {named}, whose weights differ from those of {base}. "
            f"Set --model.policy.path {named}, or give an adapter of {base}."
        )
