"""Pipelines as people write them: what is read, and how a mistake is told before anything is done."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.pipeline.file import as_overrides, kind_of, read_pipeline
from pipelines.pipeline.work import waits_for
from workers.errors import ConfigError

DIGITS = Path(__file__).parent.parent / "infra" / "pipelines" / "digits.yaml"


def write(tmp_path: Path, **changes: Any) -> Path:
    """The example with other stages."""
    values = yaml.safe_load(DIGITS.read_text())
    values["stages"]["champion"]["gate"] = {"metric": "val_accuracy", "minimum": 0.9}
    for stage, fields in changes.items():
        name = stage.replace("__", "-")
        values["stages"][name] = {**values["stages"].get(name, {}), **fields}
        values["stages"][name] = {key: v for key, v in values["stages"][name].items() if v is not None}
    path = tmp_path / "digits.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def test_the_example_is_read_in_its_order() -> None:
    pipeline = read_pipeline(DIGITS)
    kinds = [kind_of(stage) for stage in pipeline.stages.values()]
    assert kinds == ["ingest", "train", "evaluate", "promote", "finetune", "evaluate", "promote"]
    assert list(pipeline.outside()) == []
    waits = {name: waits_for(pipeline, stage) for name, stage in pipeline.stages.items()}
    assert waits["images"] == set()
    assert waits["pretrain"] == {"images"}
    assert waits["children"] == {"champion"}
    assert waits["children-promoted"] == {"children-measured"}


def test_set_changes_a_field(tmp_path: Path) -> None:
    pipeline = read_pipeline(
        DIGITS, ["stages.pretrain.epochs=2", "stages.children.set.optim.clip_norm=2", "name=other"]
    )
    assert pipeline.name == "other"
    assert pipeline.values["stages"]["pretrain"]["epochs"] == 2
    assert as_overrides(pipeline.values["stages"]["children"]["set"]) == ["optim.clip_norm=2"]
    assert as_overrides({"train.images": 5, "model": {"pool": "gap"}}) == [
        "train.images=5",
        'model.pool="gap"',
    ]


def test_a_stage_may_begin_with_what_is_registered(tmp_path: Path) -> None:
    path = write(tmp_path, children={"finetune": "birds@champion"})
    assert list(read_pipeline(path).outside()) == ["birds@champion"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pretrain": {"epocs": 3}}, "stage pretrain: epocs: unknown field; did you mean epochs?"),
        ({"pretrain": {"epochs": -1}}, "stage pretrain: epochs: input should be greater than 0, got -1"),
        (
            {"pretrain": {"train": "vit-digit"}},
            "stage pretrain: train: 'vit-digit' is neither a recipe nor a file in {folder}; "
            "did you mean vit-digits?",
        ),
        ({"pretrain": {"data": None}}, "stage pretrain: data: missing; a recipe needs it"),
        (
            {"pretrain": {"data": "measured"}},
            "stage pretrain: data: stage measured is no earlier stage that ingests",
        ),
        (
            {"measured": {"evaluate": "pretrian"}},
            "stage measured: evaluate: there is no stage 'pretrian'; did you mean pretrain?",
        ),
        ({"measured": {"evaluate": "images"}}, "stage measured: evaluate: stage images makes no model"),
        (
            {"measured": {"evaluate": "children"}},
            "stage measured: evaluate: stage children comes later or is this one; put it before",
        ),
        (
            {"measured": {"evaluate": None, "evalute": "pretrain"}},
            "stage measured: it does not say what it does; did you mean `evaluate`?",
        ),
        (
            {"measured": {"promote": "pretrain"}},
            "stage measured: it does evaluate and promote; make a stage of each",
        ),
        (
            {"children": {"freeze": "heads"}},
            "stage children: freeze: 'heads' is none of none, patch_embedding,",
        ),
        ({"children": {"image_sizes": [16, 16]}}, "stage children: image_sizes: one is given twice"),
        (
            {"children": {"image_sizes": ["16y"]}},
            "stage children: --image-size 16y: expected pixels per side",
        ),
        (
            {"children": {"recipe": "adam"}},
            "stage children: recipe: input should be 'adamw', 'paper' or 'deit3'",
        ),
        ({"champion": {"to": "latest"}}, "stage champion: alias name 'latest'"),
        ({"champion": {"gate": "gate.yaml"}}, "stage champion: no file {folder}/gate.yaml"),
        (
            {"champion": {"gate": {"checks": [{"check": "slice"}]}}},
            "stage champion: gate: checks.0.check: no check 'slice'; did you mean slices?",
        ),
        ({"Bad": {"evaluate": "pretrain"}}, "stage Bad: its name: small letters, digits,"),
    ],
)
def test_a_mistake_is_told_with_file_stage_and_field(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    path = write(tmp_path, **changes)
    with pytest.raises(ConfigError) as caught:
        read_pipeline(path)
    assert str(caught.value).startswith(f"{path}: {said.format(folder=tmp_path)}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: x\nstage: {}", "stage: unknown field; did you mean stages?"),
        ("name: x\nstages: {}", "stages: there is none"),
        ("name: a/b\nstages: {a: {ingest: digits}}", "pipeline name 'a/b'"),
        ("name: x\nstages: [ingest]", "stages: input should be an object"),
    ],
)
def test_a_file_that_is_no_pipeline_is_told(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_pipeline(path)
    assert said in str(caught.value) and str(caught.value).startswith(f"{path}: ")
