"""MLflow's model registry in memory, for tests of what keeps models there."""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from mlflow.exceptions import MlflowException, RestException


class Page(list[Any]):
    """As MLflow's PagedList."""

    token: str | None = None


@dataclass
class FakeMlflow:
    """The registry's calls on an MLflow server that keeps two versions to a page."""

    models: dict[str, list[Any]] = field(default_factory=dict)
    aliases: dict[tuple[str, str], str] = field(default_factory=dict)
    before_alias: Callable[[], object] = lambda: None
    """Called once, just before an alias is set."""
    down: bool = False
    tags: dict[str, dict[str, str]] = field(default_factory=dict)
    """Of models."""
    created: list[str] = field(default_factory=list)
    """Models, also those that were deleted."""
    logged: list[tuple[str, str, float]] = field(default_factory=list)
    """Run, metric, value."""

    def _up(self) -> None:
        if self.down:
            raise MlflowException("connection refused")

    def create_registered_model(self, name: str) -> None:
        self._up()
        if name in self.models:
            raise RestException({"error_code": "RESOURCE_ALREADY_EXISTS", "message": name})
        self.models[name] = []
        self.tags[name] = {}
        self.created.append(name)

    def delete_registered_model(self, name: str) -> None:
        self._up()
        del self.models[name], self.tags[name]
        self.aliases = {key: version for key, version in self.aliases.items() if key[0] != name}

    def create_model_version(
        self, name: str, source: str, run_id: str, tags: dict[str, str], description: str = ""
    ) -> Any:
        self._up()
        assert not source.startswith("file:"), "MLflow refuses local paths"
        assert all(isinstance(value, str) for value in tags.values())
        versions = self.models[name]
        version = SimpleNamespace(
            name=name,
            version=str(len(versions) + 1),
            source=source,
            run_id=run_id,
            tags=dict(tags),
            description=description,
        )
        versions.append(version)
        return version

    def search_model_versions(self, query: str, max_results: int, page_token: str | None = None) -> Page:
        self._up()
        found = [
            v for name, versions in self.models.items() for v in versions if query in ("", f"name = '{name}'")
        ]
        start = int(page_token or 0)
        # The newest first, as MLflow does.
        page = Page(found[::-1][start : start + 2])
        page.token = str(start + 2) if start + 2 < len(found) else None
        return page

    def set_registered_model_alias(self, name: str, alias: str, version: str) -> None:
        self._up()
        act, self.before_alias = self.before_alias, lambda: None
        act()
        self.aliases[name, alias] = version

    def get_registered_model(self, name: str) -> Any:
        self._up()
        if name not in self.models:
            raise RestException({"error_code": "RESOURCE_DOES_NOT_EXIST", "message": name})
        aliases = {alias: version for (model, alias), version in self.aliases.items() if model == name}
        created = max(at for at, model in enumerate(self.created) if model == name)
        return SimpleNamespace(
            name=name, aliases=aliases, tags=dict(self.tags[name]), creation_timestamp=created
        )

    def get_model_version(self, name: str, version: str) -> Any:
        self._up()
        for found in self.models.get(name, ()):
            if found.version == version:
                return found
        raise RestException({"error_code": "RESOURCE_DOES_NOT_EXIST", "message": f"{name}/{version}"})

    def delete_registered_model_alias(self, name: str, alias: str) -> None:
        self._up()
        self.aliases.pop((name, alias), None)

    def set_registered_model_tag(self, name: str, key: str, value: str) -> None:
        self._up()
        self.tags[name][key] = value

    def set_model_version_tag(self, name: str, version: str, key: str, value: str) -> None:
        self.get_model_version(name, version).tags[key] = value

    def log_batch(self, run_id: str, metrics: list[Any]) -> None:
        self._up()
        self.logged += [(run_id, metric.key, metric.value) for metric in metrics]
