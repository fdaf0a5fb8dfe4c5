"""Versions and promotions: what a gate lets through, and that the log decides whatever MLflow says."""

import hashlib
import json
import threading
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from orchestrator.gates import Gate
from orchestrator.job import check_name, run_url
from orchestrator.promotions import Promotion, check_alias
from orchestrator.registry import Registry
from orchestrator.versions import DIGEST_TAG, Version
from tests.fake_mlflow import FakeMlflow
from tests.test_config import VALUES, changed
from workers.config import RunConfig, make_config
from workers.errors import CheckpointError, ConfigError, DataError
from workers.models import build_model
from workers.storage import Store, open_store
from workers.training.commits import CommitLog
from workers.training.manifest import Manifest, checkpoint_directory, object_name

METRICS = {"val_accuracy": 0.9, "val_loss": 0.3, "val_images": 395}


def run_config(seed: int = 1) -> RunConfig:
    return make_config({**changed("model.size", "digits-xs"), "seed": seed})


def finish(
    runs: str,
    config: RunConfig,
    metrics: dict[str, float] = METRICS,
    *,
    complete: bool = True,
    weight: float = 0.01,
) -> Path:
    """A run's commit of one rank, every weight of which is `weight`; the folder of its checkpoint."""
    store = open_store(run_url(runs, config))
    log = CommitLog(store)
    lease = log.take_lease()
    images = config.num_steps * config.train.global_batch_size
    directory = checkpoint_directory(images, lease.epoch)
    name = object_name("model", 0, 1)
    state = weights(config, weight)
    data = safetensors.torch.save(state)
    store.create(f"{directory}/{name}", data)
    manifest = Manifest(
        run=config.run,
        images_seen=images,
        step=config.num_steps,
        epoch=lease.epoch,
        parent=None,
        world_size=1,
        num_shards=1,
        objects={name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}},
        shapes={key: list(value.shape) for key, value in state.items()},
        scalars={},
        config=config.model_dump(mode="json"),
        sources=[],
        tallies=[],
        bad_samples=[],
        metrics=metrics,
        versions={},
        complete=complete,
    )
    key = f"{directory}/MANIFEST.json"
    store.create(key, manifest.to_bytes())
    digest = hashlib.sha256(manifest.to_bytes()).hexdigest()
    log.append(
        lease, parent=lease.continues, manifest=key, digest=digest, images_seen=images, complete=complete
    )
    return Path(store.url.removeprefix("file://")) / directory


def weights(config: RunConfig, value: float) -> dict[str, torch.Tensor]:
    model = build_model(**config.model.model_dump())
    return {name: torch.full_like(parameter, value) for name, parameter in model.named_parameters()}


def registered(
    registry: Registry, runs: str, seed: int = 1, metrics: dict[str, float] = METRICS, **how: Any
) -> Version:
    finish(runs, run_config(seed), metrics, **how)
    return registry.register("toy", run_config(seed), "run-id")


def test_a_version_points_to_the_final_manifest(
    registry: Registry, mlflow: FakeMlflow, store_url: str
) -> None:
    config = run_config()
    folder = finish(store_url, config)
    version = registry.register("toy", config, "run-id")
    assert version == Version(
        model="toy",
        version=1,
        manifest=(folder / "MANIFEST.json").as_uri(),
        digest=hashlib.sha256((folder / "MANIFEST.json").read_bytes()).hexdigest(),
        run=config.run,
        run_id="run-id",
        parent="toy/1",
        image_size=8,
        metrics=METRICS,
    )
    assert version.label == "toy/1"
    assert registry.versions() == registry.versions("toy") == [version]
    assert registry.versions("other") == []
    assert registry.resolve("toy/1") == version
    (stored,) = mlflow.models["toy"]
    assert stored.source == "vitscale-" + version.manifest
    assert stored.tags["vitscale.data_fingerprint"] == VALUES["data"]["fingerprint"]


