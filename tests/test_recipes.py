"""Recipes: complete configurations for any data set, and what fine-tuning takes from its parent."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.children import FineTuning
from pipelines.pretrain import read_config
from pipelines.published import AUGREG_LEVELS, augreg
from pipelines.recipes import RECIPES, DataFacts, describe, fine_tune, fork_cooldown, read_facts
from tests.conftest import TINY_CLASSES, make_png, make_tar
from workers.config import AugmentConfig, ForkConfig, InitConfig, OptimConfig, RunConfig, make_config
from workers.config_text import override
from workers.data.indexing import build_index
from workers.errors import ConfigError, DataError
from workers.storage import join_url, open_store
from workers.training.optim import learning_rate

FACTS = DataFacts(
    url="s3://data/x/train",
    validation_url="s3://data/x/val",
    fingerprint="f" * 64,
    validation_fingerprint="e" * 64,
    num_images=1_281_167,
    classes=tuple(f"class {number}" for number in range(1000)),
)
INIT = InitConfig(manifest="file:///m", digest="d" * 64, parent="vit-digits/1")


FORK = ForkConfig(manifest="file:///m", digest="d" * 64, parent="a-run")


def child(parent: RunConfig, **changes: Any) -> RunConfig:
    arguments: dict[str, Any] = {"image_size": doubled(parent), "epochs": 10.0}
    return fine_tune(parent, parent.model, FACTS, INIT, **(arguments | changes))


def doubled(parent: RunConfig) -> int:
    return 2 * parent.model.image_shape[0]


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
    assert config.optim.warmup_images <= train.images // 5
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
    """Parameters as timm has them, less its class token and positions; the rest is section 2 of "Better plain
    ViT baselines", whose weight decay of 1e-4 is not multiplied by the rate of 1e-3."""
    config = RECIPES[name](FACTS)
    assert config.model.parameters == parameters - 198 * config.model.spec.size.width
    assert (config.model.pool, config.model.positions) == ("gap", "sincos2d")
    assert (config.train.global_batch_size, config.optim.learning_rate) == (1024, 1e-3)
    assert config.optim.weight_decay * config.optim.learning_rate == pytest.approx(1e-4)
    assert config.optim.warmup_images == 10_000 * 1024
    assert config.num_steps == math.ceil(90 * 1_281_167 / 1024)
    assert config.data.augment == AugmentConfig(
        min_scale=0.05, rand_augment_layers=2, rand_augment_magnitude=30, mixup=0.2
    )


@pytest.mark.parametrize("size", ["b16", "b32", "l16", "l32"])
def test_the_papers_recipe_is_its_table_3(size: str) -> None:
    config = RECIPES[f"vit-paper-{size}-in1k"](FACTS)
    assert (config.model.hidden_head, config.model.dropout, config.model.pool) == (True, 0.1, "cls")
    assert (config.optim.learning_rate, config.optim.weight_decay) == (3e-3, 0.3)
    assert (config.optim.schedule, config.optim.warmup_images) == ("cosine", 10_000 * 4096)
    assert (config.train.global_batch_size, config.optim.clip_norm) == (4096, 1)
    assert config.num_steps == math.ceil(300 * 1_281_167 / 4096)


def test_augmentation_of_augreg_grows_with_the_model_and_by_level() -> None:
    augments = {size: RECIPES[f"augreg-{size}-in1k"](FACTS).data.augment for size in ("ti16", "s32", "l16")}
    assert [augments[size].mixup for size in augments] == [0, 0.2, 0.5]
    assert [augments[size].rand_augment_magnitude for size in augments] == [0, 30, 30]
    levels = [augreg("b16", FACTS, level=level).data.augment for level in AUGREG_LEVELS]
    assert [level.mixup for level in levels] == [0, 0, 0.2, 0.2, 0.5, 0.5, 0.8]
    assert [level.rand_augment_layers for level in levels] == [0, 2, 2, 2, 2, 2, 2]


def test_deit3_makes_the_steps_of_a_loss_that_is_the_mean_over_classes() -> None:
    """`clip_norm` and `epsilon` grow with the gradients: by the number of classes."""
    config = RECIPES["deit3-b16-in1k"](FACTS)
    assert (config.optim.optimizer, config.optim.loss) == ("lamb", "sigmoid")
    assert (config.optim.clip_norm, config.optim.epsilon) == (1000, pytest.approx(1e-5))
    assert (config.model.image_size, config.model.drop_path, config.model.layer_scale) == (192, 0.2, 1e-4)
    assert (config.train.global_batch_size, config.optim.warmup_images) == (2048, 5 * 1_281_167)
    augment = config.data.augment
    assert (augment.three_augment, augment.color_jitter, augment.mixup, augment.cutmix) == (True, 0.3, 0.8, 1)


