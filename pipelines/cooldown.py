"""Cooldowns: from any checkpoint of a run to a finished model, at the price of its last steps alone."""

import re
from collections.abc import Iterable

from orchestrator.registry import open_registry
from orchestrator.site import Site
from pipelines.children import fork_cooldown
from workers.config import ForkConfig, RunConfig, make_config
from workers.config_text import override
from workers.errors import ConfigError
from workers.storage import join_url, open_store
from workers.training.commits import Commit, CommitLog
from workers.training.manifest import open_manifest


def cooldown_config(
    site: Site, reference: str, *, at: int | None, images: int, overrides: Iterable[str] = ()
) -> RunConfig:
    """The run that goes on from a run's newest checkpoint of at most `at` images (None: the newest of all
    from which there is schedule left) for `images` more, its learning rate going linearly to 0.

    `reference`: a run's name, MODEL/VERSION or MODEL@ALIAS.
    """
    root = _run_url(site, reference)
    commits = _commits(root)
    limit = at if at is not None else max(commit.images_seen for commit in commits)
    fitting = [commit for commit in commits if commit.images_seen <= limit]
    if not fitting:
        known = ", ".join(f"{commit.images_seen:,}" for commit in commits)
        raise ConfigError(f"--at {at}: {reference} has no checkpoint so early; it has them at {known}")
    commit = max(fitting, key=lambda commit: commit.images_seen)
    url = join_url(root, commit.manifest)
    _, manifest = open_manifest(url, commit.digest)
    parent = manifest.run_config
    if parent is None:
        raise ConfigError(f"{reference} was imported, so there is no training to go on with")
    fork = ForkConfig(manifest=url, digest=commit.digest, parent=manifest.run)
    config = fork_cooldown(parent, fork, commit.images_seen, images)
    return make_config(override(config.model_dump(mode="json"), overrides))


def _run_url(site: Site, reference: str) -> str:
    """Where a run's objects lie."""
    if re.search("[@/]", reference):
        return open_registry(site).resolve(reference).manifest.partition("/checkpoints/")[0]
    return join_url(site.runs, "runs", reference)


def _commits(root: str) -> list[Commit]:
    """Those that count and from which there is something left to train, newest first."""
    log = CommitLog(open_store(root))
    head = log.head()
    if head is None:
        raise ConfigError(f"{root} has no checkpoints; is it the name of a run, as MLflow shows it?")
    commits = [commit for commit in log.lineage_from(head.seq) if not commit.complete]
    if not commits:
        raise ConfigError(f"{root} has only its last checkpoint; make train.checkpoint_every_images smaller")
    return commits
