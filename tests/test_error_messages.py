"""A mistake on a command line or in a config: a few lines that say where it is, what was expected and what to do."""

import re
from pathlib import Path

import pytest

from conftest import ROOT, called, scored_rows, write_jsonl

BASE = "model:\n  policy: {path: x}\ndata: {source: y}\n"


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(BASE)


def told(capfd: pytest.CaptureFixture[str], *args: str) -> str:
    """What a mistaken command prints, which is an error of a few lines and nothing else."""
    assert called(*args) == 2
    shown = capfd.readouterr()
    assert not shown.out
    assert shown.err.startswith("error: ")
    assert "Traceback" not in shown.err
    assert "usage:" not in shown.err
    assert len(shown.err.splitlines()) <= 4, shown.err
    return shown.err


FLAGS = {
    "--trainer.max_stepss 3": ["--trainer.max_stepss: no such option. Did you mean --trainer.max_steps?",
                               "rap-lightning fit --help lists all"],
    "--model.bta 0.1": ["--model.bta: no such option. Did you mean --model.loss.beta?"],
    "--model.bta=0.1 --data.sourc x": ["--model.bta: no", "--data.sourc: no such option. Did you mean --data.source?"],
    "--lr 0.1": ["--lr: no such option. Did you mean", "--model.optimizer.lr"],
    "--gamma 1": ["--gamma: no such option. Did you mean --model.loss.gamma?"],
    "--lora.r 4": ["--lora.r: no such option. Did you mean --model.policy.lora.r?"],
    "--hlep": ["--hlep: no such option. Did you mean --help?"],
    "stray.yaml": ["stray.yaml: expected an option (--NAME VALUE). Did you mean --config stray.yaml?"],
    "--model.loss.bta 0.1": ["--model.loss.bta: DPO has no option bta. Did you mean beta?",
                             "It has beta, label_smoothing.", "rap-lightning fit --model.loss.help DPO says"],
    "--model.loss.init_args.bta 0.1": ["--model.loss.init_args.bta: DPO has no option bta. Did you mean beta?"],
    "--model.loss SimPO --model.loss.gama 1": ["--model.loss.gama: SimPO has no option gama. Did you mean gamma?"],
    "--model.optimizer SGD --model.optimizer.momentun 1": ["momentun: SGD has no", "Did you mean momentum?"],
    "--model.optimizer.lr 1": ["its class is not named. Name it before its options: --model.optimizer CLASS", "AdamW"],
    "--data.goal.scale.hig 5": ["--data.goal.scale.hig: RewardScale has no option hig. Did you mean high?",
                                "rap-lightning fit --data.goal.help OverallGoal"],
    "--data.goal.scal.high 5": ["--data.goal.scal.high: OverallGoal has no option scal. Did you mean scale?"],
    "--model.policy.lora.rr 2": ["Lora has no option rr. Did you mean r?", "fit --model.policy.lora.help says"],
    "--trainer.callbacks+=EarlyStopping --trainer.callbacks.monitr=x": [
        "--trainer.callbacks.monitr: EarlyStopping has no option monitr. Did you mean monitor?"],
    "--model.loss DPOO": ["--model.loss DPOO: no such class. Did you mean DPO?", "import path of one of your own"],
    "--model.loss.help DPOO": ["--model.loss.help DPOO: no such class. Did you mean DPO?"],
    "--model.loss rap_lightning.losses.DPOO": ["rap_lightning.losses.DPOO: no such class. Did you mean DPO?"],
    "--model.loss rap_lightnin.DPO": ["no module rap_lightnin. Did you mean DPO?"],
    "--model.loss torch.nn.Sofplus": ["torch.nn.Sofplus: no such class. Did you mean torch.nn.Softplus?"],
    "--model.optimizer AdmW": ["--model.optimizer AdmW: no such class. Did you mean AdamW?"],
    "--data.goal.scale Quantile": ["--data.goal.scale Quantile: no such class. Did you mean QuantileScale?"],
    "--data.selection Zufall": ["There are AdjacentPairs, AllPairs, BestVsRandom, BestVsWorst; or give the import"],
    "--trainer.max_steps three": ["--trainer.max_steps: expected a whole number; found 'three'."],
    "--data.layout padd": ["--data.layout: expected one of auto, padded, packed, tree; found 'padd'.",
                           "Did you mean padded?"],
    "--model.policy.lora.r two": ["--model.policy.lora.r: expected a whole number; found 'two'."],
    "--seed_everything x": ["--seed_everything: expected true or false or a whole number; found 'x'."],
    "--model.loss.beta": ["--model.loss.beta: expected a value after it; found none."],
    "--config nowhere.yaml": ["--config: no such file: ", "nowhere.yaml. Expected the path of a YAML file."],
    "--config": ["--config: expected a value after it"],
}  # fmt: skip