@pytest.mark.parametrize("name", RECIPES)
def test_a_description_says_what_the_recipe_is(name: str) -> None:
    shown = describe(name)
    config = RECIPES[name](replace(FACTS, classes=FACTS.classes[: 1000 if "in1k" in name else 10]))
    assert shown["parameters"] == config.model.parameters
    assert shown["image_size"] == config.model.image_size
    assert shown["epochs"] == pytest.approx(config.train.images / FACTS.num_images)
    assert 20 < len(shown["about"]) < 110 and shown["about"].endswith(".")


def test_digits_are_never_mirrored() -> None:
    assert not RECIPES["vit-digits"](FACTS).data.augment.flip
    assert not RECIPES["vit-ti16-digits"](FACTS).data.augment.flip


@pytest.mark.parametrize("name", RECIPES)
def test_fine_tuning_changes_what_it_says_and_keeps_the_rest(name: str) -> None:
    parent = RECIPES[name](FACTS)
    parent = parent.model_copy(update={"seed": 5, "data": parent.data.model_copy(update={"lanes": 16})})
    facts = replace(FACTS, num_images=1000, classes=("a", "b"), fingerprint="0" * 64, url="file:///new/train")
    size = doubled(parent)
    config = fine_tune(parent, parent.model, facts, INIT, image_size=size, epochs=2.5)
    assert make_config(config.model_dump(mode="json")) == config
    assert config.name == f"{name}-{size}px"
    assert config.init == INIT.model_copy(update={"new_head": parent.model.hidden_head})
    assert config.model == parent.model.model_copy(
        update={"image_size": size, "num_classes": 2, "hidden_head": False, "dropout": 0.0}
    )
    if parent.optim.optimizer == "adamw":
        expected = {"learning_rate": parent.optim.learning_rate / 10}
        expected |= {"weight_decay": 0.0, "warmup_images": 125}
        assert config.optim == parent.optim.model_copy(update=expected)
    else:
        assert config.optim == OptimConfig(
            learning_rate=1e-4, weight_decay=0.0, warmup_images=125, loss=parent.optim.loss
        )
    assert (config.data.url, config.data.fingerprint) == ("file:///new/train", "0" * 64)
    assert (config.data.lanes, config.data.augment) == (16, parent.data.augment)
    assert config.train.images == 2500
    assert config.train.global_batch_size == parent.train.global_batch_size
    assert config.train.precision == parent.train.precision
    assert (config.seed, config.compute) == (5, parent.compute)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("recipe", ["paper", "deit3"])
def test_published_fine_tuning_keeps_what_is_true_of_the_images(name: str, recipe: FineTuning) -> None:
    parent = RECIPES[name](FACTS)
    config = child(parent, epochs=8.0, recipe=recipe)
    crops, augment = parent.data.augment, config.data.augment
    assert (augment.flip, augment.min_scale, augment.min_ratio) == (
        *(crops.flip, crops.min_scale, crops.min_ratio),
    )
    assert (augment.erase, augment.three_augment) == (0, False)
    assert (config.train.global_batch_size, config.model.dropout) == (512, 0)
    steps = config.train.images / 512
    if recipe == "paper":
        assert steps == pytest.approx(20_018, abs=1)
        assert config.init is not None and config.init.new_head
        assert config.optim == OptimConfig(
            optimizer="sgd", learning_rate=0.01, weight_decay=0.0, warmup_images=500 * 512
        )
        assert not augment.mixes
    else:
        total = config.num_steps * 512
        rates = [learning_rate(config.optim, round(share * total), total) for share in (0.125, 0.3, 0.9)]
        assert rates == pytest.approx([0.5e-5, 1e-5, 1e-5], rel=1e-3)
        assert config.optim.weight_decay == 0.1
        assert augment.mixes


@pytest.mark.parametrize("recipe", ["adamw", "paper", "deit3"])
def test_weights_from_elsewhere_are_fine_tuned_without_a_parent(recipe: FineTuning) -> None:
    model = RECIPES["augreg-b16-in1k"](FACTS).model
    init = INIT.model_copy(update={"parent": "vit-b16-augreg/3", "new_head": True})
    config = fine_tune(None, model, FACTS, init, image_size=(224, 320), epochs=2, recipe=recipe)
    assert config.name == "vit-b16-augreg-224x320px"
    assert config.model.image_size == (224, 320)
    assert config.optim.learning_rate == {"adamw": 1e-4, "paper": 0.01, "deit3": 1e-5}[recipe]
    assert config.init == init


