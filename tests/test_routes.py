"""Every route of every service, asked without a credential, with a wrong one, with the right one; by a page
in a browser of this machine."""

import contextlib
import hashlib
import http.client
import json
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import boto3
import pytest
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import ClientError

from orchestrator.processes import State
from orchestrator.site import Site
from tests.chaos.tracking import BASIC_AUTH, Mlflow, basic_auth
from tests.routes import WITH_BODY, Route, answer, answers, basic, bearer, routes_of
from workers.storage import open_store

pytestmark = [pytest.mark.services, pytest.mark.timeout(600)]

RAY_PUBLIC = {("GET", "/api/gcs_healthz"), ("GET", "/api/healthz"), ("GET", "/api/local_raylet_healthz")}
"""Whether it is well; and the page that asks for the token, which is no route of a table."""
RAY_SLOW = ("profile", "traceback", "delay", "/test/dump")
MLFLOW_PUBLIC = {
    ("GET", "/health"),
    ("GET", "/version"),
    ("GET", "/api/3.0/mlflow/server-info"),
    ("GET", "/ajax-api/3.0/mlflow/server-info"),
    ("GET", "/static-files/1"),
}
USER, PASSWORD = "admin", "a-password-of-this-test"
OTHER, OTHERS_PASSWORD = "somebody", "another-password-of-this-test"
PAGES = {
    "foreign": {"Origin": "http://page.example", "Referer": "http://page.example/x"},
    "hidden": {"Origin": "null"},
    "navigation": {"Referer": "http://page.example/x", "Sec-Fetch-Site": "cross-site"},
}
"""What browsers tell of a page: its origin with all requests but GET and HEAD, whatever the page does."""
REBOUND = "page.example"
"""A page's own host, whose name means 127.0.0.1 by now: requests are of one origin then, and name none."""


def test_every_route_of_ray_wants_the_token(services: Site) -> None:
    assert services.ray_token_file is not None
    token = services.ray_token_file.read_text().strip()
    state = State.load(services.ray_token_file.parent).services["ray"]
    agent = f"http://127.0.0.1:{state.ports['agent']}"
    for base, routes in ((services.ray, routes_of("ray")), (agent, routes_of("ray-agent"))):
        private = [route for route in routes if route not in RAY_PUBLIC]
        assert ("POST", "/api/jobs/") in private or ("POST", "/api/job_agent/jobs/") in private
        assert set(answers(base, private).values()) == {401}
        assert set(answers(base, private, bearer("0" * 64)).values()) == {403}
        harmless = [
            (method, path)
            for method, path in private
            if method == "GET" and not any(word in path for word in RAY_SLOW)
        ]
        assert not {401, 403} & set(answers(base, harmless, bearer(token)).values())
    assert answer(services.ray, "GET", "/api/jobs/", bearer(token)) == 200


def test_ray_lets_nobody_join_without_the_token(services: Site, tmp_path: Path) -> None:
    """Past the dashboard: the port at which nodes and drivers ask."""
    assert services.ray_token_file is not None
    token = services.ray_token_file.read_text().strip()
    state = State.load(services.ray_token_file.parent).services["ray"]
    code = (
        "import sys; from ray._raylet import GcsClient\n"
        "print('let in', len(GcsClient(address=sys.argv[1]).internal_kv_keys(b'', None, 60)))"
    )

    def asked(**environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code, f"127.0.0.1:{state.ports['gcs']}"],
            env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), **environment},
            capture_output=True,
            text=True,
            timeout=120,
        )

    for stranger in (
        asked(RAY_AUTH_MODE="disabled"),
        asked(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 64),
    ):
        assert stranger.returncode != 0 and "let in" not in stranger.stdout
        assert "AuthenticationError" in stranger.stderr
    assert "let in" in asked(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token).stdout


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """With basic-auth; its address and environment."""
    folder = tmp_path_factory.mktemp("mlflow-with-passwords")
    environment = basic_auth(folder, USER, PASSWORD)
    server = Mlflow(folder / "mlflow", *BASIC_AUTH, environment=environment)
    server.start()
    yield server.uri, environment
    server.kill()


@pytest.fixture(scope="module")
def mlflow_routes(mlflow: tuple[str, dict[str, str]]) -> list[Route]:
    return routes_of("mlflow", mlflow[1])


def test_every_route_of_mlflow_wants_the_password(
    mlflow: tuple[str, dict[str, str]], mlflow_routes: list[Route]
) -> None:
    uri, _ = mlflow
    private = [route for route in mlflow_routes if route not in MLFLOW_PUBLIC]
    assert len(private) > 200 and ("POST", "/api/2.0/mlflow/runs/create") in private
    assert set(answers(uri, private).values()) == {401}
    assert set(answers(uri, private, basic("nobody", "wrong")).values()) == {401}
    assert answer(uri, *private[0], basic(USER, "wrong")) == 401
    assert answer(uri, "GET", "/api/2.0/mlflow/experiments/get?experiment_id=0", basic(USER, PASSWORD)) == 200


