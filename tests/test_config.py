"""Configurations: what is refused and how it is said, and what a run's identity is made of."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from workers.config import InitConfig, RunConfig, make_config
from workers.config_text import explain, override, read_yaml
from workers.errors import ConfigError
from workers.models.resnet_sizes import RESNET_SIZES
from workers.models.sizes import VIT_SIZES

VALUES: dict[str, Any] = {
    "name": "toy",
    "seed": 1,
    "model": {
        "family": "vit",
        "size": "digits",
        "image_size": 8,
        "patch_size": 2,
        "channels": 1,
        "num_classes": 10,
        "pool": "gap",
        "norm_after_pool": False,
        "positions": "learned",
        "embed_prefix": True,
        "registers": 1,
        "qk_norm": True,
        "layer_scale": 1e-4,
        "activation": "gelu",
        "norm_epsilon": 1e-5,
        "hidden_head": True,
        "drop_path": 0.1,
        "drop_path_uniform": True,
        "dropout": 0.1,
    },
    "data": {
        "url": "file:///data/train",
        "validation_url": "file:///data/val",
        "fingerprint": "f" * 64,
        "validation_fingerprint": "e" * 64,
        "image_key": "jpg",
        "label": "cls",
        "weight": 2.0,
        "mix": [],
        "subset": 100,
        "subset_seed": 1,
        "stratified": True,
        "max_bad_fraction": 0.01,
        "augment": {
            "min_scale": 0.5,
            "min_ratio": 0.5,
            "flip": True,
            "three_augment": True,
            "color_jitter": 0.4,
            "erase": 0.25,
            "rand_augment_layers": 2,
            "rand_augment_magnitude": 15.0,
            "mixup": 0.8,
            "cutmix": 1.0,
        },
        "lanes": 8,
        "chunk_samples": 16,
        "window_chunks": 4,
    },
    "optim": {
        "optimizer": "adamw",
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "momentum": 0.8,
        "beta1": 0.8,
        "beta2": 0.9,
        "epsilon": 1e-6,
        "clip_norm": 2.0,
        "layer_decay": 0.8,
        "freeze": "none",
        "schedule": "cosine",
        "warmup_images": 10,
        "decay_images": 900,
        "timescale_images": 1000,
        "cooldown_images": 100,
        "final_learning_rate": 1e-5,
        "loss": "softmax",
        "label_smoothing": 0.1,
        "ema_images": 500,
    },
    "train": {
        "images": 1000,
        "global_batch_size": 64,
        "precision": "bfloat16",
        "eval_every_images": 100,
        "checkpoint_every_images": 100,
        "log_every_images": 100,
        "max_bad_steps": 5,
        "spike_sigmas": 6.0,
        "spike_steps": 3,
        "max_rollbacks": 2,
        "probe_images": 8,
    },
    "init": {
        "manifest": "file:///runs/a/checkpoints/1-0/MANIFEST.json",
        "digest": "d" * 64,
        "new_head": False,
        "resampling": "timm-bicubic",
        "parent": "toy/1",
    },
    "fork": None,
    "compute": {
        "workers": 2,
        "cpus_per_worker": 1,
        "gpus_per_worker": 0,
        "accelerator": None,
        "queue": "vision",
        "priority": 3,
        "shard_workers": 1,
        "microbatch_size": 8,
        "activation_checkpointing": "none",
        "compile": False,
        "deterministic": True,
        "profile_steps": 3,
        "peak_tflops": 100.0,
        "prefetch_batches": 4,
        "readers": 2,
        "prefetch_bytes": 1 << 20,
        "cache_directory": "/cache",
        "cache_bytes": 1 << 30,
        "hang_seconds": 20.0,
        "max_hours": 12.5,
        "drill": {"record_batches": True, "kill_at_step": 3, "fail_at_step": 4},
    },
}
"""Every field, most with another value than its default."""

OTHER: dict[str, Any] = {
    "compute.accelerator": "H100",
    "model.family": "resnet",
    "model.size": "digits-s",
    "model.image_size": 16,
    "model.patch_size": 4,
    "model.channels": 3,
    "model.pool": "map",
    "model.positions": "sincos2d",
    "model.activation": "gelu_tanh",
    "optim.optimizer": "sgd",
    "optim.schedule": "linear",
    "optim.freeze": "blocks:1",
    "optim.loss": "sigmoid",
    "train.precision": "float32",
    "init.resampling": "bicubic",
    "compute.shard_workers": 2,
    "compute.activation_checkpointing": "full",
    "data.lanes": 4,
    "train.global_batch_size": 128,
}
"""Another value for what may not just be a little more."""

GOLDEN_DIGEST = "1bb1e6e57e4076697d0fdca959cdbbf36d73fe1a82544e1a3aed7806801366dd"

NO_MATTER = {
    "name",
    "data.url",
    "data.validation_url",
    "data.image_key",
    "data.label",
    "init.manifest",
    "init.parent",
    "train.eval_every_images",
    "train.checkpoint_every_images",
    "train.log_every_images",
    "train.max_bad_steps",
    "train.max_rollbacks",
    "train.probe_images",
    "compute.shard_workers",
    "compute.activation_checkpointing",
    "compute.compile",
    "compute.deterministic",
    "compute.profile_steps",
    "compute.peak_tflops",
    "compute.workers",
    "compute.cpus_per_worker",
    "compute.gpus_per_worker",
    "compute.accelerator",
    "compute.queue",
    "compute.priority",
    "compute.microbatch_size",
    "compute.prefetch_batches",
    "compute.readers",
    "compute.prefetch_bytes",
    "compute.cache_directory",
    "compute.cache_bytes",
    "compute.hang_seconds",
    "compute.max_hours",
    "compute.drill.record_batches",
    "compute.drill.kill_at_step",
    "compute.drill.fail_at_step",
}


def leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def changed(path: str, value: Any) -> dict[str, Any]:
    values = copy.deepcopy(VALUES)
    *groups, name = path.split(".")
    node = values
    for group in groups:
        node = node[group]
    node[name] = value
    return values


def another(path: str) -> Any:
    value = leaves(VALUES)[path]
    if path in OTHER:
        return OTHER[path]
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return value.translate(str.maketrans("def", "abc")) + "x"
    return value + 1 if isinstance(value, int) else value / 2


def message(values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        make_config(values)
    return str(caught.value)


def test_all_fields_are_covered_here() -> None:
    config = make_config(VALUES)
    assert config.model_dump(mode="json") == VALUES
    forks = {name for name in fields(RunConfig) if name.startswith("fork.")}
    ranges = {"compute.workers.min", "compute.workers.max"}
    assert leaves(VALUES).keys() == fields(RunConfig) - forks - ranges | {"fork", "compute.workers"}
    assert forks == {"fork.manifest", "fork.digest", "fork.parent"}


def fields(model: type[BaseModel], prefix: str = "") -> set[str]:
    found: set[str] = set()
    for name, field in model.model_fields.items():
        kinds = (
            () if get_origin(field.annotation) is tuple else (field.annotation, *get_args(field.annotation))
        )
        groups = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        found |= fields(groups[0], f"{prefix}{name}.") if groups else {prefix + name}
    return found


@pytest.mark.parametrize("path", sorted(leaves(VALUES).keys() - {"data.mix", "fork"}))
def test_the_digest_is_of_all_that_changes_the_result_and_of_nothing_else(path: str) -> None:
    before = make_config(VALUES)
    values = changed(path, another(path))
    if path == "model.family":
        values["model"]["size"] = "8"
    after = make_config(values)
    assert leaves(after.model_dump(mode="json"))[path] != leaves(VALUES)[path]
    assert (after.digest == before.digest) == (path in NO_MATTER)


@pytest.mark.parametrize(
    "path",
    [
        "data.fingerprint",
        "data.validation_fingerprint",
        "data.subset",
        "train.spike_sigmas",
        "compute.microbatch_size",
    ],
)
def test_nothing_is_a_value_too(path: str) -> None:
    without = make_config(changed(path, None))
    assert (without.digest == make_config(VALUES).digest) == (path in NO_MATTER)
    assert make_config({**VALUES, "init": None}).digest != make_config(VALUES).digest


def test_a_fork_counts_by_the_digest_of_its_checkpoint() -> None:
    def fork(**changes: str) -> RunConfig:
        origin = {"manifest": "file:///m", "digest": "d" * 64, "parent": "toy"}
        return make_config({**VALUES, "init": None, "fork": {**origin, **changes}})

    assert fork().digest != make_config({**VALUES, "init": None}).digest
    assert fork(manifest="s3://elsewhere/m", parent="other").digest == fork().digest
    assert fork(digest="e" * 64).digest != fork().digest
    with pytest.raises(ConfigError, match="init, fork: a run starts from weights, or goes on"):
        make_config({**VALUES, "fork": fork().fork.model_dump()})


def test_an_address_counts_while_nobody_knows_the_fingerprint() -> None:
    unknown = changed("data.fingerprint", None)
    moved = copy.deepcopy(unknown)
    moved["data"]["url"] = "file:///elsewhere/train"
    assert make_config(moved).digest != make_config(unknown).digest
    unknown = changed("data.validation_fingerprint", None)
    moved = copy.deepcopy(unknown)
    moved["data"]["validation_url"] = "file:///elsewhere/val"
    assert make_config(moved).digest != make_config(unknown).digest
    moved = copy.deepcopy(unknown)
    moved["data"]["url"] = "file:///elsewhere/train"
    assert make_config(moved).digest == make_config(unknown).digest


def test_mixed_sources_count_by_their_fingerprints() -> None:
    def with_mix(**source: Any) -> RunConfig:
        values = changed("data.subset", None)
        values["data"]["mix"] = [source]
        return make_config(values)

    one = with_mix(url="file:///more", fingerprint="a" * 64)
    assert one.data.mix[0].weight == 1.0
    assert with_mix(url="file:///moved", fingerprint="a" * 64).digest == one.digest
    assert with_mix(url="file:///more", fingerprint="b" * 64).digest != one.digest
    assert with_mix(url="file:///more", fingerprint="a" * 64, weight=2).digest != one.digest
    assert with_mix(url="file:///more").digest != with_mix(url="file:///moved").digest
    with pytest.raises(ConfigError, match=r"data\.subset: takes no data\.mix"):
        make_config(changed("data.mix", [{"url": "file:///more"}]))


def test_the_digest_is_the_same_in_every_process_and_version() -> None:
    """A change of this number makes every run of every user a new one."""
    config = make_config(VALUES)
    assert config.digest == GOLDEN_DIGEST
    assert config.run == f"toy-{GOLDEN_DIGEST[:10]}"
    code = (
        "import json, sys; from workers.config import make_config\n"
        "print(make_config(json.load(sys.stdin)).digest)"
    )
    backwards = {name: VALUES[name] for name in reversed(VALUES)}
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            input=json.dumps(backwards),
            env={"PYTHONHASHSEED": seed},
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == GOLDEN_DIGEST


def test_a_whole_number_is_a_float_too() -> None:
    assert make_config(changed("optim.clip_norm", 2)).digest == make_config(VALUES).digest


def test_defaults_are_enough_for_a_short_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "name: short\n"
        "model: {size: ti, image_size: 224}\n"
        "data: {url: s3://data/train, validation_url: s3://data/val}\n"
        "train: {images: 1e6, global_batch_size: 1024, eval_every_images: 5e4,\n"
        "        checkpoint_every_images: 50000}\n"
        "optim: {learning_rate: 1e-3, final_learning_rate: .1E-4, weight_decay: 5.e-2, clip_norm: +2E0}\n"
    )
    config = make_config(override(read_yaml(path), ["optim.beta2=0.95", "seed=7"]))
    assert config.train.images == 1_000_000
    assert config.train.eval_every_images == 50_000
    optim = config.optim
    assert (optim.learning_rate, optim.final_learning_rate, optim.weight_decay, optim.clip_norm) == (
        1e-3,
        1e-5,
        0.05,
        2.0,
    )
    assert (config.optim.beta2, config.seed, config.num_steps) == (0.95, 7, 977)
    assert config.training_flops == 3 * config.model.flops * 977 * 1024


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("modle", "model"),
        ("optim.learing_rate", "optim.learning_rate"),
        ("optim.lr", None),
        ("data.augment.min_scal", "data.augment.min_scale"),
        ("init.manifets", "init.manifest"),
        ("learning_rate", "optim.learning_rate"),
        ("global_batch_size", "train.global_batch_size"),
        ("data.image_size", "model.image_size"),
        ("train.workers", "compute.workers"),
        ("model.patch size", "model.patch_size"),
    ],
)
def test_a_misspelt_field_is_named_with_the_one_that_was_meant(path: str, meant: str | None) -> None:
    said = message(changed(path, 1))
    if meant:
        assert said == f"{path}: unknown field; did you mean {meant}?"
    else:
        assert said == f"{path}: unknown field; known: {', '.join(VALUES['optim'])}"


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("model.size", "xxl", "model.size: no ViT is called 'xxl'; choose one of digits-xs, digits-s,"),
        ("model.size", "GG", "model.size: no ViT is called 'GG'; did you mean 'G'?; choose one of"),
        ("model.size", "B", "model.size: no ViT is called 'B'; did you mean 'b'?; choose one of"),
        ("model.image_size", [8], "model.image_size: input should be a valid integer, got [8] or"),
        ("model.image_size", [8, 9], "model.image_size: (8, 9) is not a multiple of model.patch_size 2"),
        ("compute.shard_workers", 3, "compute.shard_workers 3 does not divide compute.workers 2"),
        ("compute.queue", "my queue", "compute: queue 'my queue': letters, digits, '.', '_' and '-' only"),
        ("compute.priority", 101, "compute.priority: input should be less than or equal to 100, got 101"),
        ("optim.cooldown_images", 2000, "optim.cooldown_images 2000 exceeds train.images 1000"),
        (
            "model.image_size",
            9,
            "model.image_size: 9 is not a multiple of model.patch_size 2; 8 x 8 would be",
        ),
        ("model.image_size", 0, "model.image_size: input should be greater than 0, got 0"),
        ("model.channels", 2, "model.channels: input should be 1 or 3, got 2"),
        ("model.family", "vti", "model.family: input should be 'vit'"),
        ("model.patch_size", -2, "model.patch_size: input should be greater than 0, got -2"),
        ("model", 3, "model: input should be an object, got 3"),
        ("model", None, "model: input should be an object, got None"),
        ("seed", True, "seed: input should be a valid integer, got True"),
        ("seed", 1.5, "seed: input should be a valid integer, got 1.5"),
        ("seed", "1", "seed: input should be a valid integer, got '1'"),
        ("data.url", ["a"], "data.url: input should be a valid string, got ['a']"),
        ("data.subset", 0, "data.subset: input should be greater than 0, got 0"),
        ("data.lanes", 0, "data.lanes: input should be greater than 0, got 0"),
        ("data.augment.min_scale", 1.5, "data.augment.min_scale: input should be less than or equal to 1"),
        ("data.augment.flip", "no", "data.augment.flip: input should be a valid boolean, got 'no'"),
        ("optim.beta2", 1.0, "optim.beta2: input should be less than 1, got 1.0"),
        (
            "optim.learning_rate",
            float("nan"),
            "optim.learning_rate: input should be a finite number, got nan",
        ),
        (
            "optim.learning_rate",
            float("inf"),
            "optim.learning_rate: input should be a finite number, got inf",
        ),
        ("optim.weight_decay", -0.1, "optim.weight_decay: input should be greater than or equal to 0"),
        ("train.images", -1, "train.images: input should be greater than 0, got -1"),
        ("compute.microbatch_size", 0, "compute.microbatch_size: input should be greater than 0, got 0"),
        (
            "train.global_batch_size",
            60,
            "train.global_batch_size 60 is not a multiple of data.lanes 8; 64 would be, or set "
            "data.lanes to a divisor of it",
        ),
        ("compute.workers", {"min": 2, "max": 9}, "compute.workers 9 exceeds data.lanes 8; raise data.lanes"),
        ("compute.workers", {"min": 4, "max": 3}, "compute.workers: min 4 exceeds max 3"),
        ("compute.workers", {"min": 2}, "compute.workers.max: missing"),
        ("compute.workers", 9, "compute.workers 9 exceeds data.lanes 8; raise data.lanes"),
        ("compute.workers", 0, "compute.workers: input should be greater than 0, got 0"),
        ("init", {"manifest": "x"}, "init.digest: missing\ninit.parent: missing"),
    ],
)
def test_an_impossible_value_is_named_with_its_field(path: str, value: Any, said: str) -> None:
    assert message(changed(path, value)).startswith(said)


@pytest.mark.parametrize("name", ["optim.learning_rate", "learning rate", "1", ""])
def test_what_is_no_name_of_a_field_is_named_all_the_same(name: str) -> None:
    assert "unknown field; " in message({**VALUES, "init": None, name: 1})


def test_each_wrong_field_has_a_line() -> None:
    values = changed("seed", "x") | {"zzz": 1}
    del values["train"]
    assert message(values).splitlines() == [
        "seed: input should be a valid integer, got 'x'",
        "train: missing",
        "zzz: unknown field; known: name, seed, model, data, optim, train, init, fork, compute",
    ]


@pytest.mark.parametrize("name", ["a", "0", "vit-ti16", "a.b_c-1", "x" * 81])
def test_names_that_are_good(name: str) -> None:
    assert make_config(changed("name", name)).run.startswith(f"{name}-")


@pytest.mark.parametrize(
    "name", ["", "A", "a b", "a/b", "..", ".a", "-a", "_a", "ä", "a\n", "a@b", "a'b", "x" * 82, "x" * 200]
)
def test_names_that_would_break_a_key_or_a_query(name: str) -> None:
    said = message(changed("name", name))
    assert said == "name: small letters, digits, '.', '_' and '-' only, at most 81"


@pytest.mark.parametrize("value", ["x" * 10_000, ["y"] * 10_000, {"z" * 200: "z" * 10_000}])
def test_a_message_stays_readable_whatever_was_given(value: Any) -> None:
    for path in ("seed", "data.lanes", "optim.beta1", "model.family"):
        said = message(changed(path, value))
        assert said.startswith(f"{path}: ")
        assert len(said) <= 200
        assert "..." in said


def test_sizes_are_those_of_the_tables() -> None:
    for family, sizes in (("vit", VIT_SIZES), ("resnet", RESNET_SIZES)):
        for size in sizes:
            values = copy.deepcopy(VALUES)
            values["model"] |= {"family": family, "size": size}
            model = make_config(values).model
            assert model.parameters > 0
            assert model.flops > 0
    resnet = copy.deepcopy(VALUES)
    resnet["model"] |= {"family": "resnet", "size": "8", "image_size": 9}
    assert make_config(resnet).model.image_size == 9, "a ResNet has no patches"


def test_a_configuration_is_frozen() -> None:
    config = make_config(VALUES)
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 2  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        config.optim.beta1 = 0.5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("optim.learning_rate=0.01", "optim.learning_rate", 0.01),
        ("optim.learning_rate=1e-3", "optim.learning_rate", 0.001),
        ("optim.learning_rate=-2.5E-3", "optim.learning_rate", -0.0025),
        ("optim.learning_rate=.5e+1", "optim.learning_rate", 5),
        ("train.images=1e6", "train.images", 1_000_000),
        ("train.images=1_000", "train.images", 1000),
        ("name='1e3'", "name", "1e3"),
        ("name=a=b", "name", "a=b"),
        ("name=2026-01-31", "name", "2026-01-31"),
        (" seed = 3 ", "seed", 3),
        ("data.augment.flip=false", "data.augment.flip", False),
        ("data.subset=null", "data.subset", None),
        ("data.subset=", "data.subset", None),
        ("data.augment={flip: false}", "data.augment", {"flip": False}),
        ("extra.deep.er=1", "extra.deep.er", 1),
    ],
)
def test_an_override_is_read_as_yaml(text: str, path: str, value: Any) -> None:
    expected = copy.deepcopy(VALUES)
    node = expected
    *groups, name = path.split(".")
    for group in groups:
        node = node.setdefault(group, {})
    node[name] = value
    before = copy.deepcopy(VALUES)
    found = override(VALUES, [text])
    assert found == expected
    assert type(found[name]) is type(value) if not groups else True
    assert before == VALUES


def test_overrides_reach_into_what_is_none_and_the_last_one_holds() -> None:
    digest = "d" * 64
    texts = ["init.manifest=file:///m", f"init.digest={digest}", "init.parent=a/1", "seed=2", "seed=3"]
    config = make_config(override({**VALUES, "init": None}, texts))
    assert config.init == InitConfig(manifest="file:///m", digest=digest, parent="a/1")
    assert config.seed == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed", "--set seed: expected field=value, such as optim.learning_rate=0.01"),
        ("=1", "--set =1: expected field=value"),
        ("optim.=1", "--set optim.=1: expected field=value"),
        ("optim..beta1=1", "--set optim..beta1=1: expected field=value"),
        ("seed.x=1", "--set seed.x=1: seed is a value, not a group of fields"),
        ("name=[1", "--set name=[1: '[1' is not YAML"),
    ],
)
def test_a_wrong_override_is_repeated_with_what_is_expected(text: str, said: str) -> None:
    values = {**VALUES, "init": None}
    with pytest.raises(ConfigError) as caught:
        override(values, [text])
    assert str(caught.value).startswith(said)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_any_number_comes_through_an_override_as_python_writes_it(number: float) -> None:
    assert override(VALUES, [f"seed={number!r}"])["seed"] == number


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=5,
    ),
    st.sampled_from([*leaves(VALUES), "model", "data", "data.augment", "optim", "train", "init", "new"]),
)
def test_whatever_is_in_a_field_is_taken_or_refused_in_words(value: Any, path: str) -> None:
    try:
        config = make_config(changed(path, value))
    except ConfigError as error:
        assert len(str(error)) > 10
    else:
        assert make_config(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"name: [\n", "run.yaml is not readable YAML: while parsing"),
        (b"- a\n- b\n", "run.yaml: expected fields, found list"),
        (b"", "run.yaml: expected fields, found NoneType"),
        (b"\xff\xfe\x00", "run.yaml is not readable YAML: "),
        (b"name: \x07", "run.yaml is not readable YAML: "),
        (b"? [a, b]\n: c\n", "run.yaml is not readable YAML: while constructing a mapping"),
        (b"name: !!python/object:os.system x\n", "run.yaml is not readable YAML: could not determine a con"),
        (b"2026-01-31: x\n", "run.yaml: keys must be str, int, float, bool or None, not datetime.date"),
        (b"name: &a [*a]\n", "run.yaml: Circular reference detected"),
        (b"name: 2026-02-31\n", "run.yaml is not readable YAML: day is out of range"),
        (b"seed: 1" + b"0" * 5000, "run.yaml is not readable YAML: Exceeds the limit"),
        (b"name: " + b"[" * 2000, "run.yaml is not readable YAML: maximum recursion depth"),
    ],
)
def test_a_file_that_is_no_configuration_is_named(tmp_path: Path, text: bytes, said: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(text)
    with pytest.raises(ConfigError) as caught:
        read_yaml(path)
    assert str(path) in str(caught.value)
    assert said in str(caught.value)


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"no file {tmp_path}/none.yaml"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=f"{tmp_path} is not readable YAML: .*directory"):
        read_yaml(tmp_path)


def test_dates_and_other_things_that_yaml_knows_are_text(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("name: 2026-01-31\nseed: !!set {a}\n1: x\n")
    assert read_yaml(path) == {"name": "2026-01-31", "seed": "{'a'}", "1": "x"}


def test_errors_of_other_models_are_explained_too() -> None:
    class Inner(BaseModel):
        model_config = {"extra": "forbid"}
        width: int

    class Outer(BaseModel):
        model_config = {"extra": "forbid"}
        parts: tuple[Inner, ...]

    with pytest.raises(ValidationError) as caught:
        Outer.model_validate({"parts": [{"width": 1}, {"widht": 1, "width": "x"}], "width": 1})
    assert explain(caught.value, Outer).splitlines() == [
        "parts.1.width: input should be a valid integer, unable to parse string as an integer, got 'x'",
        "parts.1.widht: unknown field; did you mean parts.1.width?",
        "width: unknown field; did you mean parts.width?",
    ]