def test_a_source_in_object_storage_is_registered_as_it_is(
    registry: Registry, mlflow: FakeMlflow, store_url: str
) -> None:
    tags = registered(registry, store_url) and dict(mlflow.models["toy"][0].tags)
    mlflow.create_model_version("toy", "s3://runs/x/checkpoints/1-0/MANIFEST.json", "run-id", tags)
    assert registry.versions()[1].manifest == "s3://runs/x/checkpoints/1-0/MANIFEST.json"


def test_a_version_says_in_a_line_what_it_is(registry: Registry, mlflow: FakeMlflow, store_url: str) -> None:
    config = run_config()
    finish(store_url, config)
    registry.register("toy", config, "run-id")
    assert mlflow.models["toy"][0].description == (
        f"vit digits-xs, 8 px, val accuracy 90.0%, fine-tuned from toy/1, run {config.run}"
    )


def test_registering_again_makes_no_second_version(
    registry: Registry, mlflow: FakeMlflow, store_url: str
) -> None:
    first = registered(registry, store_url)
    assert registry.register("toy", run_config(), "another-run") == first
    assert registry.register("other", run_config(), "run-id").label == "other/1"
    assert len(mlflow.models["toy"]) == 1


def test_a_run_that_has_not_reached_its_end_is_not_registered(
    registry: Registry, mlflow: FakeMlflow, store_url: str
) -> None:
    for prepare in (lambda: None, lambda: finish(store_url, run_config(), complete=False)):
        prepare()
        with pytest.raises(CheckpointError, match="has no final checkpoint to register; train it to its end"):
            registry.register("toy", run_config(), "run-id")
    assert mlflow.models == {}


def test_a_manifest_that_is_not_the_committed_one_is_not_registered(
    registry: Registry, mlflow: FakeMlflow, store_url: str
) -> None:
    manifest = finish(store_url, run_config()) / "MANIFEST.json"
    manifest.write_bytes(manifest.read_bytes().replace(b"0.9", b"1.0"))
    with pytest.raises(CheckpointError, match="tampered"):
        registry.register("toy", run_config(), "run-id")
    assert mlflow.models == {}


def test_all_versions_are_found_whatever_fits_on_a_page(
    registry: Registry, mlflow: FakeMlflow, store_url: str
) -> None:
    tags = registered(registry, store_url) and dict(mlflow.models["toy"][0].tags)
    for number in range(2, 6):
        mlflow.create_model_version("toy", "s3://x", "run-id", tags | {DIGEST_TAG: str(number)})
    mlflow.create_registered_model("of-others")
    mlflow.create_model_version("of-others", "s3://y", "run-id", {"made": "by hand"})
    assert [v.label for v in registry.versions()] == [f"toy/{number}" for number in range(1, 6)]
    assert registry.register("toy", run_config(), "run-id").version == 1


def test_what_is_needed_is_known_whatever_the_tags_say(
    registry: Registry, mlflow: FakeMlflow, store_url: str
) -> None:
    first, second = registered(registry, store_url, 1), registered(registry, store_url, 2)
    mlflow.create_model_version("toy", "s3://runs/x/checkpoints/1-0/MANIFEST.json", "run-id", {})
    registry.promote(first, "champion", Gate())
    mlflow.models["toy"].pop(0)
    mlflow.models["toy"][0].tags.clear()
    manifests = {first.manifest, second.manifest, "s3://runs/x/checkpoints/1-0/MANIFEST.json"}
    assert registry.needed() == manifests
    mlflow.down = True
    with pytest.raises(DataError, match="MLflow's model registry failed"):
        registry.needed()


