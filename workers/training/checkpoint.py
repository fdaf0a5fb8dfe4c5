"""Checkpoints: sharded safetensors and one create-once manifest, written last. No manifest, no checkpoint.

    checkpoints/<images_seen>-<epoch>/
        model-00000-of-00002.safetensors       rank 0's rows of every parameter
        optimizer-00000-of-00002.safetensors   and of every optimizer moment
        average-00000-of-00002.safetensors     and of the weights' moving average, if there is one
        part-00000.json                        sizes and digests of these three
        ...
        MANIFEST.json                          digests of the objects, configuration, position, metrics

Saved in N parts, loads in M: each tensor is split along dimension 0 as `torch.chunk` does (so does FSDP2),
over the ranks of a shard group, the first of which writes; a rank reads the objects that hold rows of
its own. All is verified before use; nothing here unpickles. An optimizer's
state is its tensors and scalars: its groups and their rates come from the configuration and the images seen.
"""

import hashlib
import json
import math
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim import Optimizer

from workers.config import RunConfig, make_config
from workers.errors import CheckpointError
from workers.model_config import ModelConfig, make_model_config
from workers.storage import NotFound, Store, open_store
from workers.training.rows import local
from workers.training.shard_place import ShardPlace

FORMAT = 2
"""Format 1 had no `num_shards`: each rank wrote a part."""
MANIFEST = "MANIFEST.json"
READ_AT_ONCE = 4
"""Objects that are on their way to a rank."""
STATE = "state."
"""Prefix of the optimizer's tensors in `Manifest.shapes` and of its scalars."""
AVERAGE = "average."
"""Prefix of the moving average's tensors there."""
KINDS = {"": "model", STATE: "optimizer", AVERAGE: "average"}
"""Which objects hold tensors of a prefix."""


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


def read_manifest(store: Store, key: str, digest: str) -> Manifest:
    """CheckpointError unless the bytes are exactly those that were committed."""
    where = f"{store.url}/{key}"
    data = _read(store, key)
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


@dataclass
class Training:
    """What a checkpoint holds of a run: the same on every rank but for the rows of its tensors."""

    model: nn.Module
    optimizers: Sequence[Optimizer]
    average: Mapping[str, Tensor]
    """Of the weights, by their names; empty without one."""

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """By prefix, then by name."""
        average = {f"{AVERAGE}{name}": value for name, value in self.average.items()}
        parameters: dict[str, Tensor] = dict(self.model.named_parameters())
        kinds = {"": parameters, STATE: self._optimizer_state()[0]}
        return {**kinds, AVERAGE: average} if average else kinds

    def scalars(self) -> dict[str, Tensor]:
        """Of the optimizer, such as AdamW's step."""
        return self._optimizer_state()[1]

    def owners(self) -> dict[Tensor, Optimizer]:
        return {
            parameter: optimizer
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }

    def _optimizer_state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Moments and scalars by `state.<parameter>.<name>`."""
        moments: dict[str, Tensor] = {}
        scalars: dict[str, Tensor] = {}
        owners = self.owners()
        for parameter_name, parameter in self.model.named_parameters():
            state = owners[parameter].state[parameter] if parameter in owners else {}
            for name, value in state.items():
                (moments if value.ndim else scalars)[f"{STATE}{parameter_name}.{name}"] = value
        return moments, scalars


def load_into(store: Store, manifest: Manifest, training: Training, place: ShardPlace) -> None:
    """Model, optimizers and average become the checkpoint's, whatever its parts were; every rank calls it.

    Where it has no average, one begins at its weights.
    """
    parameters = dict(training.model.named_parameters())
    check_shapes(manifest, {name: list(value.shape) for name, value in parameters.items()})
    owners = training.owners()
    for name, shape in manifest.shapes.items():
        if name.startswith(STATE):
            parameter, moment = _owner(name, parameters, owners)
            assert shape == list(parameter.shape), name
            owners[parameter].state[parameter][moment] = torch.zeros_like(parameter)
    for name, value in manifest.scalars.items():
        parameter, scalar = _owner(name, parameters, owners)
        on_device = any(group.get("fused") for group in owners[parameter].param_groups)
        device = parameter.device if on_device else torch.device("cpu")
        owners[parameter].state[parameter][scalar] = torch.tensor(value, device=device)
    saved_average = any(name.startswith(AVERAGE) for name in manifest.shapes)
    for prefix, tensors in training.tensors().items():
        if prefix != AVERAGE or saved_average:
            _copy_rows(_Objects(store, manifest, KINDS[prefix]), tensors, place)
    if not saved_average:
        for name, mean in training.average.items():
            local(mean).copy_(local(parameters[name].detach()))


def _owner(
    name: str, parameters: Mapping[str, Tensor], owners: Mapping[Tensor, Optimizer]
) -> tuple[Tensor, str]:
    """The parameter and the name within its optimizer's state of `state.<parameter>.<name>`."""
    parameter, _, part = name.removeprefix(STATE).rpartition(".")
    if parameters[parameter] not in owners:
        raise CheckpointError(
            f"{name} is of an optimizer that this run has not; keep optim.optimizer as it was"
        )
    return parameters[parameter], part


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


