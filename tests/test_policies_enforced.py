"""The policies of infra/policies/, enforced by stores that ask who calls: a user for each role.

What depends on a header (`s3:if-none-match`) is left to test_policies.py: neither store here knows that.
"""

import contextlib
import json
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError

from tests.benchmarks import rgw
from tests.policies import ACTIONS, allows, read
from tests.s3_server import ENVIRONMENT, s3_server
from tests.test_policies import ROLES

MAKER = "maker"
"""Whose the buckets are."""
KEYS = {
    "example-datasets": ["digits/train-000.tar", "digits/_vitscale/index.parquet"],
    "example-mlflow": ["1/artifacts/page.html"],
    "example-training": [
        "runs/a/commits/00000000.json",
        "runs/a/leases/000000.json",
        "runs/a/events/000000-000000.jsonl",
        "runs/a/control/stop",
        "runs/a/checkpoints/000000000001-000000/MANIFEST.json",
        "runs/a/checkpoints/000000000001-000000/model-00000-of-00001.safetensors",
        "runs/a/evaluations/x.json",
        "promotions/toy/00000000.json",
        "judgements/x/toy/1",
        "jobs/0123456789abcdef.wish.json",
        "jobs/0123456789abcdef-0.log/1700000000000/000000000000",
        "queue/entries/x.json",
        "queue/quotas.json",
        "pipelines/birds/x.json",
        "studies/sizes/study.json",
        "selftest/x",
        "probe/x",
        "elsewhere",
    ],
}
BUCKET_CALLS = ("list_objects_v2", "list_multipart_uploads")
Clients = Callable[[str], object]
"""A client with the keys of a role, or of the maker."""


@contextlib.contextmanager
def moto(tmp_path: Path) -> Iterator[Clients]:
    """It asks for signatures, and what identities may, once it is told to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INITIAL_NO_AUTH_ACTION_COUNT", "1000000")
        with s3_server() as endpoint:
            keys = (ENVIRONMENT["AWS_ACCESS_KEY_ID"], ENVIRONMENT["AWS_SECRET_ACCESS_KEY"])
            iam = client("iam", endpoint, *keys)
            found = {}
            for user in (*ROLES, MAKER):
                iam.create_user(UserName=user)
                iam.put_user_policy(UserName=user, PolicyName="own", PolicyDocument=document(user))
                key = iam.create_access_key(UserName=user)["AccessKey"]
                found[user] = key["AccessKeyId"], key["SecretAccessKey"]
            request = urllib.request.Request(
                f"{endpoint}/moto-api/reset-auth", b"0", {"Content-Type": "text/plain"}
            )
            urllib.request.urlopen(request, timeout=60).close()
            yield lambda role: client("s3", endpoint, *found[role])


@contextlib.contextmanager
def ceph(tmp_path: Path) -> Iterator[Clients]:
    try:
        rgw.check()
    except rgw.CannotStart as error:
        pytest.skip(str(error))
    with rgw.running(tmp_path / "rgw") as server:
        found = {role: server.add_user(role) for role in ROLES}
        found[MAKER] = server.add_user(MAKER, "--caps=user-policy=*")
        iam = client("iam", server.endpoint, *found[MAKER])
        for role in ROLES:
            iam.put_user_policy(UserName=role, PolicyName="own", PolicyDocument=document(role))
        yield lambda role: client("s3", server.endpoint, *found[role])


def client(service: str, endpoint: str, access_key: str, secret_key: str):
    return boto3.Session().client(
        service,
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id=access_key,
        aws_secret_access_key=secret_key,
        config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}),
    )


def document(user: str) -> str:
    """A role's policy without its conditions."""
    everything = [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]
    statements = everything if user == MAKER else read(user)
    bare = [{name: value for name, value in one.items() if name != "Condition"} for one in statements]
    return json.dumps({"Version": "2012-10-17", "Statement": bare})


def may(caller, operation: str, bucket: str, key: str = "") -> bool:
    arguments = {"Bucket": bucket} | ({"Key": key} if key else {})
    body = {"Body": b"new"} if operation == "put_object" else {}
    try:
        done = getattr(caller, operation)(**arguments, **body)
    except ClientError as error:
        code = error.response["ResponseMetadata"]["HTTPStatusCode"]
        assert code in (403, 404), error
        return code == 404
    if operation == "create_multipart_upload":
        with contextlib.suppress(ClientError):
            caller.abort_multipart_upload(**arguments, UploadId=done["UploadId"])
    return True


@pytest.mark.parametrize("store", [moto, pytest.param(ceph, marks=pytest.mark.services)])
@pytest.mark.timeout(600)
def test_each_role_may_exactly_what_its_policy_says(
    store: Callable[[Path], AbstractContextManager[Clients]], tmp_path: Path
) -> None:
    with store(tmp_path) as clients:
        maker = clients(MAKER)
        for bucket in KEYS:
            maker.create_bucket(Bucket=bucket)
        found: dict[tuple[str, str, str], bool] = {}
        for role in ROLES:
            caller = clients(role)
            for bucket, keys in KEYS.items():
                for key in keys:
                    maker.put_object(Bucket=bucket, Key=key, Body=b"old")
                    for operation in ("get_object", "put_object", "create_multipart_upload", "delete_object"):
                        found[role, operation, f"{bucket}/{key}"] = may(caller, operation, bucket, key)
                for operation in BUCKET_CALLS:
                    found[role, operation, f"{bucket}/"] = may(caller, operation, bucket)
        assert found == {asked: expected(*asked) for asked in found}
    promises(found)


def expected(role: str, operation: str, path: str) -> bool:
    """By our own reading of the policies, on which test_policies.py builds."""
    bucket, _, key = path.partition("/")
    arguments = {"Bucket": bucket} | ({"Key": key} if key else {})
    creates = {"IfNoneMatch": "*"} if ACTIONS[operation] == "s3:PutObject" else {}
    return allows(role, operation, arguments | creates)


def promises(found: dict[tuple[str, str, str], bool]) -> None:
    """What SECURITY.md says, should both readings be wrong in the same way."""
    history = [
        f"example-training/{key}" for key in KEYS["example-training"] if key.startswith(("runs/", "prom"))
    ]
    who = {
        path: {
            operation: {role for role in ROLES if found[role, operation, path]}
            for operation in ("put_object", "delete_object")
        }
        for path in history
    }
    for path, roles in who.items():
        checkpoint = "/checkpoints/" in path or "/evaluations/" in path
        assert roles["delete_object"] == ({"retention"} if checkpoint else set()), path
        writers = {"promoter"} if "/promotions/" in path else {"trainer", "submitter"}
        assert roles["put_object"] == writers, path
    assert not any(
        may
        for (role, operation, _), may in found.items()
        if role == "reader-of-data"
        and operation in ("put_object", "delete_object", "create_multipart_upload")
    )
