"""Where a version comes from and what came of it: data, parents, children, promotions."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.promotions import Promotion, retired
from orchestrator.registry import Registry
from orchestrator.versions import Version
from workers.errors import CheckpointError, DataError
from workers.training.manifest import Manifest, open_manifest


@dataclass(frozen=True)
class Node:
    version: Version
    aliases: tuple[str, ...]
    manifest: Manifest | None
    """None if it cannot be had."""
    problem: str
    """Why not; or what of its lineage is not there."""
    retired: str | None
    """Why; None if it was not."""
    children: tuple["Node", ...]

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self.version),
            "aliases": list(self.aliases),
            "data": self.data,
            "fingerprint": self.fingerprint,
            "versions": self.manifest.versions if self.manifest else {},
            "problem": self.problem,
            "retired": self.retired,
            "children": [child.to_json() for child in self.children],
        }

    @property
    def data(self) -> str:
        """URL of what it was trained on; empty for weights that were imported."""
        return str(self._data.get("url", ""))

    @property
    def fingerprint(self) -> str:
        return str(self._data.get("fingerprint", ""))

    @property
    def _data(self) -> Mapping[str, Any]:
        return (self.manifest.config.get("data") or {}) if self.manifest else {}


@dataclass(frozen=True)
class Lineage:
    asked: Version
    root: Node
    """The oldest ancestor that is registered, with all that came of it."""
    promotions: list[Promotion]
    """Of all models in it, and what else their logs have, oldest first."""

    def to_json(self) -> dict[str, Any]:
        return {
            "asked": self.asked.label,
            "tree": self.root.to_json(),
            "promotions": [asdict(promotion) for promotion in self.promotions],
        }


def lineage(registry: Registry, reference: str) -> Lineage:
    """Of MODEL@ALIAS or MODEL/VERSION."""
    asked = registry.find(reference)
    versions = registry.versions()
    by_label = {version.label: version for version in versions}
    holders = {
        (promotion.model, promotion.version, alias)
        for model in {version.model for version in versions}
        for alias, promotion in registry.log.holders(model).items()
    }
    root, seen = asked, {asked.label}
    while (parent := by_label.get(root.parent)) is not None and parent.label not in seen:
        root = parent
        seen.add(root.label)
    gone = {
        f"{model}/{number}": record.reason
        for model in {version.model for version in versions}
        for number, record in retired(registry.log.read(model)).items()
    }
    tree = _node(root, versions, holders, gone, frozenset())
    models = sorted({version.model for version in _versions(tree)})
    promotions = [promotion for model in models for promotion in registry.log.read(model)]
    return Lineage(asked, tree, sorted(promotions, key=lambda p: p.time))


def _node(
    version: Version,
    versions: Sequence[Version],
    holders: set[tuple[str, int, str]],
    gone: Mapping[str, str],
    above: frozenset[str],
) -> Node:
    """`gone`: why versions were retired. `above`: labels of its ancestors; anybody may edit in MLflow who is
    whose parent."""
    manifest, problem = None, ""
    try:
        _, manifest = open_manifest(version.manifest, version.digest)
    except (CheckpointError, DataError) as error:
        # Nobody keeps the checkpoint of a retired one.
        problem = "" if version.label in gone else str(error)
    if not problem and version.parent and version.parent not in {other.label for other in versions}:
        problem = f"its parent {version.parent} is not registered any more"
    above |= {version.label}
    children = [
        _node(child, versions, holders, gone, above)
        for child in versions
        if child.parent == version.label and child.label not in above
    ]
    aliases = sorted(a for model, number, a in holders if (model, number) == (version.model, version.version))
    reason = gone.get(version.label)
    return Node(version, tuple(aliases), manifest, problem, reason, tuple(children))


def _versions(node: Node) -> list[Version]:
    return [node.version, *(version for child in node.children for version in _versions(child))]
