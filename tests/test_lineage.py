"""The tree of a version: its oldest ancestor, all that came of that, and what is missing."""

from pathlib import Path
from typing import Any

from orchestrator.gates import Gate
from orchestrator.registry import Registry
from pipelines.lineage import Node, lineage
from tests.fake_mlflow import FakeMlflow
from tests.test_config import VALUES
from tests.test_registry import registered


def labels(node: Node) -> dict[str, Any]:
    return {child.version.label: labels(child) for child in node.children}


def give_parents(mlflow: FakeMlflow, *parents: str) -> None:
    for version, parent in zip(mlflow.models["toy"], parents, strict=True):
        version.tags["vitscale.parent"] = parent


def test_the_tree_begins_at_the_oldest_ancestor(
    registry: Registry, mlflow: FakeMlflow, store_url: str
) -> None:
    versions = [registered(registry, store_url, seed) for seed in range(5)]
    give_parents(mlflow, "", "toy/1", "toy/2", "toy/1", "")
    promoted = [registry.promote(version, "champion", Gate()) for version in versions[1:3]]
    for reference in ("toy/1", "toy/3", "toy@champion", "toy/4"):
        found = lineage(registry, reference)
        assert found.root.version.label == "toy/1"
        assert labels(found.root) == {"toy/2": {"toy/3": {}}, "toy/4": {}}
        assert found.asked == registry.resolve(reference)
        assert found.promotions == promoted
    assert labels(lineage(registry, "toy/5").root) == {}
    (second, _) = found.root.children
    (third,) = second.children
    assert (second.aliases, third.aliases) == ((), ("champion",))
    assert (third.data, third.fingerprint) == (VALUES["data"]["url"], VALUES["data"]["fingerprint"])
    told = found.to_json()
    assert told["asked"] == "toy/4"
    assert told["tree"]["children"][0]["children"][0]["aliases"] == ["champion"]
    assert [promotion["version"] for promotion in told["promotions"]] == [2, 3]


def test_parents_that_make_a_circle_are_followed_once(
    registry: Registry, mlflow: FakeMlflow, store_url: str
) -> None:
    for seed in range(3):
        registered(registry, store_url, seed)
    give_parents(mlflow, "toy/3", "toy/1", "toy/2")
    found = lineage(registry, "toy/1")
    assert labels(found.root) == {"toy/3": {"toy/1": {}}}


def test_what_is_missing_is_told(registry: Registry, mlflow: FakeMlflow, store_url: str) -> None:
    registered(registry, store_url, 1)
    second = registered(registry, store_url, 2)
    give_parents(mlflow, "gone/7", "toy/1")
    path = Path(second.manifest.removeprefix("file://"))
    path.write_bytes(path.read_bytes() + b" ")
    found = lineage(registry, "toy/2")
    assert found.root.problem == "its parent gone/7 is not registered any more"
    (child,) = found.root.children
    assert "tampered" in child.problem
    assert (child.manifest, child.data) == (None, "")