@pytest.mark.usefixtures("base")
@pytest.mark.parametrize("flags", FLAGS)
def test_a_mistaken_flag_of_fit_is_told_in_a_few_lines(flags: str, capfd: pytest.CaptureFixture[str]) -> None:
    error = told(capfd, "fit", "-c", "base.yaml", *flags.split())
    for part in FLAGS[flags]:
        assert part in error, error


LINES = {
    "trainer:\n  max_epochs: 1\n  max_stepss: 3": [
        3, "trainer.max_stepss: no such option. Did you mean trainer.max_steps?"],
    "modl:\n  policy: {path: x}": [2, "modl.policy.path: no such option. Did you mean model.policy.path?"],
    "model:\n  loss:\n    class_path: DPO\n    init_args:\n      bta: 0.1": [
        5, "model.loss.bta: DPO has no option bta. Did you mean beta?"],
    "model:\n  loss:\n    class_path: DPOO": [2, "model.loss: DPOO: no such class. Did you mean DPO?"],
    "model:\n  policy: {path: x, lora: {r: 4, alhpa: 2}}": [
        2, "model.policy.lora.alhpa: Lora has no option alhpa. Did you mean alpha?"],
    "model:\n loss:\n  class_path: Mixture\n  init_args:\n   losses:\n   - class_path: DPO\n"
    "   - class_path: SimPO\n     init_args: {gama: 1}\n   weights: [1, 1]": [
        8, "model.loss.losses.gama: SimPO has no option gama. Did you mean gamma?"],
    "trainer:\n  callbacks:\n  - class_path: lightning.pytorch.callbacks.EarlyStopping\n    init_args: {monitr: x}": [
        4, "trainer.callbacks.monitr: EarlyStopping has no option monitr. Did you mean monitor?"],
    "data:\n  batch_size: many": [2, "data.batch_size: expected a whole number; found 'many'."],
}  # fmt: skip


@pytest.mark.usefixtures("base")
@pytest.mark.parametrize("content", LINES)
def test_a_mistake_in_a_config_is_told_with_its_line(
    content: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "over.yaml").write_text(content)
    line, said = LINES[content]
    command = "plan" if line == 3 else "fit"
    assert f"error: over.yaml line {line}: {said}" in told(capfd, command, "-c", "base.yaml", "-c", "over.yaml")


