"""What ranks compare before they begin: everything except the paths of files on their node."""

from pathlib import Path
from typing import Any

from rap_lightning.distributed.consistency import comparable, difference, model_files


def test_nodes_may_keep_model_data_and_store_in_other_places_however_the_classes_are_named() -> None:
    def options(place: str) -> list[dict[str, Any]]:
        model: dict[str, Any] = {
            "policy": {"path": f"{place}/model"},
            "reference": {"init_args": {"folder": f"{place}/store"}},
        }
        data: dict[str, Any] = {"source": f"{place}/pairs", "batch_size": 4}
        common: dict[str, Any] = {"trainer": {"default_root_dir": f"{place}/runs"}, "config": [f"{place}/base.yaml"]}
        return [
            {"model": model, "data": data} | common,
            {"model": {"class_path": "Own", "init_args": model}, "data": {"class_path": "Own", "init_args": data}}
            | common,
        ]

    for here, there in zip(options("/a"), options("/b"), strict=True):
        assert difference(comparable(here), comparable(there)) == ""


def test_anything_else_that_differs_is_named_with_both_values() -> None:
    mine, first = ({"data": {"init_args": {"batch_size": size}}, "model": {"loss": {"beta": 0.1}}} for size in (8, 4))
    assert difference(comparable(mine), comparable(first)) == "data.batch_size (8 vs 4)"
    many = {f"option-{n}": {"value": n} for n in range(6)}
    assert difference(comparable(many), {}) == "option-0.value (0 vs None) and 5 more"


def test_where_a_process_holds_an_object_is_no_difference() -> None:
    assert comparable({"data": {"goal": "<Goal object at 0x7f01>"}}) == comparable(
        {"data": {"goal": "<Goal object at 0x7fff>"}}
    )


def test_a_model_of_other_content_is_noticed(tmp_path: Path) -> None:
    facts = []
    for name, content in (("one", b"{}"), ("same", b"{}"), ("other", b"{ }")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_bytes(content)
        facts.append(model_files(str(tmp_path / name)))
    assert facts[0] == facts[1]
    assert facts[0]["model config"] != facts[2]["model config"]
    assert model_files("org/a-hub-id") == {}
