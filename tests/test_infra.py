"""infra/: every file by its schema, then by our rules. None of it was started: there is neither a cluster nor
a Docker engine.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import ray.autoscaler
import yaml
from jsonschema import Draft7Validator, Draft202012Validator
from referencing import Registry, Resource
from typer.main import get_command

from orchestrator.site import Site
from pipelines.cli import app
from tests.kuberay import KINDS
from tests.kustomize import containers, render
from workers.code_digests import IMAGE_VARIABLE
from workers.training.gauges import GAUGES

ROOT = Path(__file__).parent.parent
INFRA = ROOT / "infra"
KUBERNETES = "1.37.0"
OVERLAYS = ["dev", "prod"]
DIGEST = re.compile(r"@sha256:[0-9a-f]{64}$")
PLACEHOLDERS = {"vitscale", "vitscale-cuda", "postgres", "rclone", "versitygw", "nginx"}
"""Images of the base, which an overlay has to set."""
SECRET = re.compile(r"password|secret|token|access.?key|credential|passwd|private", re.IGNORECASE)


def package(name: str) -> Path:
    """Of schemas: read, not imported."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


@cache
def kubernetes_schemas() -> tuple[Path, Registry]:
    folder = package("kubernetes_validate") / "kubernetes-json-schema" / f"v{KUBERNETES}-local-strict"
    definitions = Resource.from_contents(json.loads((folder / "_definitions.json").read_text()))
    return folder, Registry().with_resource("/api/_definitions.json", definitions)


@cache
def validator(kind: str, version: str) -> Draft202012Validator:
    """Of unknown fields, too."""
    folder, registry = kubernetes_schemas()
    schema = KINDS.get(kind)
    if schema is None:
        group = re.sub(r"(\.[^/]*)?/", "-", version)
        schema = json.loads((folder / f"{kind.lower()}-{group}.json").read_text())
    return Draft202012Validator(schema, registry=registry)


@cache
def problems(text: str) -> list[str]:
    """Of an object as JSON; most are in both overlays."""
    item = json.loads(text)
    found = validator(item["kind"], item["apiVersion"]).iter_errors(item)
    return [f"{error.json_path}: {error.message}" for error in found]


def check_object(item: dict[str, Any]) -> None:
    assert problems(json.dumps(item)) == []


@cache
def rendered(overlay: str) -> list[dict[str, Any]]:
    return render(INFRA / "kubernetes" / "overlays" / overlay)


def every_object() -> list[dict[str, Any]]:
    jobs = [yaml.safe_load(path.read_text()) for path in (INFRA / "kubernetes" / "jobs").glob("*.yaml")]
    return [*rendered("dev"), *rendered("prod"), *jobs]


def pods(node: Any) -> Iterator[dict[str, Any]]:
    """Specifications of pods, wherever they are in an object."""
    if isinstance(node, dict):
        if "containers" in node:
            yield node
        for value in node.values():
            yield from pods(value)
    elif isinstance(node, list):
        for value in node:
            yield from pods(value)


ALL_PODS = [(item["metadata"]["name"], pod) for item in every_object() for pod in pods(item)]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_each_object_is_one_that_kubernetes_and_kuberay_take(overlay: str) -> None:
    objects = rendered(overlay)
    for item in objects:
        check_object(item)
    kinds = {item["kind"] for item in objects}
    assert kinds >= {"RayCluster", "Deployment", "StatefulSet", "CronJob", "NetworkPolicy", "Namespace"}
    names = [(item["kind"], item["metadata"]["name"]) for item in objects]
    assert len(names) == len(set(names))


def test_a_job_is_one_that_kuberay_takes() -> None:
    for path in (INFRA / "kubernetes" / "jobs").glob("*.yaml"):
        check_object(yaml.safe_load(path.read_text()))


