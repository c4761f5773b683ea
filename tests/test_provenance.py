"""What a run records of its command."""

from rap_lightning.provenance import command_line


def test_the_command_is_recorded_without_secrets_and_with_all_numbers() -> None:
    numbers = ["--data.token_budget", "4096", "--model.generation.max_new_tokens=32"]
    secrets = ["--hub_token", "hf_abc", "--x.api_key=sk-abc", "--x.password", "abc"]
    assert command_line(["fit", *numbers, *secrets]) == (
        "fit --data.token_budget 4096 --model.generation.max_new_tokens=32 "
        "--hub_token '***' '--x.api_key=***' --x.password '***'"
    )