def test_promotion_moves_the_alias_in_the_log_and_in_mlflow(
    registry: Registry, mlflow: FakeMlflow, store_url: str
) -> None:
    first, second = registered(registry, store_url, 1), registered(registry, store_url, 2)
    made = [
        registry.promote(first, "champion", Gate.of("val_accuracy", 0.9)),
        registry.promote(second, "champion", Gate.of("val_images", 100)),
        registry.promote(first, "candidate", Gate()),
        registry.promote(first, "champion", Gate()),
    ]
    assert [(p.seq, p.version, p.alias, p.previous) for p in made] == [
        (0, 1, "champion", None),
        (1, 2, "champion", 1),
        (2, 1, "candidate", None),
        (3, 1, "champion", 2),
    ]
    assert [(p.metric, p.value, p.minimum) for p in made][:2] == [
        ("val_accuracy", 0.9, 0.9),
        ("val_images", 395, 100),
    ]
    assert {p.digest for p in made} == {first.digest, second.digest}
    assert list(registry.log.read("toy")) == made
    assert registry.log.holders("toy") == {"champion": made[3], "candidate": made[2]}
    assert mlflow.aliases == {("toy", "champion"): "1", ("toy", "candidate"): "1"}
    assert registry.resolve("toy@champion") == first
    store = open_store(store_url)
    keys = [info.key for info in store.list("promotions/")]
    assert keys == [f"promotions/toy/{seq:08d}.json" for seq in range(4)]
    assert json.loads(store.read(keys[1])) == asdict(made[1])


def test_the_same_promotion_again_changes_nothing_but_repairs_mlflow(
    registry: Registry, mlflow: FakeMlflow, store_url: str
) -> None:
    version = registered(registry, store_url)
    made = registry.promote(version, "champion", Gate())
    mlflow.aliases.clear()
    assert registry.promote(version, "champion", Gate()) == made
    assert list(registry.log.read("toy")) == [made]
    assert mlflow.aliases == {("toy", "champion"): "1"}


@pytest.mark.parametrize(
    ("gate", "error", "said"),
    [
        (
            Gate.of("val_accuracy", 0.91),
            CheckpointError,
            "was not promoted: val_accuracy 0.9000 is below the gate's 0.91",
        ),
        (
            Gate.of("top5", 0.0),
            ConfigError,
            "has no metric 'top5'; it has val_accuracy, val_images, val_loss",
        ),
    ],
)
def test_a_gate_refuses(
    registry: Registry, mlflow: FakeMlflow, store_url: str, gate: Gate, error: type[Exception], said: str
) -> None:
    version = registered(registry, store_url)
    with pytest.raises(error) as caught:
        registry.promote(version, "champion", gate)
    assert str(caught.value) == f"toy/1 {said}"
    check_nothing_moved(registry, mlflow)


def check_nothing_moved(registry: Registry, mlflow: FakeMlflow) -> None:
    assert list(registry.log.read("toy")) == []
    assert mlflow.aliases == {}


def test_a_metric_that_is_no_number_passes_no_gate(
    registry: Registry, mlflow: FakeMlflow, store_url: str
) -> None:
    version = registered(registry, store_url, metrics={"val_accuracy": float("nan")})
    with pytest.raises(CheckpointError, match="val_accuracy nan is below"):
        registry.promote(version, "champion", Gate.of("val_accuracy", -1.0))
    check_nothing_moved(registry, mlflow)


def test_metrics_that_somebody_edited_in_mlflow_open_no_gate(
    registry: Registry, mlflow: FakeMlflow, store_url: str
) -> None:
    registered(registry, store_url)
    mlflow.models["toy"][0].tags["metric.val_accuracy"] = "0.99"
    version = registry.resolve("toy/1")
    assert version.metrics["val_accuracy"] == 0.99
    with pytest.raises(CheckpointError, match=r"val_accuracy 0\.9000 is below the gate's 0\.95"):
        registry.promote(version, "champion", Gate.of("val_accuracy", 0.95))
    check_nothing_moved(registry, mlflow)


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "manifest"])
def test_a_checkpoint_that_cannot_be_restored_is_not_promoted(
    registry: Registry, mlflow: FakeMlflow, store_url: str, damage: str
) -> None:
    folder = finish(store_url, run_config())
    version = registry.register("toy", run_config(), "run-id")
    path = folder / ("MANIFEST.json" if damage == "manifest" else object_name("model", 0, 1))
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data[:-1] if damage == "cut" else data)
    if damage == "gone":
        path.unlink()
    with pytest.raises(CheckpointError, match=path.name):
        registry.promote(version, "champion", Gate())
    check_nothing_moved(registry, mlflow)


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), 1e38])
def test_weights_that_cannot_compute_are_not_promoted(
    registry: Registry, mlflow: FakeMlflow, store_url: str, weight: float
) -> None:
    version = registered(registry, store_url, weight=weight)
    with pytest.raises(CheckpointError, match="not finite"):
        registry.promote(version, "champion", Gate())
    check_nothing_moved(registry, mlflow)


