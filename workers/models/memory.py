"""What training keeps in a device's memory, in closed form and without torch: an estimate to plan with.

Weights, gradients, moments and the average of weights are exact. Not counted: the framework itself,
workspaces of kernels, fragments. On a GPU `microbatch_size: auto` measures what really fits.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil, prod

from workers.config import RunConfig
from workers.models.activations import FLOAT, activations, element_bytes
from workers.models.layers import is_frozen
from workers.models.shapes import Shapes, parameter_shapes

ROW_BYTES = 20
"""Of a batch, beside each image: label, weight and slot."""
MOMENTS = {"adamw": 2, "lamb": 2, "muon": 2, "sgd": 1}
"""muon: of what it leaves to AdamW; of matrices it has one."""
RESERVE = 0.08
"""Of a GPU's memory, for fragments and what libraries take."""


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of the rank that holds most, by kind. Not all are there at once: `peak` is the most that is."""

    parameters: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    """Of a microbatch, with their gradients and what is computed again, at their widest."""
    batches: int
    unsharded: int
    """What FSDP gathers and has not reduced yet; or copies of the weights in bfloat16."""
    peak: int


def training_memory(config: RunConfig, workers: int, *, cuda: bool | None = None) -> TrainingMemory:
    """Of each of so many workers. `cuda`: None says it by compute.gpus_per_worker."""
    return _Step(config, workers, config.compute.gpus_per_worker > 0 if cuda is None else cuda).memory()


def rank_images(config: RunConfig, workers: int) -> int:
    """Of a global batch: the most that one rank has."""
    lanes = config.data.lanes
    return config.train.global_batch_size // lanes * ceil(lanes / workers)


def microbatch(config: RunConfig, workers: int) -> int:
    """Images per forward; of `auto`, which takes as many as fit, one: the least that a device must hold."""
    asked, share = config.compute.microbatch_size, rank_images(config, workers)
    return 1 if asked == "auto" else min(share, asked or share)


def uses_fsdp(config: RunConfig, workers: int, *, cuda: bool) -> bool:
    """As `workers/training/parallel.py` decides."""
    plain = config.train.precision == "float32"
    recomputes = config.compute.activation_checkpointing != "none"
    return not (workers == 1 and (plain or (not cuda and not recomputes)))


def checkpoint_bytes(config: RunConfig) -> int:
    """Of all objects of a checkpoint: weights, moments and average, whole."""
    shapes = parameter_shapes(config.model)
    copies = 2 if config.optim.ema_images else 1
    weights = sum(prod(shape) for group in shapes for shape in group.values())
    return FLOAT * (copies * weights + sum(_moments(config, shapes, 1)))


class _Step:
    """Of one rank."""

    def __init__(self, config: RunConfig, workers: int, cuda: bool) -> None:
        self.config, self.cuda = config, cuda
        self.sharing = min(workers, config.compute.shard_workers or workers)
        self.shapes = parameter_shapes(config.model)
        self.trained = _trained(config, self.shapes)
        self.images = rank_images(config, workers)
        self.microbatch = microbatch(config, workers)
        self.each = element_bytes(config)
        self.fsdp = uses_fsdp(config, workers, cuda=cuda)
        self.units = activations(config, cuda=cuda)

    def memory(self) -> TrainingMemory:
        parameters = FLOAT * sum(_rows(self.shapes, self.sharing))
        gradients = FLOAT * sum(_rows(self.trained, self.sharing))
        optimizer = FLOAT * sum(_moments(self.config, self.shapes, self.sharing))
        average = parameters if self.config.optim.ema_images else 0
        batches = self._batch_bytes()
        moments = list(self._backward())
        # Of LAMB and Muon updates that are not applied yet.
        updates = gradients if self.config.optim.optimizer in ("lamb", "muon") else 0
        own = [activations + gradients + more for activations, gradients, more in moments]
        return TrainingMemory(
            parameters=parameters,
            gradients=gradients,
            optimizer=optimizer,
            average=average,
            activations=max(activations for activations, _, _ in moments),
            batches=batches,
            unsharded=max(more for _, _, more in moments),
            peak=parameters + optimizer + average + batches + max(*own, gradients + updates),
        )

    def _batch_bytes(self) -> int:
        height, width = self.config.model.image_shape
        image = self.config.model.channels * height * width
        mixed = self.config.data.augment.mixes
        targets = self.config.model.num_classes * FLOAT if mixed else 0
        return self.images * (image * (2 if mixed else 1) + ROW_BYTES + targets)

    def _backward(self) -> Iterable[tuple[int, int, int]]:
        """(activations, gradients, unsharded) while each unit's backward pass runs, from the last block to
        what is outside of blocks."""
        outside, *blocks = self.units
        whole = [sum(prod(shape) for shape in group.values()) for group in self.trained]
        gathered = [sum(prod(shape) for shape in group.values()) for group in self.shapes]
        shards = _rows(self.trained, self.sharing)
        left, filters = [outside.kept], [outside.filters]
        for unit in blocks:
            left.append(left[-1] + unit.kept)
            filters.append(filters[-1] + unit.filters)
        # Those of the microbatches before this one stay, whole where FSDP has not reduced them.
        summed = not self.fsdp and self.microbatch < self.images
        done = FLOAT * sum(whole) if summed else 0
        for at in range(len(blocks), -1, -1):
            unit = self.units[at]
            held = (left[at - 1] if at else 0) + unit.whole + unit.work
            # With the gradients of a block's own, before and after standardisation.
            held = self.microbatch * held + filters[at] + (2 * unit.filters if at else 0)
            yield held, done, self._unsharded(at, gathered, whole)
            done += 0 if summed else FLOAT * (shards[at] if self.fsdp else whole[at])

    def _unsharded(self, at: int, gathered: list[int], whole: list[int]) -> int:
        if not self.fsdp:
            # Copies of all weights, by autograd, where it computes in bfloat16 on a CPU.
            return self.each * sum(gathered) if self.each < FLOAT else 0
        if self.sharing == 1:
            return self.each * sum(gathered)
        # What is outside of blocks stays whole; of a block its weights, those of the next one, its
        # gradients, and these again as they are summed over ranks.
        more = gathered[0] * self.each
        if at:
            more += (gathered[at] + (gathered[at - 1] if at > 1 else 0)) * self.each
        more += whole[at] * (self.each + FLOAT)
        if self.microbatch < self.images:
            # Only the last microbatch's are summed over ranks; until then they stay whole.
            more += FLOAT * sum(whole[: at + 1])
        return more


def _trained(config: RunConfig, groups: list[Shapes]) -> list[Shapes]:
    depth = len(groups) - 1
    fixed = (
        {"pos_embed"} if config.model.positions == "sincos2d" and config.model.family != "resnet" else set()
    )
    return [
        {
            name: shape
            for name, shape in group.items()
            if name not in fixed and not is_frozen(name, depth, config.optim.freeze)
        }
        for group in groups
    ]


def _moments(config: RunConfig, groups: list[Shapes], sharing: int) -> list[int]:
    """Numbers, of each group."""
    kind = config.optim.optimizer
    totals = []
    for group in _trained(config, groups):
        matrices: Shapes = {
            name: shape for name, shape in group.items() if name.startswith("blocks.") and len(shape) == 2
        }
        total = MOMENTS[kind] * _rows([group], sharing)[0]
        totals.append(total - _rows([matrices], sharing)[0] if kind == "muon" else total)
    return totals


def _rows(groups: Iterable[Shapes], sharing: int) -> list[int]:
    """Numbers of the first rank of a shard group: tensors are split along their first dimension, as
    `torch.chunk` does."""
    return [sum(ceil(shape[0] / sharing) * prod(shape[1:]) for shape in group.values()) for group in groups]
