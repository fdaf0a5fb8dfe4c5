"""Recipes: complete configurations for any data set, and what fine-tuning takes from its parent."""

import math
from dataclasses import replace
from typing import Any

import pytest

from pipelines.recipes import RECIPES, DataFacts, fine_tune, read_facts
from tests.conftest import TINY_CLASSES, make_png, make_tar
from workers.config import InitConfig, RunConfig, make_config
from workers.data.indexing import build_index
from workers.errors import ConfigError, DataError
from workers.storage import join_url, open_store

FACTS = DataFacts(
    url="s3://data/x/train",
    validation_url="s3://data/x/val",
    fingerprint="f" * 64,
    validation_fingerprint="e" * 64,
    num_images=1_281_167,
    classes=tuple(f"class {number}" for number in range(1000)),
)
INIT = InitConfig(manifest="file:///m", digest="d" * 64, parent="vit-digits/1")


def child(parent: RunConfig, **changes: Any) -> RunConfig:
    arguments = {"image_size": 2 * parent.model.image_size, "epochs": 10.0}
    return fine_tune(parent, FACTS, INIT, **(arguments | changes))


@pytest.mark.parametrize("num_images", [1, 60, 1_281_167])
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_a_complete_configuration_of_its_name(name: str, num_images: int) -> None:
    facts = replace(FACTS, num_images=num_images)
    config = RECIPES[name](facts)
    assert config.name == name
    assert make_config(config.model_dump(mode="json")) == config
    assert RECIPES[name](facts) == config
    assert config.model.num_classes == 1000
    assert config.init is None
    assert config.data.subset is None
    assert (config.data.fingerprint, config.data.validation_fingerprint) == ("f" * 64, "e" * 64)
    train = config.train
    assert train.images % num_images == 0
    assert config.optim.warmup_images <= train.images // 10
    assert train.log_every_images >= train.global_batch_size
    assert train.eval_every_images % num_images == train.checkpoint_every_images % num_images == 0


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_the_same_run_wherever_the_data_lies(name: str) -> None:
    moved = replace(FACTS, url="file:///copy/train", validation_url="file:///copy/val")
    assert RECIPES[name](moved).digest == RECIPES[name](FACTS).digest
    assert RECIPES[name](replace(FACTS, fingerprint="0" * 64)).digest != RECIPES[name](FACTS).digest


def test_recipes_are_different_runs() -> None:
    assert len({recipe(FACTS).digest for recipe in RECIPES.values()}) == len(RECIPES)


@pytest.mark.parametrize(("epochs", "images"), [(3, 3_843_501), (0.5, 640_584), (1e-9, 1)])
@pytest.mark.parametrize("name", RECIPES)
def test_epochs_become_images_seen(name: str, epochs: float, images: int) -> None:
    assert RECIPES[name](FACTS, epochs=epochs).train.images == images


@pytest.mark.parametrize("epochs", [0, -1, math.nan, math.inf])
def test_epochs_that_are_no_amount_of_training_are_refused(epochs: float) -> None:
    for recipe in RECIPES.values():
        with pytest.raises(ConfigError, match=f"epochs: expected a number above 0, got {epochs}"):
            recipe(FACTS, epochs=epochs)
    with pytest.raises(ConfigError, match="epochs: expected a number above 0"):
        child(RECIPES["vit-digits"](FACTS), epochs=epochs)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("vit-ti16-in1k", 5_717_416),
        ("vit-s16-in1k", 22_050_664),
        ("vit-b16-in1k", 86_567_656),
        ("vit-l16-in1k", 304_326_632),
    ],
)
def test_the_imagenet_recipes_are_those_of_the_paper(name: str, parameters: int) -> None:
    """Parameters as timm has them; the rest is section 2 of "Better plain ViT baselines"."""
    config = RECIPES[name](FACTS)
    assert config.model.parameters == parameters
    assert (config.train.global_batch_size, config.optim.learning_rate) == (1024, 1e-3)
    assert (config.optim.weight_decay, config.optim.warmup_images) == (1e-4, 10_000 * 1024)
    assert config.num_steps == math.ceil(90 * 1_281_167 / 1024)
    assert config.data.augment.flip


