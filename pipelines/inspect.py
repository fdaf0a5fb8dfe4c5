"""What a checkpoint learned: probes, figures and a page that shows them. `docs/inspect.md` explains each."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from orchestrator import figures
from orchestrator.site import Site
from pipelines.evaluate import find_checkpoint
from pipelines.report.inspection import BLOCK_HEADER, block_rows, render
from workers.data.index import DatasetIndex
from workers.errors import CheckpointError, ConfigError, DataError
from workers.model_config import ModelConfig
from workers.models.vit import VisionTransformer
from workers.probes import Probes, first_images, probe
from workers.storage import Store, join_url
from workers.training.commits import Commit, CommitLog
from workers.training.evaluate import normalize
from workers.training.manifest import Manifest, open_manifest
from workers.training.restore import load_model

__all__ = ["BLOCK_HEADER", "Inspection", "block_rows", "inspect"]

Progress = Callable[[int, int], None]
"""Checkpoints done, and in all."""


@dataclass(frozen=True)
class Inspection:
    name: str
    """`model/version`, or the run's name."""
    manifest: str
    run: str
    images_seen: int
    data: str
    """URL of the validation images."""
    probes: Probes
    history: dict[int, Probes]
    """By images seen; empty unless asked for."""
    lost: list[str]
    """Why checkpoints of the history are not in it."""
    page: Path

    def as_json(self) -> dict[str, Any]:
        """Without what pictures are made of, which is in `probes.json`."""
        return {
            "name": self.name,
            "manifest": self.manifest,
            "run": self.run,
            "images_seen": self.images_seen,
            "data": self.data,
            "num_images": self.probes.num_images,
            "page": str(self.page),
            "summary": self.probes.summary(),
            "history": {str(seen): probes.summary() for seen, probes in self.history.items()},
            "lost": self.lost,
        }


def inspect(
    site: Site | None,
    reference: str,
    *,
    data: str | None = None,
    num_images: int = 64,
    out: Path | None = None,
    history: bool = False,
    progress: Progress = lambda done, total: None,
) -> Inspection:
    """Look into `MODEL@ALIAS`, `MODEL/VERSION` or the checkpoint whose MANIFEST.json has this URL.

    Attention is looked at on the first validation images of the run's own data, or of the set whose root is
    `data`. Writes figures (PNG, SVG), `probes.json` and `index.html` to `out`. With `history` every
    checkpoint of the run is probed with the same images.
    """
    if num_images < 1:
        raise ConfigError(f"--images {num_images}: at least one is needed")
    checkpoint = find_checkpoint(reference, site)
    url, digest = checkpoint.url, checkpoint.digest
    store, manifest = open_manifest(url, digest)
    name = manifest.run if checkpoint.name == url else checkpoint.name
    if manifest.model.family not in ("vit", "hybrid"):
        raise ConfigError(f"{name} is a {manifest.model.family}; only ViTs and hybrids have attention")
    source = _source(manifest, data)
    images = _images(source, manifest.model, num_images, given=data is not None)
    commits = _lineage(store, manifest) if history else []
    progress(0, 1 + len(commits))
    found = _probe(url, digest, images)
    past: dict[int, Probes] = {}
    lost: list[str] = []
    for number, commit in enumerate(commits):
        progress(1 + number, 1 + len(commits))
        if commit.digest == digest:
            past[commit.images_seen] = found
            continue
        try:
            past[commit.images_seen] = _probe(join_url(store.url, commit.manifest), commit.digest, images)
        except CheckpointError as error:
            lost.append(f"image {commit.images_seen}: {error}")
    folder = (out or Path(f"inspect-{_file_name(name)}")).resolve()
    inspection = Inspection(
        name=name,
        manifest=url,
        run=manifest.run,
        images_seen=manifest.images_seen,
        data=source,
        probes=found,
        history=past,
        lost=lost,
        page=folder / "index.html",
    )
    _write(inspection, images, folder)
    progress(1 + len(commits), 1 + len(commits))
    return inspection


def _source(manifest: Manifest, data: str | None) -> str:
    """URL of the validation images."""
    if data:
        return join_url(data, "val")
    config = manifest.run_config
    if config is None:
        raise ConfigError(f"{manifest.run} was imported, with no data of its own: give --data URL")
    return config.data.validation_url


def _commits(store: Store) -> list[Commit]:
    """Those that count, oldest first."""
    log = CommitLog(store)
    head = log.head()
    return list(log.lineage_from(head.seq))[::-1] if head else []


def _lineage(store: Store, manifest: Manifest) -> list[Commit]:
    """Up to this checkpoint, oldest first."""
    return [commit for commit in _commits(store) if commit.images_seen <= manifest.images_seen]


def _images(source: str, model: ModelConfig, count: int, *, given: bool) -> torch.Tensor:
    """uint8 (B, C, H, W)."""
    try:
        images, _ = first_images(DatasetIndex.open(source), model, count)
    except DataError as error:
        hint = "" if given else "; name a data set that is there: --data URL, the root that `ingest` wrote"
        raise DataError(f"no validation images to look at: {error}{hint}") from None
    return images


def _probe(url: str, digest: str, images: torch.Tensor) -> Probes:
    model, _ = load_model(url, digest)
    assert isinstance(model, VisionTransformer)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    return probe(model.to(device), normalize(images.to(device)))


def _write(inspection: Inspection, images: torch.Tensor, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {folder} cannot be written: {error.strerror}") from None
    probes = inspection.probes
    (folder / "probes.json").write_text(json.dumps(probes.to_json()))
    if not probes.finite:
        raise CheckpointError(
            f"{inspection.manifest}: its probes are not finite: the model has diverged; see "
            f"{folder / 'probes.json'}"
        )
    drawn = figures.checkpoint_figures(probes)
    drawn["rollout"] = figures.draw_rollout(probes, [image.permute(1, 2, 0).numpy() for image in images])
    if inspection.history:
        drawn["history"] = figures.draw_history(inspection.history)
        summaries = {str(seen): past.summary() for seen, past in inspection.history.items()}
        (folder / "history.json").write_text(json.dumps(summaries, indent=1))
    pictures: dict[str, bytes] = {}
    for name, figure in drawn.items():
        pictures[name] = figures.to_png(figure)
        (folder / f"{name}.png").write_bytes(pictures[name])
        (folder / f"{name}.svg").write_bytes(figures.to_svg(figure))
    inspection.page.write_text(render(inspection.name, _facts(inspection), probes, pictures), "utf-8")


def _facts(inspection: Inspection) -> Mapping[str, str]:
    return {
        "Run": inspection.run,
        "Images seen": f"{inspection.images_seen:,}",
        "Checkpoint": inspection.manifest,
        "Looked at": f"{inspection.probes.num_images} images of {inspection.data}",
    }


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)
