"""The manifest of a checkpoint: what it is, read without what trains."""

import hashlib
import json
import urllib.parse
from dataclasses import asdict, dataclass, field
from typing import Any

from workers.config import RunConfig, make_config
from workers.errors import CheckpointError
from workers.model_config import ModelConfig, make_model_config
from workers.storage import NotFound, Store, open_store

FORMAT = 2
"""Format 1 had no `num_shards`: each rank wrote a part."""
MANIFEST = "MANIFEST.json"
STATE = "state."
"""Prefix of the optimizer's tensors in `Manifest.shapes` and of its scalars."""
AVERAGE = "average."
"""Prefix of the moving average's tensors there."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint is; JSON in the store."""

    run: str
    images_seen: int
    step: int
    epoch: int
    """Of the lease under which it was written."""
    parent: str | None
    """sha256 of the manifest that this one continues."""
    world_size: int
    num_shards: int
    """Parts into which every tensor is split."""
    objects: dict[str, dict[str, Any]]
    """Name → size in bytes and sha256."""
    shapes: dict[str, list[int]]
    """Global shape of every tensor; optimizer moments are `state.<parameter>.<moment>`, averages
    `average.<parameter>`."""
    scalars: dict[str, float]
    """The optimizer's state that is not tensors."""
    config: dict[str, Any]
    """A RunConfig; of imported weights `model` and `source` alone."""
    sources: list[dict[str, Any]]
    """Identity of each source's order, and its samples in a global batch: the position is step x count."""
    tallies: list[list[int]]
    """What was delivered of each source's unfinished epoch: for its proof."""
    bad_samples: list[list[dict[str, Any]]]
    """Of each source: what was damaged, and what stood in for it."""
    metrics: dict[str, float]
    versions: dict[str, str]
    complete: bool
    bad_steps: list[int] = field(default_factory=list)
    """Left out, since loss or gradient were not finite; older manifests say nothing of them."""
    skipped: list[list[int]] = field(default_factory=list)
    """First and last of the steps around which a roll-back has led this run."""
    history: dict[str, Any] = field(default_factory=dict)
    """Of losses, see `LossHistory`."""
    probe: dict[str, Any] = field(default_factory=dict)
    """Logits of two fixed images, of complete runs, see `probe_logits`; older manifests have none."""
    format: int = FORMAT
    key: str = field(default="", compare=False)
    """Where it was read from, relative to its store; not part of the file."""

    def to_bytes(self) -> bytes:
        values = asdict(self)
        values.pop("key")
        return json.dumps(values, sort_keys=True, indent=1).encode()

    @property
    def model(self) -> ModelConfig:
        """Also of weights that were imported, whose `config` has a `source` and no training."""
        return make_model_config(self.config["model"])

    @property
    def run_config(self) -> RunConfig | None:
        """None of imported weights."""
        return None if "source" in self.config else make_config(self.config)

    @property
    def directory(self) -> str:
        return self.key.rpartition("/")[0]


def checkpoint_directory(images_seen: int, epoch: int) -> str:
    """Unique per attempt: an epoch's writer passes each image count once."""
    return f"checkpoints/{images_seen:012d}-{epoch:06d}"


def object_name(kind: str, rank: int, world_size: int) -> str:
    return f"{kind}-{rank:05d}-of-{world_size:05d}.safetensors"


def read_manifest(store: Store, key: str, digest: str) -> Manifest:
    """CheckpointError unless the bytes are exactly those that were committed."""
    where = f"{store.url}/{key}"
    data = read_part(store, key)
    if hashlib.sha256(data).hexdigest() != digest:
        raise CheckpointError(
            f"{where}: its sha256 is not the registered {digest[:12]}...; it was tampered with"
        )
    try:
        values = json.loads(data)
        if values["format"] == 1:
            values |= {"format": FORMAT, "num_shards": values["world_size"]}
        if values["format"] != FORMAT:
            raise CheckpointError(
                f"{where}: format {values['format']}, this version reads {FORMAT}; "
                "install the version that wrote it"
            )
        return Manifest(**values, key=key)
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{where} is not a checkpoint's manifest: {error}") from error


def open_manifest(url: str, digest: str) -> tuple[Store, Manifest]:
    """The manifest at a URL, with the store of the run that it belongs to."""
    root, marker, rest = url.partition("/checkpoints/")
    if not marker or urllib.parse.urlsplit(url).scheme not in ("s3", "file"):
        raise CheckpointError(f"{url} is not the URL of a checkpoint's {MANIFEST}")
    store = open_store(root)
    return store, read_manifest(store, f"checkpoints/{rest}", digest)


def check_shapes(manifest: Manifest, shapes: dict[str, list[int]]) -> None:
    """CheckpointError naming the tensors in which a model differs from the checkpoint."""
    saved = {name: shape for name, shape in manifest.shapes.items() if not name.startswith((STATE, AVERAGE))}
    names = sorted(saved.keys() | shapes.keys())
    differing = [
        f"{name} (checkpoint {saved.get(name, 'none')}, model {shapes.get(name, 'none')})"
        for name in names
        if saved.get(name) != shapes.get(name)
    ]
    if differing:
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise CheckpointError(f"{manifest.key} is of another model: {', '.join(differing[:5])}{more}")


def read_part(store: Store, key: str) -> bytes:
    """CheckpointError if the object is gone; a store that cannot be reached says nothing of a checkpoint."""
    try:
        return store.read(key)
    except NotFound as error:
        raise CheckpointError(f"a checkpoint lacks a part: {error}") from error
