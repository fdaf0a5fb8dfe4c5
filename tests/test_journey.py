"""The README's journey as a person runs it: the command as a process, real services, real kills."""

import configparser
import json
import os
import random
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from orchestrator import services as local_services
from orchestrator.daemons import ray_folder
from orchestrator.site import Site
from tests import canary
from tests.processes import ray_processes
from workers.storage import open_store
from workers.training.commits import CommitLog

pytestmark = [pytest.mark.services, pytest.mark.timeout(1500)]

VITSCALE = [sys.executable, "-m", "pipelines.cli"]
EFFORT = ["--effort", "0.03"]
PIPELINE = """\
name: tiny
stages:
  child: {finetune: vit-digits@champion, image_sizes: [12], epochs: 0.5}
  measured: {evaluate: child}
  promoted: {promote: measured, to: champion, gate: {metric: val_accuracy, minimum: 0.0}}
"""


def vitscale(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*VITSCALE, *arguments], capture_output=True, text=True, timeout=400, cwd=cwd)


def heads(directory: Path) -> dict[str, tuple[int, int]]:
    """Of each complete run: (leases taken, commits), which grow if anything is trained again."""
    found = {}
    for run in sorted((directory / "runs" / "runs").glob("*")):
        head = CommitLog(open_store(run.as_uri())).head()
        if head is not None and head.complete:
            found[run.name] = (len(list(run.glob("leases/*"))), len(list(run.glob("commits/*"))))
    return found


