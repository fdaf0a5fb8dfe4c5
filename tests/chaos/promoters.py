"""The clients of a trial of R14: they promote, roll back and read, are killed, and write what they heard.

A process of its own forks them, since it has imported all that they need and has no thread.
"""

import contextlib
import json
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from orchestrator.gates import Gate
from orchestrator.reconciler import keep_aliases
from orchestrator.registry import Registry
from orchestrator.site import Site
from workers.errors import CheckpointError, ConfigError, DataError

MODEL = "toy"
ALIASES = ("champion", "champion", "candidate")
GATE = Gate.of("val_accuracy", 0.5)


@dataclass(frozen=True)
class Trial:
    mlflow: str
    runs: str
    folder: str
    """Of what the clients heard, `<client>.jsonl`, and of what MLflow said meanwhile, `samples.jsonl`."""
    versions: int
    clients: int
    operations: int
    """Of each."""
    seed: int
    kill_every: float
    """Operations of all, on average."""

    @property
    def model(self) -> str:
        return f"{MODEL}-{self.seed}"


def play(trial: Trial) -> None:
    """Until all clients have done their operations, whoever is killed meanwhile."""
    chance, context = random.Random(trial.seed), multiprocessing.get_context("fork")

    def start(function, *arguments) -> BaseProcess:
        process = context.Process(target=function, args=(trial, *arguments), daemon=True)
        process.start()
        return process

    others = [start(sample), start(supervise)]
    running = {number: start(client, number) for number in range(trial.clients)}
    next_kill = chance.expovariate(1 / trial.kill_every)
    while running:
        time.sleep(0.1)
        if sum(len(heard(trial, number)) for number in range(trial.clients)) > next_kill:
            running[chance.choice(sorted(running))].kill()
            next_kill += chance.expovariate(1 / trial.kill_every)
        for number, process in list(running.items()):
            if process.is_alive():
                continue
            process.join()
            if len(heard(trial, number)) < trial.operations:
                running[number] = start(client, number)
            else:
                del running[number]
    print("quiet", flush=True)
    sys.stdin.readline()
    for process in others:
        process.kill()
        process.join()


def client(trial: Trial, number: int) -> None:
    torch.set_num_threads(1)
    done = len(heard(trial, number))
    chance = random.Random(f"{trial.seed} {number} {done}")
    registry = Registry(MlflowClient(trial.mlflow), trial.runs)
    with (Path(trial.folder) / f"{number}.jsonl").open("a") as file:
        for operation in range(done, trial.operations):
            # By which a record is known to be this one's.
            os.environ["USER"] = f"{number} {operation}"
            kind = chance.choice(("promote", "promote", "roll back", "read", "read"))
            alias, version = chance.choice(ALIASES), chance.randint(1, trial.versions)
            entry = {"client": number, "kind": kind, "alias": alias, "asked": version}
            file.write(json.dumps({**entry, "called": time.monotonic_ns()}) + "\n")
            file.flush()
            told = ask(registry, trial.model, kind, alias, version)
            file.write(json.dumps({**told, "answered": time.monotonic_ns()}) + "\n")
            file.flush()


def ask(registry: Registry, model: str, kind: str, alias: str, version: int) -> dict[str, object]:
    try:
        if kind == "read":
            return {"outcome": "read", "version": registry.resolve(f"{model}@{alias}").version}
        if kind == "promote":
            record = registry.promote(registry.resolve(f"{model}/{version}"), alias, GATE)
        else:
            record = registry.roll_back(model, alias, None, "chaos")
    except ConfigError as error:
        # There is nothing to go back to, or no such alias yet.
        if kind == "read":
            return {"outcome": "read", "version": None, "error": str(error)}
        return {"outcome": "refused", "error": str(error)}
    except CheckpointError as error:
        return {"outcome": "refused", "error": str(error)}
    except DataError as error:
        # An outage is not to be over in a few operations.
        time.sleep(0.5)
        return {"outcome": "unknown", "error": str(error)}
    written = record.user == os.environ["USER"]
    return {"outcome": "moved" if written else "read", "version": record.version, "seq": record.seq}


def heard(trial: Trial, number: int) -> list[dict[str, object]]:
    """A line per operation: what was asked, and what came of it, if that was heard."""
    path = Path(trial.folder) / f"{number}.jsonl"
    operations: list[dict[str, object]] = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):  # the last words of one that was killed
            entry = json.loads(line)
            if "called" in entry:
                operations.append(entry)
            else:
                operations[-1] |= entry
    return operations


def sample(trial: Trial) -> None:
    """What MLflow's aliases name, at all times."""
    mlflow = MlflowClient(trial.mlflow)
    with (Path(trial.folder) / "samples.jsonl").open("a") as file:
        while True:
            with contextlib.suppress(MlflowException):
                aliases = mlflow.get_registered_model(trial.model).aliases
                file.write(json.dumps(aliases) + "\n")
                file.flush()
            time.sleep(0.05)


def supervise(trial: Trial) -> None:
    site = Site(ray="http://127.0.0.1:1", mlflow=trial.mlflow, data=trial.runs, runs=trial.runs)
    keep_aliases(site, lambda model, text: None, threading.Event())


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    play(Trial(**json.loads(sys.stdin.readline())))
