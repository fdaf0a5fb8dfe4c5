"""R14: promotion is linearizable, and no alias ever names what was not promoted."""

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from orchestrator.promotions import Promotion
from orchestrator.registry import Registry
from orchestrator.versions import Version
from tests.chaos.histories import Operation, not_linearizable
from tests.chaos.promoters import Trial, heard
from tests.chaos.row import Lab, Row
from tests.chaos.tracking import Mlflow
from tests.test_registry import finish, run_config
from workers.training.manifest import object_name
from workers.training.restore import restore_test

CLIENTS, OPERATIONS, SHORT_OPERATIONS = 8, 100, 30
GOOD = 4
"""Versions that may be promoted; three more may not."""
CONVERGED_SECONDS = 10.0
PATIENCE = 900.0
PATIENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "0",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "OMP_NUM_THREADS": "1",
}


def promotions(lab: Lab) -> Iterator[str]:
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    mlflow = Mlflow(lab.new_folder("mlflow"))
    try:
        mlflow.start()
        while True:
            yield trial_of(lab, mlflow)
    finally:
        mlflow.kill()


def trial_of(lab: Lab, mlflow: Mlflow) -> str:
    """Eight clients, each of which may be killed at any moment, on one model; MLflow dies and comes back."""
    trial = Trial(
        mlflow=mlflow.uri,
        runs=lab.new_url("runs"),
        folder=str(lab.new_folder("heard")),
        versions=GOOD + 3,
        clients=CLIENTS,
        operations=SHORT_OPERATIONS if lab.short else OPERATIONS,
        seed=lab.random.randrange(1 << 30),
        kill_every=15,
    )
    Path(trial.folder).mkdir()
    registry = Registry(MlflowClient(mlflow.uri), trial.runs)
    allowed = {version.version: version for version in make_versions(registry, trial)}
    with subprocess.Popen(
        [sys.executable, "-m", "tests.chaos.promoters"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | PATIENT,
        cwd=Path(__file__).parents[2],
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(asdict(trial)) + "\n")
        process.stdin.flush()
        try:
            for _ in range(1 if lab.short else 4):
                await_operations(process, trial, lab.random.uniform(0.1, 0.6))
                mlflow.kill()
                time.sleep(lab.random.uniform(0, 1))
                mlflow.start()
            if process.stdout.readline() != "quiet\n":
                return "the clients came to no end"
            quiet = time.monotonic()
            history = registry.log.read(trial.model)
            problem = converged(mlflow.uri, trial.model, history)
            lab.seconds.append(time.monotonic() - quiet)
            process.stdin.write("enough\n")
            process.stdin.flush()
            process.wait(30)
        finally:
            process.kill()
    operations = [operation for number in range(CLIENTS) for operation in heard(trial, number)]
    return problem or judge(operations, history, allowed, samples(trial), trial.operations)


def make_versions(registry: Registry, trial: Trial) -> list[Version]:
    """Those that may be promoted; the others: below the gate, a flipped bit, no manifest."""
    good = []
    for seed in range(trial.versions):
        config = run_config(seed)
        folder = finish(trial.runs, config, {"val_accuracy": 0.1 if seed == GOOD else 0.9})
        version = registry.register(trial.model, config, "")
        weights, manifest = folder / object_name("model", 0, 1), folder / "MANIFEST.json"
        if seed < GOOD:
            good.append(version)
        elif seed == GOOD + 1:
            data = bytearray(weights.read_bytes())
            data[-5] ^= 1
            weights.write_bytes(data)
        elif seed == GOOD + 2:
            manifest.unlink()
    return good


def await_operations(clients: "subprocess.Popen[str]", trial: Trial, part: float) -> None:
    """Until this part of them is done."""
    deadline = time.monotonic() + PATIENCE
    while sum(len(heard(trial, number)) for number in range(CLIENTS)) < part * CLIENTS * trial.operations:
        assert clients.poll() is None and time.monotonic() < deadline, "the clients do nothing"
        time.sleep(0.2)


def converged(uri: str, model: str, history: list[Promotion]) -> str:
    wanted = {record.alias: str(record.version) for record in history}
    mlflow, deadline = MlflowClient(uri), time.monotonic() + CONVERGED_SECONDS
    found: Mapping[str, str] | None = None
    while time.monotonic() < deadline:
        try:
            found = mlflow.get_registered_model(model).aliases
        except MlflowException:
            continue
        if found == wanted:
            return ""
        time.sleep(0.05)
    return f"after {CONVERGED_SECONDS:.0f} s MLflow has {found} and the log {wanted}"


def samples(trial: Trial) -> set[tuple[str, int]]:
    lines = (Path(trial.folder) / "samples.jsonl").read_text().splitlines()
    return {(alias, int(version)) for line in lines[:-1] for alias, version in json.loads(line).items()}


def judge(
    told: list[dict[str, object]],
    history: list[Promotion],
    allowed: Mapping[int, Version],
    sampled: set[tuple[str, int]],
    each: int,
) -> str:
    if len(told) != CLIENTS * each:
        return f"{len(told)} operations instead of {CLIENTS * each}"
    for record in history:
        if record.version not in allowed or record.digest != allowed[record.version].digest:
            return f"record {record.seq} promotes version {record.version}, which no gate lets through"
    if strange := sampled - {(record.alias, record.version) for record in history}:
        return f"MLflow's aliases named {strange}, which was not promoted"
    if alarms := [entry for entry in told if "by hand" in str(entry.get("error"))]:
        return f"an alias that nobody touched was refused: {alarms[0]}"
    for version in {record.version for record in history}:
        restore_test(allowed[version].manifest, allowed[version].digest)
    return not_linearizable(map(to_operation, filter(answered, told)), history)


def answered(entry: Mapping[str, object]) -> bool:
    """Nobody knows what became of the others, and nobody needs to: the log says it."""
    return entry.get("outcome") in ("read", "moved")


def to_operation(entry: Mapping[str, object]) -> Operation:
    return Operation(
        client=entry["client"],
        kind=entry["kind"],
        alias=entry["alias"],
        called=entry["called"],
        answered=entry["answered"],
        seq=entry["seq"] if entry["outcome"] == "moved" else None,
        version=entry["version"],
    )


ROWS = [
    Row(
        "R14",
        "promotion: linearizable, MLflow's aliases follow in 10 s and never name what was not promoted",
        promotions,
        short=2,
        services=True,
    )
]