@given(
    st.sampled_from(["cosine", "linear", "rsqrt", "constant"]),
    st.integers(0, 2000),
    st.integers(1, 80),
    st.integers(1, 3000),
    st.integers(0, 3000),
    st.booleans(),
)
def test_a_forked_cooldown_follows_its_parent_until_it_begins(
    schedule: str, warmup: int, at: int, cooldown: int, own_cooldown: int, explicit_end: bool
) -> None:
    parent = RECIPES["vit-digits"](replace(FACTS, num_images=100), epochs=100)
    ends = explicit_end and schedule in ("cosine", "linear")
    optim = {"schedule": schedule, "warmup_images": warmup, "cooldown_images": own_cooldown}
    parent = make_config(
        parent.model_dump(mode="json")
        | {"optim": {**parent.optim.model_dump(), **optim, "decay_images": 5000 if ends else None}}
    )
    at_images = 64 * at
    config = fork_cooldown(parent, FORK, at_images, cooldown)
    totals = [run.num_steps * run.train.global_batch_size for run in (parent, config)]
    assert config.name == f"vit-digits-cooldown-{at_images}"
    assert (config.fork, config.init, config.model) == (FORK, None, parent.model)
    for seen in range(0, at_images + 1, 64):
        assert learning_rate(config.optim, seen, totals[1]) == learning_rate(parent.optim, seen, totals[0])
    assert learning_rate(config.optim, totals[1], totals[1]) == 0


def test_a_cooldown_that_cannot_be_is_refused() -> None:
    parent = RECIPES["vit-digits"](replace(FACTS, num_images=100))
    parent = make_config(override(parent.model_dump(mode="json"), ["optim.cooldown_images=1000"]))
    for at_images in (0, 6000):  # 6,016 images in whole batches, and the last 1,000 cool down already
        with pytest.raises(
            ConfigError, match=rf"at_images: {at_images} is not in 1 \.\. 5016, where vit-dig"
        ):
            fork_cooldown(parent, FORK, at_images, 100)
    with pytest.raises(ConfigError, match="cooldown_images: expected a number above 0, got 0"):
        fork_cooldown(parent, FORK, 1000, 0)


def test_fine_tuning_is_another_run_for_each_parent_size_and_length() -> None:
    parent = RECIPES["vit-digits"](FACTS)
    other = INIT.model_copy(update={"digest": "0" * 64})
    runs = {
        child(parent).run,
        child(parent, image_size=4).run,
        child(parent, epochs=11.0).run,
        fine_tune(parent, parent.model, FACTS, other, image_size=16, epochs=10.0).run,
    }
    assert len(runs) == 4
    assert child(parent).run == child(parent).run


NO_SIZE = (
    "model.image_size: input should be greater than 0, got {0} or input should be a valid array, got {0}"
)


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (17, "model.image_size: 17 is not a multiple of model.patch_size 2; 16 x 16 would be"),
        (0, NO_SIZE.format(0)),
        (-16, NO_SIZE.format(-16)),
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


def test_a_configuration_is_for_the_data_that_it_names(store_url: str, tmp_path: Path) -> None:
    for split, count in (("train", 6), ("val", 2)):
        write_split(store_url, split, count, TINY_CLASSES)
    config = read_config("vit-digits", store_url, [])
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(config.model_dump(mode="json")))
    assert read_config(str(file), None, []) == config
    pinned, validation = config.data.fingerprint, config.data.validation_fingerprint
    write_split(store_url, "train", 7, TINY_CLASSES)
    with pytest.raises(ConfigError, match=rf"data\.fingerprint is {pinned}, but {store_url}/train has"):
        read_config(str(file), None, [])
    write_split(store_url, "val", 3, TINY_CLASSES)
    with pytest.raises(ConfigError, match=rf"data\.validation_fingerprint is {validation}, but"):
        read_config(str(file), None, ["data.fingerprint=null"])
    mixed = json.dumps([{"url": f"{store_url}/val", "fingerprint": pinned}])
    with pytest.raises(ConfigError, match=r"data\.mix\.0\.fingerprint is"):
        read_config("vit-digits", store_url, [f"data.mix={mixed}"])
    assert read_config(str(file), store_url, []).data == read_config("vit-digits", store_url, []).data