def test_a_version_whose_digest_was_edited_is_not_promoted(
    registry: Registry, mlflow: FakeMlflow, store_url: str
) -> None:
    version = registered(registry, store_url)
    with pytest.raises(CheckpointError, match="tampered"):
        registry.promote(replace(version, digest="0" * 64), "champion", Gate())
    check_nothing_moved(registry, mlflow)


def test_whoever_loses_the_race_for_a_record_is_gated_again(
    registry: Registry, mlflow: FakeMlflow, store_url: str
) -> None:
    """In between the checkpoint was damaged: it was good a moment ago, and is not promoted."""
    folder = finish(store_url, run_config())
    version = registry.register("toy", run_config(), "run-id")
    other = registered(registry, store_url, 2)
    create = registry.log._store.create

    def late(key: str, data: bytes) -> None:
        registry.log._store.create = create
        Registry(mlflow, store_url).promote(other, "champion", Gate())
        (folder / object_name("model", 0, 1)).unlink()
        create(key, data)

    registry.log._store.create = late
    with pytest.raises(CheckpointError, match="no object"):
        registry.promote(version, "champion", Gate())
    assert [p.version for p in registry.log.read("toy")] == [other.version]
    assert mlflow.aliases == {("toy", "champion"): "2"}


def test_all_who_promote_at_once_are_in_the_log_and_mlflow_follows_the_last(
    mlflow: FakeMlflow, store_url: str
) -> None:
    versions = [registered(Registry(mlflow, store_url), store_url, seed) for seed in range(4)]
    start = threading.Barrier(4)

    def promote(version: Version) -> None:
        start.wait()
        Registry(mlflow, store_url).promote(version, "champion", Gate())

    threads = [threading.Thread(target=promote, args=(version,)) for version in versions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log = list(Registry(mlflow, store_url).log.read("toy"))
    assert [p.seq for p in log] == [0, 1, 2, 3]
    assert sorted(p.version for p in log) == [1, 2, 3, 4]
    assert [p.previous for p in log] == [None, *(p.version for p in log[:-1])]
    assert mlflow.aliases == {("toy", "champion"): str(log[-1].version)}


def test_an_alias_that_was_overtaken_follows_the_log(
    registry: Registry, mlflow: FakeMlflow, store_url: str
) -> None:
    """Another's promotion comes between this one's record and its call of MLflow, and ends before it."""
    first, second = registered(registry, store_url, 1), registered(registry, store_url, 2)
    mlflow.before_alias = lambda: Registry(mlflow, store_url).promote(second, "champion", Gate())
    registry.promote(first, "champion", Gate())
    assert [p.version for p in registry.log.read("toy")] == [1, 2]
    assert mlflow.aliases == {("toy", "champion"): "2"}


def test_an_alias_set_by_hand_in_mlflow_is_refused_and_means_nothing(
    registry: Registry, mlflow: FakeMlflow, store_url: str
) -> None:
    first, second = registered(registry, store_url, 1), registered(registry, store_url, 2)
    registry.promote(first, "champion", Gate())
    mlflow.set_registered_model_alias("toy", "champion", "2")
    mlflow.set_registered_model_alias("toy", "best", "2")
    with pytest.raises(CheckpointError, match=r"version 2 in MLflow, .* version 1: somebody moved"):
        registry.resolve("toy@champion")
    assert registry.resolve("toy@champion", ignore_moved_alias=True) == first
    assert registry.find("toy@champion") == first
    with pytest.raises(ConfigError, match="toy has no alias 'best'; its aliases: champion"):
        registry.resolve("toy@best")
    mlflow.models["toy"][0].tags[DIGEST_TAG] = second.digest
    with pytest.raises(CheckpointError, match=r"toy@champion: MLflow's version 1 is not the one"):
        registry.resolve("toy@champion")
    del mlflow.models["toy"][0]
    with pytest.raises(CheckpointError, match=r"toy@champion: MLflow's version 1 is not the one"):
        registry.resolve("toy@champion")


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("toy", "'toy': expected MODEL@ALIAS or MODEL/VERSION"),
        ("toy/x", "'toy/x': expected MODEL@ALIAS or MODEL/VERSION"),
        ("toy@a@b", "'toy@a@b': expected MODEL@ALIAS or MODEL/VERSION"),
        ("@champion", "'@champion': expected MODEL@ALIAS or MODEL/VERSION"),
        ("toy/2", "toy has no version 2; it has 1"),
        ("toi/1", "no registered model 'toi'; known: toy"),
        ("toy@champion", "toy has no alias 'champion'; its aliases: none; promote a version with"),
        ("x' OR name LIKE '%@a", "model name \"x' OR name LIKE '%\": letters, digits,"),
        ("..@a", "model name '..': letters, digits,"),
    ],
)
def test_a_reference_to_nothing_says_what_there_is(
    registry: Registry, store_url: str, reference: str, said: str
) -> None:
    registered(registry, store_url)
    with pytest.raises(ConfigError) as caught:
        registry.resolve(reference)
    assert str(caught.value).startswith(said)


