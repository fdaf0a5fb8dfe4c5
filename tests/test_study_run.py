"""`vitscale scale` on real services: its command is killed, and one of the rungs cannot be trained."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from orchestrator.site import Site
from orchestrator.tracking import Tracking
from workers.storage import open_store
from workers.training.commits import CommitLog

pytestmark = [pytest.mark.services, pytest.mark.timeout(900)]

STUDY = """\
name: tiny
base: vit-digits
vit_sizes: digits-xs
num_images: 100
images_seen: [2560, 5120]
schedule: constant
cooldown: 0.25
warmup: 0
evaluations: 4
learning_rate_factors: [1, 1.0e+30]
set: {compute.workers: 1, train.max_bad_steps: 1, train.probe_images: 0}
"""


def test_a_study_that_is_killed_goes_on_and_tells_what_failed(
    services: Site, tmp_path: Path, digits_url: str
) -> None:
    site, file = tmp_path / "site.yaml", tmp_path / "tiny.yaml"
    services.save(site)
    file.write_text(STUDY)
    command = [*(sys.executable, "-m", "pipelines.cli", "scale", str(file)), "--data", digits_url]
    command += ["--site", str(site), "--json"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, start_new_session=True, **quiet)
    runs = open_store(f"{services.runs}/runs")
    deadline = time.monotonic() + 400
    while not any("/commits/" in item.key for item in runs.list("")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.5)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()

    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 1, done.stderr
    assert "2 of 4 rungs failed; the same command tries them again" in done.stderr
    assert "tiny-vit-digits-xs-n100-d5120-lr1e30: optim.learning_rate: " in done.stderr
    assert "has no checkpoint at image 1,792" in done.stderr
    told = json.loads(done.stdout)
    states = {row["rung"].removeprefix("tiny-vit-digits-xs-n100-"): row["state"] for row in told["standings"]}
    assert [states["d2560-lr1"], states["d5120-lr1"]] == ["done", "done"]
    assert [row["images_seen"] for row in told["rungs"]] == [2560, 5120]
    trunk = next(row["run"] for row in told["standings"] if row["rung"].endswith("d5120-lr1"))
    log = CommitLog(open_store(f"{services.runs}/runs/{trunk}"))
    assert log.newest_epoch() == 0, "what went on without its command was trained again"

    table = pq.read_table(
        io.BytesIO(open_store(services.runs).read(f"studies/{told['study']}/points.parquet"))
    )
    ends = [row for row in table.to_pylist() if row["end"]]
    assert [(row["images_seen"], row["forked_at"], row["unique_images"]) for row in ends] == [
        (2560, 1792, 100),
        (5120, None, 100),
    ]
    assert all(row["error_low"] < row["error"] < row["error_high"] for row in ends)
    assert all(row["device_seconds"] > 0 for row in ends)
    check_mlflow(services, told["study"], trunk)

    again = subprocess.run([*command, "--status"], capture_output=True, text=True, timeout=100)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["study"] == told["study"]
    by_name = ["report" if word == "scale" else "tiny" if word == str(file) else word for word in command]
    check_report(by_name, told["study"], tmp_path / "by-name")
    # As it is until `scale` ends.
    open_store(services.runs).delete(f"studies/{told['study']}/points.parquet")
    by_file = ["report" if word == "scale" else word for word in command]
    check_report(by_file, told["study"], tmp_path / "by-file")


def check_report(words: list[str], study: str, folder: Path) -> None:
    shown = subprocess.run([*words, "--out", str(folder)], capture_output=True, text=True, timeout=100)
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["study"] == study
    assert "What the ViTs learned" in (folder / "report.html").read_text()
    assert {"points.csv", "scaling-vit.svg", "attention-depth.svg"} <= {
        path.name for path in folder.iterdir()
    }


def check_mlflow(services: Site, study: str, trunk: str) -> None:
    tracking = Tracking(services.mlflow, "vitscale")
    parent, child = tracking.find_run(study), tracking.find_run(trunk)
    assert parent and child
    found = tracking.client.get_run(child).data
    assert found.tags["mlflow.parentRunId"] == parent
    assert found.params["study.parameters"] and found.params["study.unique_images"] == "100"
    assert {"val_error_low", "val_error_high", "device_seconds"} <= found.metrics.keys()
    assert {item.path for item in tracking.client.list_artifacts(parent)} >= {"points.parquet", "study.json"}
    assert tracking.client.get_run(parent).info.status == "FAILED"
