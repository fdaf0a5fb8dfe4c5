"""Weights from other libraries become registered versions, and versions become files for other libraries."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from orchestrator.job import check_name
from orchestrator.registry import Registry, open_registry
from orchestrator.site import Site
from orchestrator.tracking import Tracking
from orchestrator.versions import Version
from pipelines.pretrain import EXPERIMENT
from workers.errors import ConfigError
from workers.models.formats import FORMATS, Format
from workers.models.formats.exporting import write_weights
from workers.models.formats.importing import import_weights
from workers.storage import join_url, open_store
from workers.training.imported import write_imported
from workers.training.restore import load_model


def import_file(
    site: Site,
    file: Path,
    model: str,
    *,
    image_size: int | tuple[int, int] | None = None,
    format: str | None = None,
    normalization: str = "half",
    overrides: Iterable[str] = (),
) -> Version:
    """The version of `model` that holds the file's weights; the same file read the same way is the same one.

    It is stored as a run of its own, `import-<digest>`, with one checkpoint.
    """
    check_name(model, "model")
    imported = import_weights(
        file,
        image_size=image_size,
        format=check_format(format) if format else None,
        normalization=normalization,
        overrides=overrides,
    )
    with file.open("rb") as opened:
        sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
    source = {
        "file": file.name,
        "sha256": sha256,
        "format": imported.format,
        "normalization": normalization,
        "has_head": imported.has_head,
    }
    identity = {**source, "file": "", "model": imported.config.model_dump(mode="json")}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    run = f"import-{digest[:10]}"
    tracking = Tracking(site.mlflow, EXPERIMENT)
    write_imported(open_store(join_url(site.runs, "runs", run)), run, imported.config, imported.state, source)
    run_id = tracking.open_run(run, tags={"vitscale.stage": "import"})
    tracking.finish(run_id, "FINISHED")
    return Registry(tracking.client, site.runs).register_run(model, run, run_id)


def export_version(
    site: Site, reference: str, format: str, out: Path, *, ignore_moved_alias: bool = False
) -> str:
    """Write the version `MODEL@ALIAS` or `MODEL/VERSION` to `out`; the Python that loads it."""
    checked = check_format(format)
    version = open_registry(site).resolve(reference, ignore_moved_alias=ignore_moved_alias)
    model, manifest = load_model(version.manifest, version.digest)
    return write_weights(out, checked, manifest.model, model.state_dict())


def check_format(name: str) -> Format:
    found = next((known for known in FORMATS if known == name), None)
    if found is None:
        raise ConfigError(f"--format {name}: choose one of {', '.join(FORMATS)}")
    return found