def test_an_empty_registry_says_so(registry: Registry) -> None:
    with pytest.raises(ConfigError, match="no registered model 'toy'; known: none"):
        registry.resolve("toy@champion")
    assert registry.log.holders("toy") == {}


def test_an_outage_of_mlflow_is_told_and_mended_by_the_same_command(
    registry: Registry, mlflow: FakeMlflow, store_url: str
) -> None:
    version = registered(registry, store_url)
    mlflow.down = True
    for call in (
        lambda: registry.versions(),
        lambda: registry.resolve("toy/1"),
        lambda: registry.register("toy", run_config(), "run-id"),
        lambda: registry.promote(version, "champion", Gate()),
    ):
        with pytest.raises(DataError, match=r"MLflow's model registry failed .*is it up\?"):
            call()
    mlflow.down = False
    made = registry.promote(version, "champion", Gate())
    assert list(registry.log.read("toy")) == [made]
    assert mlflow.aliases == {("toy", "champion"): "1"}


def test_a_rollback_is_a_record_and_mlflow_follows(
    registry: Registry, mlflow: FakeMlflow, store_url: str
) -> None:
    for seed in (1, 2, 3):
        registry.promote(registered(registry, store_url, seed), "champion", Gate())
    moved = registry.roll_back("toy", "champion", None, "worse on scans")
    assert (moved.version, moved.previous, moved.rollback, moved.reason) == (2, 3, True, "worse on scans")
    assert moved == list(registry.log.read("toy"))[-1]
    assert mlflow.aliases == {("toy", "champion"): "2"}
    assert registry.resolve("toy@champion").version == 2
    assert registry.roll_back("toy", "champion", None, "").version == 1  # further back, not to 3 again
    with pytest.raises(ConfigError, match="toy@champion is version 1, and none held it before"):
        registry.roll_back("toy", "champion", None, "")
    assert registry.roll_back("toy", "champion", 3, "").version == 3


def test_a_rollback_to_what_cannot_be_is_refused(
    registry: Registry, mlflow: FakeMlflow, store_url: str
) -> None:
    folder = finish(store_url, run_config(1))
    registry.promote(registry.register("toy", run_config(1), "run-id"), "champion", Gate())
    registry.promote(registered(registry, store_url, 2), "champion", Gate())
    registered(registry, store_url, 3)
    before = list(registry.log.read("toy"))
    for version in (2, 3, 9):
        with pytest.raises(ConfigError, match=f"toy@champion can go back to 1, not to {version}"):
            registry.roll_back("toy", "champion", version, "")
    with pytest.raises(ConfigError, match="toy has no alias 'candidate'; its aliases: champion"):
        registry.roll_back("toy", "candidate", None, "")
    (folder / object_name("model", 0, 1)).unlink()
    with pytest.raises(CheckpointError, match="no object"):
        registry.roll_back("toy", "champion", None, "")
    assert list(registry.log.read("toy")) == before


