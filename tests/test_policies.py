"""Rights in the object store: what each role asks of it, by real requests, and what no policy allows."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from moto.iam.policy_validation import IAMPolicyDocumentValidator

from orchestrator.job import JobSpec, run_url, write_spec
from orchestrator.job_records import clear_reports, wish, write_done, write_note, write_stop
from orchestrator.judgements import Judgements
from orchestrator.place import Place
from orchestrator.promotions import PromotionLog
from orchestrator.queue import Quota
from orchestrator.queue_records import read_quotas, write_quotas
from orchestrator.retention import Retention
from pipelines.pipeline.records import StageRecords
from pipelines.scaling.record import study_url
from tests.policies import FOLDER, allows, read
from tests.runs import CPU, tiny_config
from tests.s3_server import ENVIRONMENT, s3_server
from tests.test_keys import record
from tests.test_queue import make_entry
from workers.s3_client import S3Client, s3_client
from workers.storage import ensure_bucket, open_store, probe
from workers.training import loop

RUNS = "s3://example-training"
POLICIES = sorted(path.stem for path in FOLDER.glob("*.json") if path.stem != "lifecycle")
ROLES = [name for name in POLICIES if name != "bucket-of-runs"]
Requests = list[tuple[str, dict[str, Any]]]


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Iterator[Requests]:
    """What is asked of a real server that holds the runs, in order."""
    asked: Requests = []

    def recorded(method):
        def ask(client: S3Client, operation: str, where: str, **arguments: Any) -> Any:
            if operation in ("head_bucket", "create_bucket"):
                return method(client, operation, where, **arguments)
            asked.append((operation, arguments))
            return method(client, operation, where, **arguments)

        return ask

    monkeypatch.setattr(S3Client, "read", recorded(S3Client.read))
    monkeypatch.setattr(S3Client, "write", recorded(S3Client.write))
    with s3_server() as endpoint:
        for name, value in (ENVIRONMENT | {"AWS_ENDPOINT_URL_S3": endpoint}).items():
            monkeypatch.setenv(name, value)
        s3_client.cache_clear()
        ensure_bucket(RUNS)
        yield asked
    s3_client.cache_clear()


def refused(role: str, requests: Requests) -> list[str]:
    return sorted({f"{name} {of.get('Key')}" for name, of in requests if not allows(role, name, of)})


def written(requests: Requests) -> list[tuple[str, dict[str, Any]]]:
    return [(name, of) for name, of in requests if name in ("put_object", "complete_multipart_upload")]


def test_a_run_needs_what_its_role_has_and_its_history_is_nobody_s_to_replace(
    requests: Requests, digits_url: str
) -> None:
    """One request after another of a job, a supervisor, a promoter and a collector, on a real store."""
    store = open_store(RUNS)
    config = tiny_config(digits_url, steps=8)
    spec = JobSpec(configs=(config,), runs=RUNS, mlflow="http://mlflow", experiment="x")
    write_spec(spec)
    wish(store, spec.digest, running=True)
    assert refused("submitter", requests) == []
    assert refused("trainer", requests) == []

    requests.clear()
    assert probe(store) is None
    loop.train(config, run_url(RUNS, config), CPU)
    write_note(store, "job-0", "going on")
    write_done(store, spec.digest)
    assert refused("trainer", requests) == []
    assert refused("submitter", requests) == []
    assert refused("reader-of-data", written(requests))
    once = [of["Key"] for _, of in written(requests) if "IfNoneMatch" in of]
    assert {key.split("/")[2] for key in once if key.startswith("runs/")} >= {"leases", "events", "commits"}
    assert any(key.endswith("/MANIFEST.json") for key in once)
    for key in once:
        if not key.startswith(("probe/", "jobs/")):
            for role in ROLES:
                assert not allows(role, "put_object", {"Bucket": "example-training", "Key": key}), (role, key)

    requests.clear()
    write_stop(store, "job-0", "enough")
    clear_reports(store, "job-0")
    wish(store, spec.digest, running=True)
    assert refused("supervisor", requests) == []

    requests.clear()
    with Place(RUNS, make_entry("a" * 64)) as place:
        assert place.take(1, None)
    assert [name for name, _ in requests if name in ("put_object", "delete_object")][-1] == "delete_object"
    assert refused("trainer", requests) == []
    assert refused("submitter", requests) == []

    requests.clear()
    write_quotas(store, read_quotas(store) | {"vision": Quota(gpus=8)})
    assert refused("quotas", requests) == []
    for role in set(ROLES) - {"quotas"}:
        assert refused(role, written(requests)), role

    requests.clear()
    StageRecords(store, "birds").find("a" * 64)
    open_store(study_url(RUNS, "sizes")).write("points.parquet", b"")
    open_store(study_url(RUNS, "sizes")).create("study.json", b"{}")
    assert refused("submitter", requests) == []

    requests.clear()
    PromotionLog(store).append(record(0))
    Judgements(store).note("0" * 64, "toy", "toy-1", 1, "d" * 64)
    assert refused("promoter", requests) == []
    for role in set(ROLES) - {"promoter"}:
        assert refused(role, written(requests)), role

    requests.clear()
    retention = Retention(RUNS, needed=[], keep=1, older_than=-60)
    garbage = list(retention.garbage())
    for item in garbage:
        retention.delete(item)
    list(retention.uploads())
    assert [item.reason for item in garbage] == ["old"]
    assert refused("retention", requests) == []
    deletions = [(name, of) for name, of in requests if name == "delete_object"]
    assert len(deletions) >= 4
    for role in set(ROLES) - {"retention"}:
        assert len(refused(role, deletions)) == len(deletions), role


@pytest.mark.parametrize("role", ROLES)
def test_no_role_can_delete_history_or_change_the_bucket(role: str) -> None:
    commit = {"Bucket": "example-training", "Key": "runs/a/commits/00000000.json"}
    assert not allows(role, "delete_object", commit)
    assert not allows(
        role, "delete_object", {"Bucket": "example-training", "Key": "promotions/m/00000000.json"}
    )
    for statement in read(role):
        assert statement["Effect"] == "Allow"
        assert not [action for action in statement["Action"] if "*" in action]
        assert all(resource.startswith("arn:aws:s3:::example-") for resource in statement["Resource"])
        assert not [a for a in statement["Action"] if "Policy" in a or "Lifecycle" in a or "Version" in a]


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_is_of_aws_s_grammar(name: str) -> None:
    document = json.loads((FOLDER / f"{name}.json").read_text())
    for statement in document["Statement"]:
        # Of a bucket's policy alone; the validator is of those of identities.
        assert statement.pop("Principal", None) == ("*" if name == "bucket-of-runs" else None)
    IAMPolicyDocumentValidator(json.dumps(document)).validate()


def test_the_lifecycle_expires_nothing() -> None:
    (rule,) = json.loads((FOLDER / "lifecycle.json").read_text())["Rules"]
    assert rule.keys() == {"ID", "Status", "Filter", "AbortIncompleteMultipartUpload"}


def test_who_collects_may_delete_logs_and_no_other_record_of_a_job() -> None:
    of = {"Bucket": "example-training", "Key": "jobs/0123456789abcdef-0.log/1700000000000/000000000000"}
    assert allows("retention", "delete_object", of)
    assert not allows("retention", "delete_object", of | {"Key": f"jobs/{'0' * 64}.wish.json"})
