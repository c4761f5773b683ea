"""What a run records of its command."""

from rap_lightning.provenance import command_line


def test_the_command_is_recorded_without_secrets_and_with_all_numbers() -> None:
    numbers = ["--data.token_budget", "4096", "--model.generation.max_new_tokens=32"]
    secrets = ["--hub_token", "hf_abc", "--x.api_key=sk-abc", "--x.password", "abc", "--logger.token=def"]
    assert command_line(["fit", *numbers, *secrets, "--data.source", "a b"]) == (
        "fit --data.token_budget 4096 --model.generation.max_new_tokens=32 "
        "--hub_token '***' '--x.api_key=***' --x.password '***' '--logger.token=***' --data.source 'a b'"
    )


def test_the_highest_memory_of_the_process_is_recorded_in_bytes() -> None:
    import numpy as np

    from rap_lightning.callbacks.run_record import peak_memory

    before = peak_memory()["host_bytes"]
    held = np.ones(before // 8 + 2**23)  # more than there ever was, every page written
    assert peak_memory()["host_bytes"] >= before + 2**25
    del held
    assert peak_memory()["host_bytes"] >= before + 2**25, "the highest, not what is held now"