def test_a_user_of_mlflow_without_rights_reads_and_changes_nothing(
    mlflow: tuple[str, dict[str, str]],
) -> None:
    uri, _ = mlflow
    host = urlsplit(uri)
    admin, other = basic(USER, PASSWORD), basic(OTHER, OTHERS_PASSWORD)

    def call(who: dict[str, str], method: str, path: str, **body: object) -> tuple[int, dict]:
        headers = {"Content-Type": "application/json", **who}
        connection = http.client.HTTPConnection(host.hostname or "", host.port, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, f"/api/2.0/mlflow/{path}", json.dumps(body) if body else None, headers)
            reply = connection.getresponse()
            data = reply.read()
        return reply.status, json.loads(data) if data.startswith(b"{") else {}

    assert call(admin, "POST", "users/create", username=OTHER, password=OTHERS_PASSWORD)[0] == 200
    experiment = call(admin, "POST", "experiments/create", name="private")[1]["experiment_id"]
    run = call(admin, "POST", "runs/create", experiment_id=experiment)[1]["run"]["info"]["run_id"]
    assert call(admin, "POST", "registered-models/create", name="toy")[0] == 200
    forbidden = [
        ("GET", f"experiments/get?experiment_id={experiment}", {}),
        ("GET", f"runs/get?run_id={run}", {}),
        ("POST", "runs/log-metric", {"run_id": run, "key": "val_accuracy", "value": 1.0, "timestamp": 1}),
        ("POST", "runs/delete", {"run_id": run}),
        ("GET", "registered-models/get?name=toy", {}),
        ("POST", "registered-models/alias", {"name": "toy", "alias": "champion", "version": "1"}),
        ("DELETE", "registered-models/delete", {"name": "toy"}),
        ("PATCH", "users/update-admin", {"username": OTHER, "is_admin": True}),
    ]
    for method, path, body in forbidden:
        assert call(other, method, path, **body)[0] == 403, path
    assert call(other, "GET", "users/get?username=" + OTHER)[0] == 200


def test_every_call_of_the_object_store_wants_the_key(services: Site) -> None:
    open_store(f"{services.data}/routes").write("kept", b"kept")
    bucket = urlsplit(services.data).netloc
    keys = {"aws_access_key_id": "vitscale", "aws_secret_access_key": "0" * 40}
    strangers = [
        boto3.Session().client(
            "s3", endpoint_url=services.s3_endpoint, region_name="us-east-1", config=config, **given
        )
        for config, given in (
            (Config(signature_version=UNSIGNED), {}),
            (Config(signature_version="s3v4"), keys),
        )
    ]
    at = {"Bucket": bucket, "Key": "routes/kept"}
    calls = [
        ("list_buckets", {}),
        ("create_bucket", {"Bucket": "routes-of-a-stranger"}),
        ("delete_bucket", {"Bucket": bucket}),
        ("list_objects_v2", {"Bucket": bucket}),
        ("list_multipart_uploads", {"Bucket": bucket}),
        ("get_object", at),
        ("head_object", at),
        ("put_object", {**at, "Body": b"changed"}),
        ("put_object", {"Bucket": bucket, "Key": "routes/new", "Body": b"new"}),
        ("copy_object", {**at, "CopySource": at}),
        ("create_multipart_upload", at),
        ("delete_object", at),
        ("delete_objects", {"Bucket": bucket, "Delete": {"Objects": [{"Key": at["Key"]}]}}),
    ]
    for client in strangers:
        for name, arguments in calls:
            with pytest.raises(ClientError) as refused:
                getattr(client, name)(**arguments)
            code = refused.value.response["ResponseMetadata"]["HTTPStatusCode"]
            # Without a signature Swift takes it for a call of its own interface: nothing is at such a path.
            assert code in ((403,) if client is strangers[1] else (400, 401, 403, 404, 405, 412)), (
                name,
                code,
            )
    store = open_store(f"{services.data}/routes")
    assert [item.key for item in store.list()] == ["kept"] and store.read("kept") == b"kept"