@pytest.mark.parametrize("model", ["../toy", "a/../toy", "", "a@b"])
def test_hostile_names_read_nothing(registry: Registry, store_url: str, model: str) -> None:
    registry.promote(registered(registry, store_url), "champion", Gate())
    with pytest.raises(ConfigError, match="model name"):
        registry.roll_back(model, "champion", None, "")


def test_who_loses_the_race_for_a_record_rolls_nothing_back(
    registry: Registry, mlflow: FakeMlflow, store_url: str
) -> None:
    first, second, third = (registered(registry, store_url, seed) for seed in (1, 2, 3))
    for version in (first, second):
        registry.promote(version, "champion", Gate())
    create = registry.log._store.create

    def late(key: str, data: bytes) -> None:
        registry.log._store.create = create
        Registry(mlflow, store_url).promote(third, "champion", Gate())
        create(key, data)

    registry.log._store.create = late
    with pytest.raises(CheckpointError, match="somebody else moved an alias"):
        registry.roll_back("toy", "champion", None, "")
    assert [promotion.version for promotion in registry.log.read("toy")] == [1, 2, 3]


@pytest.mark.parametrize("damage", [b"", b"{}", b"[1]", b"[" * 100_000, b"\xff"])
def test_a_damaged_record_is_named(registry: Registry, store_url: str, damage: bytes) -> None:
    registry.promote(registered(registry, store_url), "champion", Gate())
    store: Store = open_store(store_url)
    store.write("promotions/toy/00000000.json", damage)
    with pytest.raises(CheckpointError, match=r"promotions/toy/00000000\.json is damaged"):
        registry.log.holders("toy")


@pytest.mark.parametrize(
    ("field", "value"),
    [("signature", 5), ("version", "1"), ("version", True), ("alias", None), ("rows", {}), ("new", 1)],
)
def test_a_record_with_a_field_of_another_kind_is_named(
    registry: Registry, store_url: str, field: str, value: object
) -> None:
    registry.promote(registered(registry, store_url), "champion", Gate())
    store, key = open_store(store_url), "promotions/toy/00000000.json"
    store.write(key, json.dumps(json.loads(store.read(key)) | {field: value}).encode())
    with pytest.raises(CheckpointError, match=r"promotions/toy/00000000\.json is damaged"):
        registry.log.holders("toy")


def test_a_promotion_is_plain_json() -> None:
    promotion = Promotion(
        0, "toy", 1, "champion", "file:///m", "d", "val_accuracy", 0.9, 0.5, None, 1.0, "me"
    )
    assert Promotion(**json.loads(json.dumps(asdict(promotion)))) == promotion


@pytest.mark.parametrize("alias", ["champion", "candidate-2", "A_b", "7"])
def test_aliases_that_mlflow_takes(alias: str) -> None:
    check_alias(alias)


@pytest.mark.parametrize(
    "alias", ["latest", "Latest", "v1", "V22", "a.b", "", "a b", "a/b", "a@b", "x" * 101]
)
def test_aliases_that_mlflow_would_refuse_are_refused_before_the_log_has_them(
    registry: Registry, mlflow: FakeMlflow, store_url: str, alias: str
) -> None:
    version = registered(registry, store_url)
    with pytest.raises(ConfigError, match=r"alias name"):
        registry.promote(version, alias, Gate())
    check_nothing_moved(registry, mlflow)


def test_names_are_checked_when_a_model_is_registered(registry: Registry) -> None:
    with pytest.raises(ConfigError, match="model name 'a/b'"):
        registry.register("a/b", run_config(), "run-id")
    check_name("vit-ti16_digits.2", "model")