def load_full(store: Store, manifest: Manifest) -> dict[str, Tensor]:
    """All of the model's tensors in memory, verified, for inspection, fine-tuning and restore tests."""
    objects = _Objects(store, manifest, "model")
    names = [name for name in manifest.shapes if not name.startswith((STATE, AVERAGE))]
    parts = range(manifest.num_shards)
    objects.read(parts)
    return {name: torch.cat([objects.rows(part, name) for part in parts]) for name in names}


def object_name(kind: str, rank: int, world_size: int) -> str:
    return f"{kind}-{rank:05d}-of-{world_size:05d}.safetensors"


class _Objects:
    """The saved ranks' objects of one kind, verified."""

    def __init__(self, store: Store, manifest: Manifest, kind: str) -> None:
        self._store = store
        self.manifest = manifest
        self._kind = kind
        self._read: dict[int, dict[str, Tensor]] = {}

    def read(self, ranks: Iterable[int]) -> None:
        """A few at a time; what is wrong with the first of them is raised."""
        ranks = sorted(ranks)
        with ThreadPoolExecutor(READ_AT_ONCE) as pool:
            self._read = dict(zip(ranks, pool.map(self._load, ranks), strict=True))

    def rows(self, rank: int, name: str) -> Tensor:
        """The rows of a tensor that were this rank's."""
        shape = self.manifest.shapes[name]
        start, stop = _rows(shape[0], rank, self.manifest.num_shards)
        value = self._read[rank].get(name)
        if value is None or list(value.shape) != [stop - start, *shape[1:]]:
            found = "nothing" if value is None else f"shape {list(value.shape)}"
            raise CheckpointError(
                f"{self._where(rank)}: of {name}, {shape} in all, it has {found}, "
                f"not rows {start} to {stop} as its manifest says"
            )
        return value

    def _load(self, rank: int) -> dict[str, Tensor]:
        where = self._where(rank)
        entry = self.manifest.objects.get(self._name(rank))
        if entry is None:
            raise CheckpointError(f"{where}: its manifest does not list it")
        data = _read(self._store, f"{self.manifest.directory}/{self._name(rank)}")
        if len(data) != entry["size"] or hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise CheckpointError(f"{where}: its bytes are not those that were committed ({len(data)} bytes)")
        try:
            tensors: dict[str, Tensor] = safetensors.torch.load(data)
        except SafetensorError as error:
            raise CheckpointError(f"{where}: {error}") from error
        return tensors

    def _name(self, rank: int) -> str:
        return object_name(self._kind, rank, self.manifest.num_shards)

    def _where(self, rank: int) -> str:
        return f"{self._store.url}/{self.manifest.directory}/{self._name(rank)}"


def _read(store: Store, key: str) -> bytes:
    """CheckpointError if the object is gone; a store that cannot be reached says nothing of a checkpoint."""
    try:
        return store.read(key)
    except NotFound as error:
        raise CheckpointError(f"a checkpoint lacks a part: {error}") from error


@torch.no_grad()
def _copy_rows(objects: _Objects, tensors: Mapping[str, Tensor], place: ShardPlace) -> None:
    """Fill this rank's rows of each tensor from whichever saved parts hold them."""
    objects.read({part for name in tensors for part in _overlaps(objects.manifest, name, place)})
    for name, value in tensors.items():
        own = local(value)
        num_rows = objects.manifest.shapes[name][0]
        start, _ = _rows(num_rows, place.index, place.count)
        for part, (first, last) in _overlaps(objects.manifest, name, place).items():
            saved_start, _ = _rows(num_rows, part, objects.manifest.num_shards)
            source = objects.rows(part, name)
            own[first - start : last - start].copy_(source[first - saved_start : last - saved_start])


def _overlaps(manifest: Manifest, name: str, place: ShardPlace) -> dict[int, tuple[int, int]]:
    """Which rows of this rank's a saved part has, of each part that has any."""
    num_rows = manifest.shapes[name][0]
    start, stop = _rows(num_rows, place.index, place.count)
    saved = [_rows(num_rows, part, manifest.num_shards) for part in range(manifest.num_shards)]
    shared = [(max(start, first), min(stop, last)) for first, last in saved]
    return {part: rows for part, rows in enumerate(shared) if rows[0] < rows[1]}


def _rows(num_rows: int, rank: int, world_size: int) -> tuple[int, int]:
    """Rows of a rank when `torch.chunk` splits dimension 0: ceil(n/w) each until none are left."""
    share = math.ceil(num_rows / world_size)
    return min(rank * share, num_rows), min((rank + 1) * share, num_rows)