def test_a_page_changes_nothing_in_mlflow(services: Site, mlflow_routes: list[Route]) -> None:
    database = services.ray_token_file.parent / "mlflow" / "mlflow.db"

    def content() -> str:
        with contextlib.closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as connection:
            return hashlib.sha256("\n".join(connection.iterdump()).encode()).hexdigest()

    before = content()
    asked = [route for route in mlflow_routes if route[0] != "GET"]
    read = [route for route in mlflow_routes if route[0] == "GET"]
    for page in ("foreign", "hidden"):
        # GraphQL has no mutations but searches.
        codes = answers(services.mlflow, asked, PAGES[page])
        assert {route: code for route, code in codes.items() if code != 403}.keys() <= {("POST", "/graphql")}
    answers(services.mlflow, read, PAGES["foreign"])
    answers(services.mlflow, read, PAGES["navigation"])
    codes = answers(services.mlflow, mlflow_routes, {"Host": f"{REBOUND}:{urlsplit(services.mlflow).port}"})
    public = {route for route, code in codes.items() if code != 403}
    assert public == {("GET", "/health"), ("GET", "/version")}
    assert content() == before

    create = ("POST", "/api/2.0/mlflow/experiments/create")
    for page, code in ((PAGES["foreign"], 403), (PAGES["hidden"], 403), ({"Host": REBOUND}, 403), ({}, 200)):
        assert asked_with(services.mlflow, *create, page, {"name": "of a page"})[0] == code
        assert (content() == before) == (code == 403)
    search = ("POST", "/api/2.0/mlflow/experiments/search")
    for method, path in (
        search,
        ("OPTIONS", search[1]),
        ("GET", "/api/2.0/mlflow/experiments/get?experiment_id=0"),
    ):
        headers = PAGES["foreign"] | {"Access-Control-Request-Method": "POST"}
        assert "access-control-allow-origin" not in asked_with(services.mlflow, method, path, headers)[1]


def test_a_page_changes_nothing_in_ray_even_with_the_token_in_a_cookie(services: Site) -> None:
    assert services.ray_token_file is not None
    token = services.ray_token_file.read_text().strip()
    state = State.load(services.ray_token_file.parent).services["ray"]
    agent = f"http://127.0.0.1:{state.ports['agent']}"
    jobs = asked_with(services.ray, "GET", "/api/jobs/", bearer(token))[2]
    cookie = {"Cookie": f"ray-authentication-token={token}"}
    for base, name, refusal in ((services.ray, "ray", 405), (agent, "ray-agent", 403)):
        private = [route for route in routes_of(name) if route not in RAY_PUBLIC]
        changing = [route for route in private if route[0] in WITH_BODY]
        for page in (*PAGES.values(), {"Host": f"{REBOUND}:{urlsplit(base).port}"}):
            assert set(answers(base, private, page).values()) == {401}
        for page in PAGES.values():
            assert set(answers(base, changing, page | cookie).values()) == {refusal}
    assert answer(services.ray, "POST", "/api/authenticate", PAGES["foreign"] | bearer("0" * 64)) == 403
    assert asked_with(services.ray, "GET", "/api/jobs/", bearer(token))[2] == jobs


def test_a_page_changes_nothing_in_the_object_store_nor_behind_it(services: Site) -> None:
    """Account, container and object server ask for no key."""
    open_store(f"{services.data}/pages").write("kept", b"kept")
    folder = services.ray_token_file.parent
    ports = State.load(folder).services["object-store"].ports
    devices = folder / "s3" / "devices"

    def objects() -> set[Path]:
        return set(devices.rglob("*.data"))

    before = objects()
    stored = {"X-Timestamp": "1700000000.00000", "Content-Type": "text/plain"}
    inside, outside = "/d1/0/AUTH_vitscale/pages/new", f"/{urlsplit(services.data).netloc}/pages/kept"
    for name, port in ports.items():
        base, path = f"http://127.0.0.1:{port}", outside if name == "s3" else inside
        for page in (PAGES["foreign"], PAGES["hidden"], {"Host": f"{REBOUND}:{port}"}):
            for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS"):
                code, headers, _ = asked_with(base, method, path, page | stored)
                assert code == 403 and "access-control-allow-origin" not in headers, (name, method, page)
    assert objects() == before and open_store(f"{services.data}/pages").read("kept") == b"kept"
    # Without them it would have been done.
    assert asked_with(f"http://127.0.0.1:{ports['object']}", "PUT", inside, stored)[0] == 201
    assert objects() != before


def asked_with(
    base: str, method: str, path: str, headers: dict[str, str], body: dict[str, object] | None = None
) -> tuple[int, dict[str, str], bytes]:
    """Code, headers by their small names, and content of an answer."""
    host = urlsplit(base)
    connection = http.client.HTTPConnection(host.hostname or "", host.port, timeout=60)
    with contextlib.closing(connection):
        data = b"" if method == "GET" else json.dumps(body or {}).encode() * (body is not None)
        connection.request(method, path, data, {"Content-Type": "application/json"} | headers)
        reply = connection.getresponse()
        content = reply.read()
    return reply.status, {name.lower(): value for name, value in reply.getheaders()}, content