@pytest.fixture(scope="module")
def journey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A quickstart that was interrupted three times at random and then run to its end.

    Its shell holds secrets of other things; what processes were called during its last part is in `ps.txt`.
    """
    directory = tmp_path_factory.mktemp("journey")
    command = [*VITSCALE, "quickstart", "--dir", str(directory), *EFFORT]
    shell = os.environ | canary.ENVIRONMENT
    seed = random.randrange(1000)
    rng = random.Random(seed)
    again = f"a finished run was trained again (interruption seed {seed})"
    finished: dict[str, tuple[int, int]] = {}
    try:
        for blow in (signal.SIGINT, signal.SIGKILL, signal.SIGINT):
            process = subprocess.Popen(
                command, env=shell, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            try:
                process.wait(rng.uniform(8, 40))
            except subprocess.TimeoutExpired:
                process.send_signal(blow)
                process.wait(120)
            now = heads(directory)
            assert finished.items() <= now.items(), again
            finished = now
        with canary.watched_command_lines(directory / "ps.txt"):
            done = subprocess.run(command, capture_output=True, text=True, timeout=1200, env=shell)
        assert done.returncode == 0, done.stdout + done.stderr
        assert finished.items() <= heads(directory).items(), again
        (directory / "output.txt").write_text(done.stdout)
        yield directory
    finally:
        local_services.down(directory, lambda line: None)


def test_quickstart_ends_with_the_report_and_the_urls(journey: Path) -> None:
    output = (journey / "output.txt").read_text()
    assert f"Report   {journey / 'report.html'}" in output
    assert "MLflow   http://127.0.0.1:" in output
    assert len(heads(journey)) == 3 + 12  # pretraining, two fine-tunings, the study's rungs


def test_the_report_is_one_page_that_loads_nothing(journey: Path) -> None:
    loaded: list[str] = []

    class Loads(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            for name, value in attrs:
                if tag != "a" and name in ("src", "href") and not (value or "").startswith(("data:", "#")):
                    loaded.append(f"{tag} {name}={value}")

    text = (journey / "report.html").read_text()
    Loads().feed(text)
    assert not loaded
    for section in ("Patch filters", "Scaling", "What it confuses", "fine-tuned as long at 8 px"):
        assert section.lower() in text.lower()


def test_again_it_trains_nothing(journey: Path) -> None:
    before = heads(journey)
    done = vitscale("quickstart", "--dir", str(journey), *EFFORT)
    assert done.returncode == 0, done.stderr
    assert heads(journey) == before
    assert "Study (done before)" in done.stdout


def test_versions_know_their_parents_and_aliases(journey: Path) -> None:
    done = vitscale("models", "--json", "--site", str(journey / "site.yaml"))
    versions = {f"{v['model']}/{v['version']}": v for v in json.loads(done.stdout)}
    assert versions.keys() == {"vit-digits/1", "vit-digits-16px/1", "vit-digits-8px/1"}
    assert versions["vit-digits/1"]["aliases"] == ["champion"]
    assert versions["vit-digits-16px/1"]["parent"] == "vit-digits/1"
    assert versions["vit-digits-16px/1"]["image_size"] == 16
    assert versions["vit-digits-16px/1"]["metrics"]["val_images"] == 395


def test_mlflow_has_each_point_once_under_one_parent(journey: Path) -> None:
    """Read with MLflow's own client, in a process of its own since that reads its settings from there."""
    script = """
import json, sys
from pathlib import Path
from orchestrator.site import Site
import os
site = Site.load(Path(sys.argv[1])); os.environ.update(site.environment())
from mlflow.tracking import MlflowClient
client = MlflowClient()
runs = client.search_runs(["1"], max_results=1000)
study = [r for r in runs if r.data.tags.get("vitscale.stage") == "study"]
pretrain = [r for r in runs if r.data.tags.get("vitscale.stage") == "pretrain"][0]
loss = client.get_metric_history(pretrain.info.run_id, "loss")
journeys = [r for r in runs if r.data.tags.get("vitscale.stage") == "journey"]
print(json.dumps({
    "parents": sorted({r.data.tags["mlflow.parentRunId"] for r in study}),
    "rungs": len(study),
    "unfinished": [r.info.run_name for r in runs if r.info.status != "FINISHED"],
    "steps": [m.step for m in loss],
    "metrics": sorted(pretrain.data.metrics),
    "report": [f.path for f in client.list_artifacts(journeys[0].info.run_id)],
    "pretrain": [f.path for f in client.list_artifacts(pretrain.info.run_id)],
    "study": [f.path for f in client.list_artifacts(study[0].data.tags["mlflow.parentRunId"])],
}))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(journey / "site.yaml")],
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["rungs"] == 12 and len(seen["parents"]) == 1
    assert seen["unfinished"] == []
    assert len(seen["steps"]) == len(set(seen["steps"])) > 0
    assert {"loss", "accuracy", "images_per_second", "data_wait", "learning_rate", "val_accuracy"} <= set(
        seen["metrics"]
    )
    assert seen["report"] == ["report.html"]
    assert sorted(seen["pretrain"]) == ["confusion.json", "evaluation", "probes"]
    assert {"mfu", "val_accuracy_low", "attention_distance/block_00"} <= set(seen["metrics"])
    assert seen["study"] == ["plan.json", "points.parquet", "study.json"]


def test_a_killed_worker_costs_nothing(journey: Path) -> None:
    """SIGKILL of a training worker: the group starts again from the last commit, and the run completes."""
    site = ("--site", str(journey / "site.yaml"))
    settings = ("--set", "train.images=12000", "--set", "train.checkpoint_every_images=1000")
    command = [*VITSCALE, "train", "vit-digits", "--data", "s3://vitscale/digits", "--as", "killed"]
    process = subprocess.Popen(
        [*command, *settings, *site, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    run = wait_for(lambda: new_run(journey, at_least=3))
    workers = ray_processes(journey, "RayTrainWorker")
    assert len(workers) == 2
    workers[0].kill()
    output, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert json.loads(output)["run"] == run.name
    head = CommitLog(open_store(run.as_uri())).head()
    assert head is not None and head.complete and head.epoch >= 1


def test_the_lineage_of_the_champion_is_told(journey: Path) -> None:
    site = ("--site", str(journey / "site.yaml"))
    told = json.loads(vitscale("lineage", "vit-digits@champion", "--json", *site).stdout)
    assert told["tree"]["aliases"] == ["champion"]
    assert told["tree"]["data"] == "s3://vitscale/digits/train"
    children = {child["image_size"]: child["parent"] for child in told["tree"]["children"]}
    assert children == {16: "vit-digits/1", 8: "vit-digits/1"}
    assert [promotion["version"] for promotion in told["promotions"]] == [1]
    said = vitscale("lineage", "vit-digits@champion", *site).stdout
    assert "@champion" in said and "16 px" in said


def test_a_pipeline_that_is_killed_goes_on_and_is_seen_in_mlflow(journey: Path) -> None:
    site = ("--site", str(journey / "site.yaml"))
    file = journey / "pipeline.yaml"
    file.write_text(PIPELINE)
    process = subprocess.Popen(
        [*VITSCALE, "run", str(file), *site], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    runs = journey / "runs" / "runs"
    run = wait_for(lambda: next(runs.glob("vit-digits-12px-*"), None), seconds=300)
    process.kill()
    process.wait()
    done = vitscale("run", str(file), "--json", *site)
    assert done.returncode == 0, done.stderr
    stages = {stage["name"]: stage for stage in json.loads(done.stdout)["stages"]}
    assert [(stage["state"], stage["before"]) for stage in stages.values()] == 3 * [("done", False)]
    assert stages["child"]["runs"] == [run.name]
    assert heads(journey)[run.name][0] == 1  # one group has trained it
    assert stages["promoted"]["versions"] == ["vit-digits-12px/1"]
    again = json.loads(vitscale("run", str(file), "--json", *site).stdout)
    assert all(stage["before"] for stage in again["stages"])
    # The child is there, so there is nothing for a watch to do.
    watched = vitscale("watch", "vit-digits", "--image-size", "12", "--epochs", "0.5", "--once", *site)
    assert "has its children: vit-digits-12px/1" in watched.stdout, watched.stderr
    script = """