def test_digits_are_never_mirrored() -> None:
    assert not RECIPES["vit-digits"](FACTS).data.augment.flip
    assert not RECIPES["vit-ti16-digits"](FACTS).data.augment.flip


@pytest.mark.parametrize("name", RECIPES)
def test_fine_tuning_changes_what_it_says_and_keeps_the_rest(name: str) -> None:
    parent = RECIPES[name](FACTS)
    parent = parent.model_copy(update={"seed": 5, "data": parent.data.model_copy(update={"lanes": 16})})
    facts = replace(FACTS, num_images=1000, classes=("a", "b"), fingerprint="0" * 64, url="file:///new/train")
    size = 2 * parent.model.image_size
    config = fine_tune(parent, facts, INIT, image_size=size, epochs=2.5)
    assert make_config(config.model_dump(mode="json")) == config
    assert config.name == f"{name}-{size}px"
    assert config.init == INIT
    assert config.model == parent.model.model_copy(update={"image_size": size, "num_classes": 2})
    assert config.optim == parent.optim.model_copy(
        update={
            "learning_rate": parent.optim.learning_rate / 10,
            "weight_decay": 0.0,
            "warmup_images": 125,
        }
    )
    assert (config.data.url, config.data.fingerprint) == ("file:///new/train", "0" * 64)
    assert (config.data.lanes, config.data.augment) == (16, parent.data.augment)
    assert config.train.images == 2500
    assert config.train.global_batch_size == parent.train.global_batch_size
    assert (config.seed, config.compute) == (5, parent.compute)


def test_fine_tuning_is_another_run_for_each_parent_size_and_length() -> None:
    parent = RECIPES["vit-digits"](FACTS)
    other = INIT.model_copy(update={"digest": "0" * 64})
    runs = {
        child(parent).run,
        child(parent, image_size=4).run,
        child(parent, epochs=11.0).run,
        fine_tune(parent, FACTS, other, image_size=16, epochs=10.0).run,
    }
    assert len(runs) == 4
    assert child(parent).run == child(parent).run


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (17, "model.image_size: 17 is not a multiple of model.patch_size 2; 16 x 16 would be"),
        (0, "model.image_size: input should be greater than 0, got 0"),
        (-16, "model.image_size: input should be greater than 0, got -16"),
    ],
)
def test_a_resolution_that_cannot_be_is_refused(size: int, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        child(RECIPES["vit-digits"](FACTS), image_size=size)
    assert str(caught.value) == said


def test_a_parent_whose_name_is_as_long_as_can_be_says_so() -> None:
    parent = RECIPES["vit-digits"](FACTS).model_copy(update={"name": "x" * 81})
    with pytest.raises(ConfigError, match=r"name: small letters, .* at most 81"):
        child(parent)


def write_split(root: str, split: str, count: int, classes: tuple[str, ...]) -> None:
    url = join_url(root, split)
    members = []
    for number in range(count):
        members += [(f"{number}.cls", str(number % 2).encode()), (f"{number}.png", make_png(number))]
    open_store(url).write("0.tar", make_tar(members))
    build_index(url, classes=classes)


def test_facts_are_read_from_both_indexes(store_url: str) -> None:
    with pytest.raises(DataError, match=f"{store_url}/train"):
        read_facts(store_url)
    write_split(store_url, "train", 6, TINY_CLASSES)
    with pytest.raises(DataError, match=f"{store_url}/val"):
        read_facts(store_url)
    write_split(store_url, "val", 2, TINY_CLASSES)
    facts = read_facts(f"{store_url}/")
    assert (facts.url, facts.validation_url) == (f"{store_url}/train", f"{store_url}/val")
    assert (facts.num_images, facts.classes) == (6, TINY_CLASSES)
    assert len({facts.fingerprint, facts.validation_fingerprint}) == 2
    write_split(store_url, "val", 2, ("light", "dark"))
    with pytest.raises(ConfigError, match=f"{store_url}/val name different classes"):
        read_facts(store_url)
