"""Gates: what their checks let through, what is told of it, and that nothing moves that should not."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from orchestrator import registry as registry_module
from orchestrator.evaluations import Evaluations, Measured
from orchestrator.gates import Gate
from orchestrator.registry import Registry
from orchestrator.site import Site
from orchestrator.versions import Version
from pipelines.cli import app
from tests.fake_mlflow import FakeMlflow
from tests.test_config import VALUES, changed
from tests.test_registry import METRICS, finish
from workers.config import RunConfig, make_config
from workers.errors import CheckpointError, ConfigError, DataError
from workers.evaluation.predictions import Predictions
from workers.evaluation.result import Evaluation
from workers.evaluation.throughput import Throughput
from workers.storage import open_store
from workers.training.manifest import open_manifest
from workers.training.probe_logits import record_logits

GATES = Path(__file__).parent.parent / "infra" / "gates"
FINGERPRINT = VALUES["data"]["validation_fingerprint"]
IMAGES, CLASSES = 400, 10


def config(seed: int, **fields: Any) -> RunConfig:
    return make_config({**changed("model.size", "digits-xs"), "seed": seed, "init": None, **fields})


def made(
    registry: Registry, runs: str, seed: int, metrics: dict[str, float] = METRICS, **how: Any
) -> Version:
    fields = how.pop("fields", {})
    finish(runs, config(seed, **fields), metrics, **how)
    return registry.register("toy", config(seed, **fields), "run-id")


def predictions(wrong: range, labels: np.ndarray | None = None) -> Predictions:
    """Of 400 images of 10 classes in turn; those of these numbers are taken for the next class."""
    labels = np.arange(IMAGES, dtype=np.int32) % CLASSES if labels is None else labels
    classes = labels.copy()
    classes[list(wrong)] = (classes[list(wrong)] + 1) % CLASSES
    return Predictions(
        ordinals=np.arange(IMAGES),
        labels=labels,
        classes=classes.astype(np.int32),
        confidences=np.full(IMAGES, 0.9, np.float32),
        in_top5=np.ones(IMAGES, bool),
        losses=np.full(IMAGES, 0.3, np.float32),
    )


def keep(
    runs: str, version: Version, found: Predictions, fingerprint: str = FINGERPRINT, **fields: Any
) -> Measured:
    result = Evaluation.of(found, CLASSES, [])
    images, correct = result.class_counts
    measured = Measured(
        model=version.label,
        manifest=version.manifest,
        digest=version.digest,
        run=version.run,
        image_size=version.image_size,
        data="file:///data/val",
        fingerprint=fingerprint,
        classes=tuple(str(number) for number in range(CLASSES)),
        device="cpu",
        bad_samples=(),
        metrics=result.metrics(),
        class_images=tuple(images.tolist()),
        class_correct=tuple(correct.tolist()),
        calibration=result.calibration.bins,
        time=1.0,
        versions={},
        **fields,
    )
    kept = Evaluations(runs)
    return kept.append(measured, found, len(kept.history(measured.target)))


def gate(*checks: dict[str, Any]) -> Gate:
    return Gate.parse({"checks": list(checks)})


def rows(registry: Registry, version: Version, *checks: dict[str, Any]) -> list[tuple[str, bool]]:
    verdict = registry.judge(version, "champion", gate(*checks)).verdict
    return [(row.reason, row.passed) for row in verdict.rows if row.check != "restore"]


@pytest.mark.parametrize("path", sorted(GATES.glob("*.yaml")), ids=lambda path: path.name)
def test_the_examples_are_gates(path: Path) -> None:
    assert Gate.load(path).checks
    assert Gate.load(path).digest == Gate.load(path).digest


def test_one_metric_is_a_gate() -> None:
    assert Gate.parse({"metric": "val_top5", "minimum": 0.5}) == Gate.of("val_top5", 0.5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("checks: [{check: metrc, minimum: 0.9}]", "checks.0.check: no check 'metrc'; did you mean metric?"),
        (
            "checks: [{check: metric, minimun: 0.9}]",
            "checks.0 (metric): minimun: unknown field; did you mean minimum?",
        ),
        ("checks: [{check: [metric]}]", "checks.0.check: no check ['metric']; did you mean metric?"),
        ("checks: [{check: metric}]", "checks.0 (metric): give either a minimum or a maximum"),
        ("checks: [{check: metric, minimum: high}]", "checks.0 (metric): minimum: "),
        ("checks: [{check: against_holder}]", "give either `better: true` or a margin"),
        ("checks: [{check: against_holder, margin: 0.01, test: tost}]", "checks.0 (against_holder): test: "),
        ("checks: [{check: against_holder, margin: 0.01, alpha: 0.9}]", "checks.0 (against_holder): alpha: "),
        ("checks: [{check: slices}]", "give `worst`, a margin, or both"),
        ("checks: [{check: size}]", "give max_parameters, max_flops or max_bytes"),
        ("checks: [metric]", "checks.0: expected fields with `check:`"),
        ("checks: []", "checks: expected a list of checks"),
        ("checks: [{check: lineage}]\ndescripton: x", "descripton: unknown field; did you mean description?"),
        ("{}", "checks: expected a list"),
        ("[1]", "expected fields, found list"),
    ],
)
def test_a_mistake_in_a_gate_is_named(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "gate.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        Gate.load(path)
    assert str(caught.value).startswith(f"{path}: ") and said in str(caught.value)
    with pytest.raises(ConfigError, match=r"^no file .*missing\.yaml$"):
        Gate.load(tmp_path / "missing.yaml")


def test_metrics_by_estimate_and_by_the_end_of_an_interval(registry: Registry, store_url: str) -> None:
    metrics = {**METRICS, "val_loss_low": 0.25, "val_loss_high": 0.35, "val_images": 400}
    version = made(registry, store_url, 1, metrics)
    metric = {"check": "metric"}
    assert rows(registry, version, {**metric, "minimum": 0.9}) == [
        ("val_accuracy 0.9000 reaches the gate's 0.9", True)
    ]
    ((said, passed),) = rows(registry, version, {**metric, "minimum": 0.9, "confidence": 0.95})
    assert not passed and "val_accuracy 0.9000 (at least 0.87" in said
    assert rows(registry, version, {**metric, "minimum": 0.87, "confidence": 0.95})[0][1]
    assert rows(registry, version, {**metric, "metric": "val_loss", "maximum": 0.3}) == [
        ("val_loss 0.3000 keeps to the gate's 0.3", True)
    ]
    loss = {**metric, "metric": "val_loss", "maximum": 0.3}
    assert rows(registry, version, {**loss, "confidence": 0.95}) == [
        ("val_loss 0.3000 (at most 0.3500 with 95%) is above the gate's 0.3", False)
    ]
    with pytest.raises(ConfigError, match="metric val_loss: only shares of images"):
        rows(registry, version, {**loss, "confidence": 0.9})
    with pytest.raises(ConfigError, match="toy/1 has no metric 'val_acuracy'; it has val_accuracy"):
        rows(registry, version, {**metric, "metric": "val_acuracy", "minimum": 0.9})


def test_a_share_that_is_exactly_the_minimum_passes_no_more_often_than_stated() -> None:
    from workers.evaluation.margins import share_low

    counts = np.random.default_rng(3).binomial(91, 0.97, 2000)
    passed = np.mean([share_low(int(count), 91, 0.05) >= 0.97 for count in counts])
    assert passed <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 2000)


def test_against_the_holder(registry: Registry, store_url: str) -> None:
    versions = [made(registry, store_url, seed) for seed in (1, 2, 3, 4)]
    for version, wrong in zip(versions, (range(40), range(38), range(20), range(60)), strict=True):
        keep(store_url, version, predictions(wrong))
    close, better, worse = versions[1:]
    not_worse = {"check": "against_holder", "margin": 0.02}
    assert rows(registry, close, not_worse) == [("nothing else holds the alias", True)]
    registry.promote(versions[0], "champion", Gate())
    for test in ("mcnemar", "bootstrap"):
        checks = [{**not_worse, "test": test}, {"check": "against_holder", "better": True, "test": test}]
        assert [passed for _, passed in rows(registry, close, *checks)] == [True, False]
        assert [passed for _, passed in rows(registry, better, *checks)] == [True, True]
        assert [passed for _, passed in rows(registry, worse, *checks)] == [False, False]
    ((said, _),) = rows(registry, worse, not_worse)
    assert said.startswith(
        "toy/4 is not shown to be as good as toy/1 (p 1.0000: of 400 images 0 right for toy/4"
    )
    assert rows(registry, versions[0], not_worse) == [("nothing else holds the alias", True)]
    with pytest.raises(
        CheckpointError, match="toy/4 was not promoted: toy/4 is not shown to be as good as toy/1"
    ):
        registry.promote(worse, "champion", gate(not_worse))
    made_it = registry.promote(better, "champion", gate(not_worse))
    (row, restore) = made_it.rows
    assert (row["check"], row["value"], row["passed"], row["fingerprint"]) == (
        "against_holder",
        0.05,
        True,
        FINGERPRINT,
    )
    assert row["low"] < 0.05 < row["high"] and restore["check"] == "restore"
    assert made_it.gate == gate(not_worse).digest and not made_it.forced
    assert registry.log.read("toy")[-1] == made_it


def test_the_worst_class_and_classes_that_are_worse(registry: Registry, store_url: str) -> None:
    first, second = made(registry, store_url, 1), made(registry, store_url, 2)
    keep(store_url, first, predictions(range(40)))
    keep(store_url, second, predictions(range(3, 200, 10)))  # half of class 3, and nothing else
    registry.promote(first, "champion", Gate())
    worst = {"check": "slices", "worst": 0.6}
    assert rows(registry, second, worst) == [
        ("class '3': accuracy 0.5000 of 40 images is below the gate's 0.6", False)
    ]
    assert rows(registry, first, worst)[0][1]
    assert rows(registry, first, {**worst, "min_images": 41}) == [("no class has 41 images", False)]
    ((said, passed),) = rows(registry, second, {"check": "slices", "margin": 0.02})
    assert not passed and said.startswith("classes that are worse than those of toy/1: '3' -0.4000 (p ")
    assert rows(registry, second, {"check": "slices", "margin": 0.3}) == [("none of 10 classes is", True)]


def test_calibration_size_and_throughput(registry: Registry, store_url: str) -> None:
    version = made(registry, store_url, 1, {**METRICS, "val_ece": 0.04})
    assert rows(registry, version, {"check": "calibration", "maximum": 0.05})[0][1]
    assert not rows(registry, version, {"check": "calibration", "maximum": 0.03})[0][1]
    (count,) = {sum(parameter.numel() for parameter in _model().parameters())}
    size = {"check": "size", "max_parameters": count, "max_bytes": 1000, "max_flops": 10**9}
    assert [passed for _, passed in rows(registry, version, size)] == [True, True, False]
    fast = {"check": "throughput", "minimum": 90, "device": "CPU"}
    keep(store_url, version, predictions(range(0)))
    with pytest.raises(ConfigError, match="run `vitscale evaluate toy/1 --throughput`"):
        rows(registry, version, fast)
    speed = Throughput(100.0, 95.0, 105.0, 7, 64, (8, 8), "float32", "cpu", None)
    keep(store_url, version, predictions(range(0)), throughput=(speed,))
    assert rows(registry, version, fast) == [("100 images/s in float32 on cpu reach the gate's 90", True)]
    assert not rows(registry, version, {**fast, "minimum": 101})[0][1]
    with pytest.raises(ConfigError) as caught:
        rows(registry, version, {**fast, "device": "H100", "dtype": "bfloat16"})
    assert str(caught.value).startswith(
        "the throughput of toy/1 on a device 'H100' in bfloat16 was not measured yet, only in float32 on "
        "cpu; run `vitscale evaluate toy/1 --throughput --fresh` with --gpus N"
    )


def _model() -> Any:
    from workers.models import build_model

    return build_model(**config(1).model.model_dump())


def test_lineage_up_to_the_root(registry: Registry, mlflow: FakeMlflow, store_url: str) -> None:
    parent = made(registry, store_url, 1)
    origin = {"manifest": parent.manifest, "digest": parent.digest, "parent": parent.label, "new_head": False}
    child = made(registry, store_url, 2, fields={"init": origin})
    check = {"check": "lineage"}
    assert rows(registry, child, check) == [
        ("toy/2 does not name the version of the code; toy/1 does not name the version of the code", False)
    ]
    mlflow.models["toy"][0].tags["vitscale.manifest_sha256"] = "0" * 64
    ((said, _),) = rows(registry, child, check)
    assert "toy/1, the parent of toy/2, is another checkpoint now" in said
    path = Path(parent.manifest.removeprefix("file://"))
    path.write_bytes(path.read_bytes() + b" ")
    ((said, _),) = rows(registry, child, check)
    assert "toy/1, the parent of toy/2: " in said and "tampered" in said
    mlflow.models["toy"].pop(0)
    path.unlink()
    ((said, _),) = rows(registry, child, check)
    assert "is not registered" in said and "lacks a part" in said


def test_position_embeddings_near_the_parents(registry: Registry, store_url: str) -> None:
    parent = made(registry, store_url, 1, weight=0.01)
    origin = {"manifest": parent.manifest, "digest": parent.digest, "parent": parent.label, "new_head": False}
    near = made(registry, store_url, 2, fields={"init": origin}, weight=0.011)
    far = made(registry, store_url, 3, fields={"init": origin}, weight=0.02)
    check = {"check": "resample"}
    assert rows(registry, parent, check) == [("has no position embeddings of a parent", True)]
    ((said, passed),) = rows(registry, near, check)
    assert passed and said.startswith("norm +10.0%, cosine of neighbours +0.0000")
    assert [passed for _, passed in rows(registry, far, check)] == [False]


def test_what_was_not_measured_is_asked_for_by_its_command(registry: Registry, store_url: str) -> None:
    first, second = made(registry, store_url, 1), made(registry, store_url, 2)
    registry.promote(first, "champion", Gate())
    against = gate({"check": "against_holder", "margin": 0.1})
    before = registry.log.read("toy")
    for lacking in (first, second):
        with pytest.raises(
            ConfigError, match=rf"run `vitscale evaluate {lacking.label} --data file:///data/val`"
        ):
            registry.promote(second, "champion", against)
        keep(store_url, lacking, predictions(range(40)))
    assert registry.log.read("toy") == before
    assert registry.promote(second, "champion", against).version == 2


def test_predictions_of_other_data_or_that_were_changed_move_nothing(
    registry: Registry, store_url: str
) -> None:
    first, second, third = (made(registry, store_url, seed) for seed in (1, 2, 3))
    keep(store_url, first, predictions(range(40)))
    keep(store_url, second, predictions(range(40), labels=np.zeros(IMAGES, np.int32)))
    measured = keep(store_url, third, predictions(range(40)))
    registry.promote(first, "champion", Gate())
    against = gate({"check": "against_holder", "margin": 0.1})
    with pytest.raises(DataError, match="judged different images"):
        registry.promote(second, "champion", against)
    assert measured.predictions is not None
    key = f"runs/{third.run}/{measured.target.folder}/{measured.predictions.name}"
    store = open_store(store_url)
    store.write(key, b"x" * measured.predictions.size)
    with pytest.raises(CheckpointError, match=rf"{re.escape(key)}: its sha256"):
        registry.promote(third, "champion", against)
    assert len(registry.log.read("toy")) == 1


def test_by_force_with_a_reason_that_is_recorded(registry: Registry, store_url: str) -> None:
    version = made(registry, store_url, 1)
    promotion = registry.promote(version, "champion", Gate.of("val_accuracy", 0.95), force="demo on Monday")
    assert (promotion.forced, promotion.reason, promotion.value) == (True, "demo on Monday", 0.9)
    assert [(row["check"], row["passed"]) for row in promotion.rows] == [("metric", False), ("restore", True)]
    easy = registry.promote(made(registry, store_url, 2), "champion", Gate(), force="not needed")
    assert (easy.forced, easy.reason) == (False, "")
    back = registry.roll_back("toy", "champion", None, "worse")
    assert (back.forced, back.rows, back.gate, back.reason) == (False, [], "", "worse")


@pytest.mark.parametrize("lacking", ["measurement", "manifest", "metric"])
def test_force_moves_an_alias_though_a_check_cannot_judge(
    registry: Registry, store_url: str, lacking: str
) -> None:
    first, second = made(registry, store_url, 1), made(registry, store_url, 2)
    registry.promote(first, "champion", Gate())
    asked, said = gate({"check": "against_holder", "margin": 0.1}), "was not evaluated on"
    if lacking == "manifest":
        Path(first.manifest.removeprefix("file://")).unlink()
        said = "MANIFEST.json"
    elif lacking == "metric":
        asked, said = Gate.of("top5", 0.0), "has no metric 'top5'"
    with pytest.raises((ConfigError, CheckpointError), match=re.escape(said)):
        registry.promote(second, "champion", asked)
    promotion = registry.promote(second, "champion", asked, force="the holder is broken")
    assert (promotion.version, promotion.forced, promotion.metric) == (2, True, "")
    failed, restored = promotion.rows
    assert (failed["check"], failed["passed"], restored["passed"]) == (asked.checks[0].check, False, True)
    assert said in failed["reason"]
    assert registry.log.read("toy")[-1] == promotion


def test_no_force_moves_an_alias_to_what_does_not_restore(registry: Registry, store_url: str) -> None:
    folder = finish(store_url, config(1), METRICS, weight=float("inf"))
    broken = registry.register("toy", config(1), "run-id")
    with pytest.raises(CheckpointError, match="weights that are not finite"):
        registry.promote(broken, "champion", Gate(), force="now")
    (folder / "model-00000-of-00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match="lacks a part"):
        registry.promote(broken, "champion", Gate(), force="now")
    (folder / "MANIFEST.json").unlink()
    with pytest.raises(CheckpointError, match="lacks a part"):
        registry.promote(broken, "champion", Gate(), force="now")
    assert registry.log.read("toy") == []


def test_logits_other_than_those_recorded_do_not_pass(
    registry: Registry, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from workers.training import restore

    version = made(registry, store_url, 1)
    _, manifest = open_manifest(version.manifest, version.digest)
    model = restore.load_model(version.manifest, version.digest)[0]
    recorded = record_logits(model, manifest.model)
    for change, said in (
        (0.0, "logits are those recorded"),
        (0.5, "computes other logits than the saved one"),
    ):
        probe = {**recorded, "logits": [[value + change for value in row] for row in recorded["logits"]]}
        monkeypatch.setattr(
            restore, "load_model", lambda *_, probe=probe: (model, replace(manifest, probe=probe))
        )
        (row,) = registry.judge(version, "champion", gate({"check": "restore"})).verdict.rows
        assert said in row.reason and row.passed == (not change)


def test_attempts_on_one_validation_set_are_counted(registry: Registry, store_url: str) -> None:
    own = Gate()
    (data,) = [VALUES["data"]["validation_url"]]
    for number in (1, 2, 3):
        version = made(registry, store_url, number)
        for _ in range(2):  # a dry run, and again
            assert registry.judge(version, "champion", own).attempts == {data: number}
    assert registry.promote(version, "champion", own).attempts == {data: 3}
    finish(store_url, config(4), METRICS)
    assert registry.judge(registry.register("other", config(4), "run-id"), "best", own).attempts == {data: 1}
    origin = {
        "manifest": version.manifest,
        "digest": version.digest,
        "parent": version.label,
        "new_head": False,
    }
    finish(store_url, config(5, init=origin), METRICS)
    child = registry.register("child", config(5, init=origin), "run-id")
    assert registry.judge(child, "best", own).attempts == {data: 4}  # with those that it comes from


def test_cooldowns_of_one_run_are_attempts_of_one_model(registry: Registry, store_url: str) -> None:
    def judged(model: str, seed: int, **fields: Any) -> tuple[Version, int]:
        finish(store_url, config(seed, **fields), METRICS)
        version = registry.register(model, config(seed, **fields), "run-id")
        (count,) = registry.judge(version, "best", Gate()).attempts.values()
        return version, count

    def fork(version: Version) -> dict[str, str]:
        return {"manifest": version.manifest, "digest": version.digest, "parent": version.run}

    assert judged("base", 1)[1] == 1
    origin, count = judged("base", 2)
    assert count == 2
    cooled = [judged(f"cooldown-{seed}", seed, fork=fork(origin)) for seed in (3, 4, 5)]
    assert [count for _, count in cooled] == [3, 4, 5]  # with all of the model that their run became
    again = judged("again", 6, fork=fork(cooled[0][0]))
    assert again[1] == 6
    assert judged("other", 7)[1] == 1
    tuned = {"manifest": again[0].manifest, "digest": again[0].digest, "parent": again[0].label}
    assert judged("tuned", 8, init={**tuned, "new_head": False})[1] == 7
    assert registry.judge(origin, "best", Gate()).attempts == {VALUES["data"]["validation_url"]: 6}
    Path(origin.manifest.removeprefix("file://")).unlink()
    assert judged("late", 9, fork=fork(origin))[1] == 7


def test_who_loses_the_race_is_judged_against_the_new_holder(
    registry: Registry, mlflow: FakeMlflow, store_url: str
) -> None:
    first, second, third = (made(registry, store_url, seed) for seed in (1, 2, 3))
    for version, wrong in ((first, range(60)), (second, range(10)), (third, range(40))):
        keep(store_url, version, predictions(wrong))
    against = gate({"check": "against_holder", "margin": 0.01})
    registry.promote(first, "champion", against)
    create = registry.log._store.create

    def late(key: str, data: bytes) -> None:
        registry.log._store.create = create
        Registry(mlflow, store_url).promote(second, "champion", against)
        create(key, data)

    registry.log._store.create = late
    with pytest.raises(CheckpointError, match="toy/3 is not shown to be as good as toy/2"):
        registry.promote(third, "champion", against)
    assert [promotion.version for promotion in registry.log.read("toy")] == [1, 2]


@pytest.fixture
def command(registry: Registry, mlflow: FakeMlflow, store_url: str, tmp_path: Path, monkeypatch: Any) -> Any:
    monkeypatch.setattr(registry_module, "connect", lambda uri: mlflow)
    Site(ray="http://ray", mlflow="http://mlflow", data="file:///x", runs=store_url).save(
        tmp_path / "site.yaml"
    )

    def promote(*arguments: str, code: int = 0) -> str:
        site = ["--site", str(tmp_path / "site.yaml")]
        done = CliRunner().invoke(app, ["promote", *arguments, *site], catch_exceptions=False)
        assert done.exit_code == code, done.output
        return done.stdout

    return promote


def test_the_command(registry: Registry, store_url: str, tmp_path: Path, command: Any) -> None:
    for seed in (1, 2):
        made(registry, store_url, seed)
    path = tmp_path / "gate.yaml"
    path.write_text("checks: [{check: metric, minimum: 0.95}]")
    asked = ("toy", "2", "--to", "champion", "--gate", str(path))
    command("toy", "1", "--to", "champion")
    said = command(*asked, "--dry-run", code=1)
    assert "toy/2 for toy@champion, now 1" in said and "fail" in said and "nothing moved" in said
    assert "2 versions were judged by file:///data/val so far" in said
    told = json.loads(command(*asked, "--dry-run", "--json", code=1))
    assert (told["passed"], told["holder"], told["gate"]) == (False, 1, Gate.load(path).digest)
    assert [row["passed"] for row in told["rows"]] == [False, True]
    assert len(registry.log.read("toy")) == 1
    again = command("toy/2", *asked[2:], "--dry-run", code=1)
    assert again.splitlines()[0] == said.splitlines()[0]
    assert command("toy@champion", "--to", "candidate").startswith("toy@candidate is version 1")
    with pytest.raises(CheckpointError, match=r"toy/2 was not promoted: val_accuracy 0\.9000 is"):
        command(*asked)
    for wrong in (("--force",), ("--reason", "why"), ("--force", "--reason", " ")):
        with pytest.raises(ConfigError, match="--force needs a --reason"):
            command(*asked, *wrong)
    with pytest.raises(ConfigError, match="--gate: give a file, or --metric"):
        command(*asked, "--minimum", "0.5")
    for number in ("nan", "inf"):
        with pytest.raises(ConfigError, match=f"minimum: input should be a finite number, got {number}$"):
            command("toy", "1", "--to", "champion", "--minimum", number)
    with pytest.raises(ConfigError, match="toy has no version 9"):
        command("toy", "9", "--to", "champion", "--dry-run")
    with pytest.raises(ConfigError, match="alias name"):
        command("toy", "1", "--to", "latest", "--dry-run")
    assert "by force: it is Monday" in command(*asked, "--force", "--reason", "it is Monday")
    assert registry.log.holders("toy")["champion"].version == 2
