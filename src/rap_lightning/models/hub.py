"""Upload an exported folder to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from rap_lightning.errors import ConfigError, first_line


def check_push(repository: str) -> str:
    """Return the token for an upload, before anything is written.

    Raises:
        ConfigError: the name isn't valid, or there is no token, neither in the environment nor of ``hf auth login``.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(f"--push_to_hub {repository}: not a name on the Hub: {error}") from error
    if "/" not in repository:
        raise ConfigError(f"--push_to_hub {repository}: name the organisation or user too, as in ORG/NAME.")
    token = get_token()
    if token is None:
        raise ConfigError(
            f"--push_to_hub {repository}: no token. Log in with `hf auth login`, or set HF_TOKEN in the environment; "
            "the token must be one that may write there."
        )
    return token


def push(folder: Path, repository: str, token: str, *, private: bool, step: int | None = None) -> str:
    """Upload a folder as one commit, and return its address. Files of earlier commits stay in the history.

    Raises:
        ConfigError: the Hub refused, or can't be reached, or the repository is public where a private one was asked
            for. The folder stays as it is.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    try:
        api.create_repo(repository, private=private, exist_ok=True, repo_type="model")
        if private and not api.repo_info(repository, repo_type="model").private:
            raise ConfigError(
                f"{repository} exists and is public. To publish the model there, add --private false; the folder "
                f"{folder} is written."
            )
        at = f", step {step:,}" if step is not None else ""
        api.upload_folder(
            repo_id=repository, folder_path=folder, repo_type="model", delete_patterns="*",
            commit_message=f"rap-lightning export{at}",
        )  # fmt: skip
    except ConfigError:
        raise
    except Exception as error:  # the client raises errors of several libraries
        reason = (first_line(error) or type(error).__name__).replace(token, "***")
        raise ConfigError(
            f"{repository}: the Hub didn't take the folder: {reason}. {folder} is written; to try again: "
            f"hf upload {repository} {folder}"
        ) from None  # the cause may hold the token
    return f"https://huggingface.co/{repository}"