@pytest.mark.usefixtures("base")
def test_a_config_that_is_none_is_told_from_the_others(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for content, said in (
        ("data: [a\n", "--config over.yaml: it can't be read as YAML: line 2, column 1: "),
        ("just text\n", "--config over.yaml: expected keys with values, found 'just text'."),
    ):
        (tmp_path / "over.yaml").write_text(content)
        assert said in told(capfd, "fit", "-c", "base.yaml", "-c", "over.yaml")


COMMANDS = {
    "fit": "missing: --model.policy.path, --data.source. Give them as options, or in a config",
    "validate -c base.yaml --ckptpath x": "--ckptpath: no such option. Did you mean --ckpt_path?",
    "predict -c base.yaml --data.predict.gaol 3": "Did you mean --data.predict.goal?",
    "plan -c base.yaml --devics 3": "--devics: no such option. Did you mean --devices?",
    "plan -c base.yaml --devices x": "--devices: expected a whole number; found 'x'.",
    "plan -c base.yaml --trainer.max_stepss 3": "Did you mean --trainer.max_steps?\n  rap-lightning plan --help",
    "inspect --sorce x": "--sorce: no such option. Did you mean --source?\n  rap-lightning inspect --help lists all.",
    "inspect": "missing: --source. Give it as an option, or in a config (--config FILE).\n  rap-lightning inspect",
    "inspect --source x --filters.mingap 1": "Did you mean --filters.min_gap?",
    "inspect --source x --max_length ten": "--max_length: expected a whole number or null; found 'ten'.",
    "relabel --source x --output y --rewards ImplictReward": "Did you mean ImplicitReward?\n  There are ",
    "generate --prompts x --model y --output z --temprature 1": "Did you mean --temperature?",
    "generate --prompts x --model y --output z --engine Endpoint --engine.ur u": "Endpoint has no option ur. Did you",
    "score --source x --output y --judge RewardModl": "--judge RewardModl: no such class. Did you mean RewardModel?",
    "score --source x --output y --judge RewardModel": "missing: --judge.model. Give it",
    "score --source x --output y --model z": "--model: no such option. Did you mean --judge.model?",
    "score --source x --output y --judge Function --judge.function no_judge.f": "--judge.function no_judge: no module",
    "rounds --promts x": "--promts: no such option. Did you mean --prompts?",
    "evaluate --model x --source y --parts [unlerning]": "found 'unlerning'. Did you mean unlearning?",
    "evaluate --suite AlpacaEvl --model x --output y": "--suite AlpacaEvl: no such class. Did you mean AlpacaEval?",
    "export --checkpont x": "--checkpont: no such option. Did you mean --checkpoint?",
    "export --checkpoint x --output y --dtype float61": "found 'float61'. Did you mean float16?",
    "report a --ouput x": "--ouput: no such option. Did you mean --output?\n  rap-lightning report --help lists all.",
    "report": "missing: RUN.\n  rap-lightning report --help shows an example.",
    "schema --outputt x": "--outputt: no such option. Did you mean --output?",
}


@pytest.mark.usefixtures("base")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_mistake_in_any_command_is_told_alike(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert COMMANDS[command] in told(capfd, *command.split())


@pytest.mark.usefixtures("base")
def test_what_a_module_of_ones_own_lacks_is_told_from_the_module_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    loss = "import rap_lightning\n\nclass Square(rap_lightning.PreferenceLoss):\n    pass\n"
    (tmp_path / "my_losses.py").write_text(loss)
    (tmp_path / "my_broken.py").write_text("import torchh\n")
    fit = ("fit", "-c", "base.yaml", "--model.loss")
    assert "my_losses.Sqare: no such class. Did you mean my_losses.Square?" in told(capfd, *fit, "my_losses.Sqare")
    assert "no module my_loses. Did you mean my_losses.Square?" in told(capfd, *fit, "my_loses.Square")
    error = told(capfd, *fit, "my_broken.Square")
    assert "my_broken.Square: it can't be imported: No module named 'torchh'" in error


@pytest.mark.usefixtures("base")
def test_the_last_place_that_gives_an_option_is_the_one_that_is_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "one.yaml").write_text("data:\n  batch_size: many\n")
    (tmp_path / "two.yaml").write_text("data:\n\n  batch_size: few\n")
    error = told(capfd, "fit", "-c", "base.yaml", "-c", "two.yaml", "-c", "one.yaml")
    assert re.search(r"(two.yaml line 3|one.yaml line 2): data.batch_size: .*'(few|many)'", error)
    section = ["--data", "{source: x, batch_sizze: 2}"]
    assert "--data: data.batch_sizze: PreferenceDataModule has no option batch_sizze. Did you mean batch_size?" in told(
        capfd, "fit", "-c", "base.yaml", *section
    )


def test_splits_and_lengths_that_a_config_of_other_data_sets_are_told_with_their_flags(
    tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A recipe on one's own pairs: train_prefs is no split of theirs, and its prompts are longer than all of theirs."""
    pairs, folder = scored_rows(6), tmp_path / "mine"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", pairs)
    one = write_jsonl(tmp_path / "one.jsonl", pairs)
    recipe = ["fit", "--config", ROOT / "configs/smollm2-135m-instruct.yaml", "--trainer.accelerator", "cpu"]
    recipe += ["--model.policy.path", tiny, "--data.max_length", "192", "--trainer.default_root_dir", tmp_path]
    for source, there in ((folder, "has the splits train"), (one, "has the single split 'train'")):
        assert called(*recipe, "--data.source", source) == 2
        said = capfd.readouterr().err
        assert (
            f"{source.name} {'is one file and ' if source == one else ''}{there}; 'train_prefs' was asked for." in said
        )
        assert "--data.train_split NAME and --data.val_split NAME (null: " in said
    named = ["--data.train_split", "train", "--data.val_split", "null", "--trainer.val_check_interval", "1.0"]
    recipe += ["--data.source", folder, *named, "--export.enabled", "false"]
    assert called(*recipe) == 2
    said = capfd.readouterr().err
    assert "from 1 to max_length - 1 = 191, found 512. Set --data.max_prompt_length, or raise --data.max_length" in said
    assert called(*recipe, "--data.max_prompt_length", "64") == 0, capfd.readouterr().err


def test_an_error_that_ones_own_code_had_handled_is_no_cause_of_the_next() -> None:
    from rap_lightning.cli.error_messages import causes
    from rap_lightning.errors import ConfigError

    def own() -> None:
        try:
            raise ConfigError("handled")
        except ConfigError:
            {}["missing"]

    with pytest.raises(KeyError) as caught:
        own()
    assert list(causes(caught.value)) == [caught.value]
    wrapped = RuntimeError("told")
    wrapped.__cause__ = ConfigError("beneath")
    assert list(causes(wrapped)) == [wrapped, wrapped.__cause__]