def test_a_schema_refuses_what_is_misspelt_wherever_it_is() -> None:
    policy = {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "a"}}
    assert problems(json.dumps(policy | {"spec": {"podSelecter": {}}}))
    pod = {"spec": {"containers": [{"name": "a", "imagePullPolice": "Never"}]}}
    cluster = {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": {"name": "a"}}
    for spec in ({"headGroupSpec": {"template": pod}}, {"headGroupSpec": {"template": {}}, "authOption": {}}):
        (problem,) = problems(json.dumps(cluster | {"spec": spec}))
        assert "imagePullPolice" in problem or "authOption" in problem


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kustomize_renders_the_same(overlay: str) -> None:
    command = ["kubectl", "kustomize", str(INFRA / "kubernetes" / "overlays" / overlay)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr

    def sort(objects: Any) -> list[dict[str, Any]]:
        return sorted(objects, key=lambda item: (item["kind"], item["metadata"]["name"]))

    assert sort(yaml.safe_load_all(done.stdout)) == sort(rendered(overlay))


@pytest.mark.parametrize(("name", "pod"), ALL_PODS, ids=[name for name, _ in ALL_PODS])
def test_a_pod_is_restricted(name: str, pod: dict[str, Any]) -> None:
    """Kubernetes' own profile `restricted`, and more."""
    context = pod["securityContext"]
    assert context["runAsNonRoot"] is True and context["runAsUser"] == context["runAsGroup"] == 10001
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod.keys().isdisjoint({"hostNetwork", "hostPID", "hostIPC", "hostAliases"})
    assert all("hostPath" not in volume for volume in pod["volumes"])
    # Only Ray's autoscaler talks to Kubernetes.
    assert pod["automountServiceAccountToken"] is (pod.get("serviceAccountName") == "ray-head")
    mounted = set()
    for container in containers({"spec": pod}):
        security = container["securityContext"]
        assert security["allowPrivilegeEscalation"] is False and security["readOnlyRootFilesystem"] is True
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert "privileged" not in security and "runAsUser" not in security
        assert all("hostPort" not in port for port in container.get("ports", []))
        resources = container["resources"]
        assert resources["requests"].keys() >= {"cpu", "memory"}
        assert resources["requests"]["memory"] == resources["limits"]["memory"]
        assert DIGEST.search(container["image"]), container["image"]
        mounted |= {mount["name"] for mount in container["volumeMounts"]}
    assert {volume["name"] for volume in pod["volumes"]} | {"data"} >= mounted
    assert {volume["name"] for volume in pod["volumes"]} <= mounted


def test_the_base_names_images_that_an_overlay_sets() -> None:
    images = {c["image"] for item in render(INFRA / "kubernetes" / "base") for c in containers(item)}
    images |= {c["image"] for item in render(INFRA / "kubernetes" / "object-store") for c in containers(item)}
    assert images == PLACEHOLDERS


def test_no_secret_is_written_down() -> None:
    """Neither as an object nor as the value of a variable."""
    for item in every_object():
        assert item["kind"] != "Secret"
        for container in containers(item):
            for variable in container.get("env", []):
                # A variable may say where a secret lies.
                where = variable["name"].endswith(("_FILE", "_PATH"))
                if SECRET.search(variable["name"]) and not where:
                    assert variable.keys() == {"name", "valueFrom"}, variable["name"]
                    assert variable["valueFrom"].keys() == {"secretKeyRef"}
    for path in INFRA.rglob("*"):
        if path.is_file():
            text = path.read_text()
            assert not re.search(r"AKIA[0-9A-Z]{16}|-----BEGIN|[a-z]+://[^/\s:@]+:[^/\s@$]+@", text), path


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_nobody_is_reached_but_by_a_policy(overlay: str) -> None:
    policies = [item["spec"] for item in rendered(overlay) if item["kind"] == "NetworkPolicy"]
    assert {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]} in policies
    for policy in policies:
        for rule in policy.get("ingress", []):
            # From somebody, and at a port unless it is Ray's processes among themselves.
            assert rule["from"] and all(peer and "ipBlock" not in peer for peer in rule["from"])
            assert "ports" in rule or policy["podSelector"] == rule["from"][0]["podSelector"]
        for rule in policy.get("egress", []):
            assert "to" in rule or rule["ports"]
    services = [item for item in rendered(overlay) if item["kind"] == "Service"]
    assert all(item["spec"].get("type", "ClusterIP") == "ClusterIP" for item in services)
    assert not [item for item in rendered(overlay) if item["kind"] in ("Ingress", "Route", "Gateway")]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_ray_asks_for_a_token_and_drains_before_it_is_killed(overlay: str) -> None:
    (cluster,) = [item["spec"] for item in rendered(overlay) if item["kind"] == "RayCluster"]
    assert cluster["authOptions"] == {"mode": "token", "secretName": "ray-token"}
    pinned = re.search(r"^ray(?:\[.*\])?==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned and cluster["rayVersion"] == pinned[1]
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert cluster["headGroupSpec"]["enableIngress"] is False
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    assert groups.keys() == {"cpu", "gpu", "gpu-spot"}
    for name, group in groups.items():
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        drain = {v["name"]: v.get("value") for v in container["env"]}["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]
        assert 0 < int(drain) < pod["terminationGracePeriodSeconds"] <= 120
        limits = container["resources"]["limits"]
        assert limits.get("nvidia.com/gpu", 0) == (1 if name.startswith("gpu") else 0)
        (shared,) = [v["emptyDir"] for v in pod["volumes"] if v["name"] == "shared-memory"]
        assert shared["medium"] == "Memory" and "sizeLimit" in shared
        assert {"name": "shared-memory", "mountPath": "/dev/shm"} in container["volumeMounts"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_site_file_of_a_cluster_is_one(overlay: str) -> None:
    (site,) = [
        i["data"]["site.yaml"]
        for i in rendered(overlay)
        if (i["kind"], i["metadata"]["name"]) == ("ConfigMap", "site")
    ]
    check_site(site)
    services = {i["metadata"]["name"] for i in rendered(overlay) if i["kind"] == "Service"}
    assert "http://" not in site and "insecure" not in site
    for host in re.findall(r"https://([a-z-]+)", site):
        assert host in services


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_guide_forwards_what_jobs_get_the_addresses_of(overlay: str) -> None:
    """Of MLflow and the store; Ray has a tunnel of its own."""
    (site,) = [i["data"]["site.yaml"] for i in rendered(overlay) if i["metadata"]["name"] == "site"]
    addresses = re.findall(r"https://((?!ray\b)[a-z-]+):?(\d*)", site)
    guide = (ROOT / "docs" / "deploy.md").read_text()
    assert f"`127.0.0.1 {' '.join(name for name, _ in addresses)}`" in guide
    for name, port in addresses:
        assert re.search(rf"port-forward service/{name} {port or 443} ", guide), name


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_nodes_know_the_image_that_they_are_of(overlay: str) -> None:
    (cluster,) = [item for item in rendered(overlay) if item["kind"] == "RayCluster"]
    of_ray = [c for c in containers(cluster) if c["name"].startswith("ray-")]
    assert len(of_ray) == 4
    for container in of_ray:
        (known,) = [v["value"] for v in container["env"] if v["name"] == IMAGE_VARIABLE]
        assert known == container["image"]
    aws = yaml.safe_load((INFRA / "aws" / "ray-cluster.yaml").read_text())["docker"]
    assert f"--env={IMAGE_VARIABLE}={aws['image']}" in aws["run_options"]
    ray = compose()["services"]["ray"]
    assert ray["environment"][IMAGE_VARIABLE] == ray["image"]


def check_site(text: str) -> None:
    Site.model_validate(yaml.safe_load(text), context={"base": Path("/")})


def commands() -> Iterator[list[str]]:
    for item in every_object():
        for container in containers(item):
            yield container.get("command", [])
        if item["kind"] == "RayJob":
            yield item["spec"]["entrypoint"].split()
    for service in compose()["services"].values():
        yield service.get("command", [])


def test_each_command_is_one_of_ours_with_options_that_it_has() -> None:
    ours = [words for words in commands() if words[:1] == ["vitscale"]]
    assert {words[1] for words in ours} == {"supervise", "train"}
    for words in ours:
        command = get_command(app).commands[words[1]]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known


def test_the_cluster_of_vms_is_one_that_ray_takes_and_is_closed() -> None:
    config = yaml.safe_load((INFRA / "aws" / "ray-cluster.yaml").read_text())
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    Draft7Validator(schema).validate(config)
    assert config["provider"]["use_internal_ips"] is True
    assert DIGEST.search(config["docker"]["image"])
    for kind in config["available_node_types"].values():
        node = kind["node_config"]
        # Without groups of one's own the launcher makes some that let everybody in by ssh.
        assert node["SecurityGroupIds"] and node["SubnetIds"]
        assert node["MetadataOptions"]["HttpTokens"] == "required"
        assert all(disk["Ebs"]["Encrypted"] for disk in node["BlockDeviceMappings"])
    spot = config["available_node_types"]["gpu-spot"]["node_config"]
    assert spot["InstanceMarketOptions"]["MarketType"] == "spot"
    starts = [
        line
        for key in ("head", "worker")
        for line in config[f"{key}_start_ray_commands"]
        if "ray start" in line
    ]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in line and "0.0.0.0" not in line for line in starts)


@cache
def compose() -> dict[str, Any]:
    return yaml.safe_load((INFRA / "compose" / "compose.yaml").read_text())


def test_the_workstation_is_one_that_compose_takes_and_is_closed() -> None:
    schema = package("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json"
    Draft202012Validator(json.loads(schema.read_text())).validate(compose())
    example = (INFRA / "compose" / ".env.example").read_text()
    images = dict(re.findall(r"^(\w+_IMAGE)=(\S+)$", example, re.MULTILINE))
    for name, service in compose()["services"].items():
        assert service["user"] == "10001:10001" and service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"]
        assert "mem_limit" in service and "privileged" not in service and "network_mode" not in service
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        variable = re.match(r"\$\{(\w+):\?", service["image"])
        assert variable and DIGEST.search(images[variable[1]])
        for key in service.get("environment", {}):
            assert not SECRET.search(key) or key.endswith(("_FILE", "_PATH")), key
    assert all(secret.keys() == {"file"} for secret in compose()["secrets"].values())
    check_site((INFRA / "compose" / "site.yaml").read_text())


def test_the_workstation_reaches_its_services_by_the_names_that_containers_use() -> None:
    """Jobs get the addresses of who submits them."""
    site = (INFRA / "compose" / "site.yaml").read_text()
    addresses = re.findall(r"http://([a-z-]+):(\d+)", site)
    for name, port in addresses:
        service = compose()["services"][name]
        assert f"127.0.0.1:{port}:{port}" in service["ports"]
        assert "outside" in service["networks"] and not compose()["networks"]["outside"]
    assert "--allowed-hosts=mlflow:5000," in compose()["services"]["mlflow"]["command"][0]
    hosts = f"127.0.0.1 {' '.join(name for name, _ in addresses)}"
    guide = (ROOT / "docs" / "deploy.md").read_text()
    assert hosts in site and f"'{hosts}' | sudo tee -a /etc/hosts" in guide


def test_rules_and_dashboard_name_gauges_that_runs_show() -> None:
    rules = yaml.safe_load((INFRA / "monitoring" / "rules.yaml").read_text())
    dashboard = json.loads((INFRA / "monitoring" / "dashboard.json").read_text())
    exported = {f"ray_{name}" for name in GAUGES}
    named: dict[str, set[str]] = {"rules": set(), "dashboard": set()}
    recorded = set()
    for group in rules["groups"]:
        assert group.keys() <= {"name", "interval", "rules"}
        for rule in group["rules"]:
            named["rules"] |= set(re.findall(r"\bray_\w+", rule["expr"]))
            if "record" in rule:
                recorded.add(rule["record"])
                continue
            assert rule.keys() >= {"alert", "expr", "labels", "annotations"}
            assert rule["labels"]["severity"] in ("info", "warning", "critical")
            assert rule["annotations"].keys() == {"summary", "description"}
            assert set(re.findall(r"\bvitscale:\w+", rule["expr"])) <= recorded
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel.keys() >= {"id", "type", "title", "gridPos", "targets", "fieldConfig", "datasource"}
        assert panel["type"] in ("timeseries", "stat")
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24 and place["h"] > 0
        for target in panel["targets"]:
            named["dashboard"] |= set(re.findall(r"\bray_\w+", target["expr"]))
    assert {variable["name"] for variable in dashboard["templating"]["list"]} == {"datasource", "run"}
    assert named["dashboard"] == exported
    assert named["rules"] < exported


def test_the_image_is_nobody_s_and_pinned() -> None:
    lines = (INFRA / "image" / "Dockerfile").read_text().splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#"))
    assert re.findall(r"^FROM (\S+)", text, re.MULTILINE) == ["${BASE}", "${BASE}"]
    assert re.search(r"^ARG BASE$", text, re.MULTILINE), "no default: a digest would be old"
    assert re.findall(r"^USER (\S+)", text, re.MULTILINE) == ["10001:10001"]
    assert "PYTHONSAFEPATH=1" in text and "RAY_AUTH_MODE=token" in text and "-c constraints.txt" in text
    assert "ADD " not in text and "--mount=type=secret" not in text and ":latest" not in text
    copied = {
        word.removeprefix("./")
        for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.MULTILINE)
        for word in line.split()[:-1]
    }
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    assert copied == {line[1:] for line in ignore if line.startswith("!")} and "*" in ignore


@pytest.mark.parametrize(
    ("base", "accepted"),
    [
        ("docker.io/library/python:3.11-slim@sha256:" + "0f" * 32, True),
        ("docker.io/library/python:3.11-slim", False),
        ("docker.io/library/python@sha256:0f0f", False),
        ("", False),
    ],
)
def test_the_build_refuses_a_base_without_a_digest(base: str, accepted: bool) -> None:
    """By the very lines of its first RUN."""
    text = (INFRA / "image" / "Dockerfile").read_text()
    script = re.search(r"^RUN (case .*?esac)$", text, re.MULTILINE | re.DOTALL)
    assert script
    done = subprocess.run(
        ["sh", "-c", script[1].replace("\\\n", "")], env={"BASE": base}, capture_output=True, text=True
    )
    assert (done.returncode == 0) is accepted
    assert accepted or "BASE must name an image by its digest" in done.stderr


def test_each_secret_that_is_named_is_explained() -> None:
    """And only those."""
    named = {secret for item in every_object() for secret in secrets(item)}
    guide = (ROOT / "docs" / "deploy.md").read_text()
    table = guide.partition("| Secret | keys |")[2].partition("ConfigMap `authorities`")[0]
    rows = "".join(row.split("|")[1] for row in table.splitlines() if row.strip().startswith("|"))
    assert set(re.findall(r"`([a-z0-9-]+)`", rows)) == named
    compose_part = guide.partition("## On one workstation")[2]
    for name in compose()["secrets"]:
        assert re.search(rf"\b{name}\b", compose_part), name


def backup(job: str, store: Path, to: Path) -> subprocess.CompletedProcess[str]:
    """The job's own copy, of `prod`, between two folders."""
    (pod,) = [pod for name, pod in ALL_PODS if name == job][-1:]
    (container,) = pod["containers"]
    remotes = {"STORE": store, "BACKUP": to}
    environment = {f"RCLONE_CONFIG_{name}_TYPE": "alias" for name in remotes}
    environment |= {f"RCLONE_CONFIG_{name}_REMOTE": str(path) for name, path in remotes.items()}
    return subprocess.run(
        container["command"], env=os.environ | environment, capture_output=True, text=True, timeout=60
    )


@pytest.mark.skipif(shutil.which("rclone") is None, reason="needs rclone")
def test_the_backup_of_artifacts_takes_what_was_written_again(tmp_path: Path) -> None:
    artifact = tmp_path / "store/example-mlflow/1/artifacts/confusion.json"
    artifact.parent.mkdir(parents=True)
    for content in ("[1]", "[1, 2]"):
        artifact.write_text(content)
        done = backup("artifacts-backup", tmp_path / "store", tmp_path / "backup")
        assert done.returncode == 0, done.stderr
        (copy,) = [path for path in (tmp_path / "backup").rglob("*") if path.is_file()]
        assert copy.read_text() == content


KEPT = [
    *("runs/birds-1/commits/000000.json", "runs/birds-1/evaluations/a/0000.json", "runs/jobs/events/1.json"),
    *("promotions/probe/000001.json", "judgements/a/queue/b.json", "studies/birds-2/study.json"),
]
CHANGES = [
    *("jobs/runs/birds-1", "probe/a", "queue/quotas.json", "queue/entries/a.json", "selftest/a/0.json"),
    *("runs/birds-1/evaluations/a/parts/b/0.json", "studies/birds-2/points.parquet"),
]


@pytest.mark.skipif(shutil.which("rclone") is None, reason="needs rclone")
def test_the_backup_of_runs_takes_all_history_and_tells_if_it_was_changed(tmp_path: Path) -> None:
    bucket, kept = tmp_path / "store/example-training", tmp_path / "backup/vitscale-backup/training"
    for key in [*KEPT, *CHANGES]:
        (bucket / key).parent.mkdir(parents=True, exist_ok=True)
        (bucket / key).write_text("once")
    for content in ("once", "and again"):
        for key in CHANGES:
            (bucket / key).write_text(content)
        done = backup("runs-backup", tmp_path / "store", tmp_path / "backup")
        assert done.returncode == 0, done.stderr
        copied = [str(path.relative_to(kept)) for path in kept.rglob("*") if path.is_file()]
        assert sorted(copied) == sorted(KEPT)
    (bucket / KEPT[0]).write_text("changed")
    done = backup("runs-backup", tmp_path / "store", tmp_path / "backup")
    assert done.returncode != 0 and "immutable file modified" in done.stderr


def test_each_backup_is_one_that_the_guide_brings_back() -> None:
    text = " ".join(" ".join(words) for words in commands())
    kept = {found.rstrip("/") for found in re.findall(r"backup:([\w/-]+)", text)}
    restore = (ROOT / "docs" / "deploy.md").read_text().partition("## Backing up and restoring")[2]
    assert set(re.findall(r"rclone copy(?:to)? backup:(vitscale-backup/\w+)", restore)) == kept
    assert len(kept) == 3 and "attach the bucket's policy afterwards" in " ".join(restore.split())


def secrets(node: Any) -> Iterator[str]:
    """Names of Secrets that an object refers to."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "secretKeyRef":
                yield value["name"]
            elif key == "secretName":
                yield value
            yield from secrets(value)
    elif isinstance(node, list):
        for value in node:
            yield from secrets(value)


def test_an_overlay_names_its_buckets_alike() -> None:
    text = json.dumps(rendered("prod"))
    assert set(re.findall(r"(?:s3://|store:)([a-z-]+)", text)) == {
        "example-datasets",
        "example-training",
        "example-mlflow",
    }


def test_no_file_names_an_image_by_a_tag_that_moves() -> None:
    for path in [*INFRA.rglob("*.yaml"), *INFRA.rglob("Dockerfile")]:
        assert ":latest" not in path.read_text(), path
