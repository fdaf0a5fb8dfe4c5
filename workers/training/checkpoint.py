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
import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim import Optimizer

from workers.errors import CheckpointError
from workers.storage import Store
from workers.training.manifest import AVERAGE, STATE, Manifest, check_shapes, object_name, read_part
from workers.training.rows import local
from workers.training.shard_place import ShardPlace

READ_AT_ONCE = 4
"""Objects that are on their way to a rank."""
KINDS = {"": "model", STATE: "optimizer", AVERAGE: "average"}
"""Which objects hold tensors of a prefix."""


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


def load_full(store: Store, manifest: Manifest) -> dict[str, Tensor]:
    """All of the model's tensors in memory, verified, for inspection, fine-tuning and restore tests."""
    objects = _Objects(store, manifest, "model")
    names = [name for name in manifest.shapes if not name.startswith((STATE, AVERAGE))]
    parts = range(manifest.num_shards)
    objects.read(parts)
    return {name: torch.cat([objects.rows(part, name) for part in parts]) for name in names}


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
        data = read_part(self._store, f"{self.manifest.directory}/{self._name(rank)}")
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