import json, os, sys
from pathlib import Path
from orchestrator.site import Site
site = Site.load(Path(sys.argv[1])); os.environ.update(site.environment())
from mlflow.tracking import MlflowClient
client = MlflowClient()
(run,) = client.search_runs(["1"], f"tags.`vitscale.run` = '{sys.argv[2]}'")
(child,) = client.search_runs(["1"], f"tags.`vitscale.run` = '{sys.argv[3]}'")
nested = child.data.tags["mlflow.parentRunId"] == run.info.run_id
print(json.dumps([run.info.status, run.data.tags, run.data.params, nested]))
"""
    arguments = [str(journey / "site.yaml"), again["mlflow_run"], run.name]
    seen = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=100
    )
    status, tags, params, nested = json.loads(seen.stdout)
    assert (status, nested) == ("FINISHED", True), seen.stderr
    assert (tags["stage.child.state"], tags["stage.promoted.version"]) == ("done", "vit-digits-12px/1")
    assert params["stages.child.finetune"] == "vit-digits@champion"


def test_an_evaluation_is_a_job_whose_result_is_kept(journey: Path) -> None:
    """Which a gate then asks for, of the version and of the one that holds the alias."""
    site = ("--site", str(journey / "site.yaml"))
    command = ("evaluate", "vit-digits@champion", "--json", *site)
    first = vitscale(*command)
    assert first.returncode == 0, first.stderr
    measured = json.loads(first.stdout)
    assert measured["model"] == "vit-digits/1" and measured["metrics"]["val_images"] == 395
    folder = journey / "runs" / "runs" / measured["run"] / "evaluations"
    assert sorted(path.suffix for path in folder.rglob("*") if path.is_file()) == [".json", ".parquet"]
    assert json.loads(vitscale(*command).stdout) == measured
    gate = journey / "gate.yaml"
    gate.write_text("checks: [{check: metric, minimum: 0.1}, {check: slices, worst: 1.0}, {check: lineage}]")
    asked = (
        "promote",
        "vit-digits",
        "1",
        "--to",
        "strict",
        "--gate",
        str(gate),
        "--dry-run",
        "--json",
        *site,
    )
    done = vitscale(*asked)
    assert done.returncode == 1, done.stderr
    rows = {row["check"]: row for row in json.loads(done.stdout)["rows"]}
    assert rows["metric"]["passed"] and rows["lineage"]["passed"] and not rows["slices"]["passed"]
    assert "logits are those recorded" in rows["restore"]["reason"]


def test_refusals_are_one_line_and_change_nothing(journey: Path) -> None:
    site = ("--site", str(journey / "site.yaml"))
    data = ("--data", "s3://vitscale/digits")
    before = heads(journey)
    for arguments, code, said in (
        (("promote", "vit-digits", "1", "--to", "best", "--minimum", "0.999"), 1, "below the gate's 0.999"),
        (("finetune", "vit-digits@best", "--image-size", "16"), 2, "no alias 'best'; its aliases: champion"),
        (("rollback", "vit-digits@champion"), 2, "is version 1, and none held it before"),
        (
            ("finetune", "vit-digits@champion", "--image-size", "17"),
            2,
            "not a multiple of model.patch_size 2",
        ),
        (
            ("train", "vit-digits", *data, "--set", "optim.lerning_rate=1"),
            2,
            "did you mean optim.learning_rate?",
        ),
        (("train", "vit-digits", *data, "--set", "train.global_batch_size=60"), 2, "multiple of data.lanes"),
        (("train", "vit-digits", "--data", "s3://vitscale/nothing"), 1, "is not indexed"),
        (("scale", "missing.yaml", *data), 2, "no file missing.yaml"),
    ):
        done = vitscale(*arguments, *site)
        assert done.returncode == code, (arguments, done.stderr)
        assert said in done.stderr and done.stderr.startswith("error: "), (arguments, done.stderr)
        assert "Traceback" not in done.stderr
    assert heads(journey) == before


def test_a_worker_s_own_error_reaches_the_terminal(journey: Path) -> None:
    """A shard that changed after it was indexed: found by a worker, told by the command, exit code 1."""
    site = ("--site", str(journey / "site.yaml"))
    root = journey / "hurt"
    assert vitscale("ingest", "digits", root.as_uri(), "--limit", "300", *site).returncode == 0
    shard = sorted((root / "train").glob("*.tar"))[0]
    data = bytearray(shard.read_bytes())
    data[600] ^= 1
    shard.write_bytes(data)
    done = vitscale("train", "vit-digits", "--data", root.as_uri(), *site)
    assert done.returncode == 1
    assert shard.name in done.stderr and "Traceback" not in done.stderr


def test_no_secret_is_in_any_log_database_object_or_command_line(journey: Path) -> None:
    """After all of the above, with what Ray's Jobs API answers; but for the files that are there for it."""
    site = Site.load(journey / "site.yaml")
    assert site.ray_token_file is not None and site.aws_credentials_file is not None
    token, credentials = site.ray_token_file.read_text(), configparser.ConfigParser()
    credentials.read(site.aws_credentials_file)
    key = credentials["default"]["aws_secret_access_key"]
    request = urllib.request.Request(f"{site.ray}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        (journey / "jobs.json").write_bytes(answer.read())
    assert "submission_id" in (journey / "jobs.json").read_text()
    assert "orchestrator.driver" in (journey / "ps.txt").read_text()
    kept = [*(journey / "s3").rglob("*.conf"), journey / "s3" / "keys.json"]
    keepers = {site.ray_token_file, site.aws_credentials_file, *kept}
    assert [path for path in keepers if path.stat().st_mode & 0o077] == []
    secrets = canary.ENVIRONMENT | {"Ray's token": token, "the store's key": key}
    assert canary.hits(secrets, [journey, ray_folder(journey)], but=keepers) == []


def new_run(journey: Path, at_least: int) -> Path | None:
    """The run that is under way with so many commits."""
    for run in (journey / "runs" / "runs").glob("*"):
        head = CommitLog(open_store(run.as_uri())).head()
        if head is not None and not head.complete and head.seq >= at_least:
            return run
    return None


def wait_for(look: Callable[[], Path | None], seconds: float = 120) -> Path:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = look()
        if found is not None:
            return found
        time.sleep(0.2)
    raise AssertionError(f"nothing after {seconds} s; {os.getloadavg()}")
