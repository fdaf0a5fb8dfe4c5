"""`vitscale plan`: what is known of a run before it is started, gathered and as a table."""

from dataclasses import asdict, replace

from rich.console import Group
from rich.table import Table

from orchestrator.fitting import needed_bytes
from orchestrator.machine import Machine
from orchestrator.past_runs import PastRun
from orchestrator.planning import Plan, make_plan
from orchestrator.speed import model_label
from pipelines.terminal import clock
from workers.config import RunConfig
from workers.data.decode_rate import measure_decoding
from workers.data.index import DatasetIndex

GIB = 2**30
KINDS = {
    "parameters": "weights",
    "gradients": "their gradients",
    "optimizer": "the optimizer's moments",
    "average": "the moving average",
    "activations": "activations of a microbatch, at their widest",
    "batches": "images of a batch",
    "unsharded": "gathered or not reduced yet",
}
HOST_KINDS = {
    "process": "interpreter and libraries",
    "tensors": "the training step's tensors",
    "allocator": "freed tensors that the C library keeps",
    "snapshots": "a checkpoint on its way to the store",
    "lookahead": "samples read ahead, at most",
    "batches": "decoded batches",
}


def plan_run(
    config: RunConfig, machine: Machine, *, workers: int, past: list[PastRun], measured: bool
) -> Plan:
    """`measured`: time this machine's training and decoding first, half a minute."""
    data = DatasetIndex.open(config.data.url)
    if measured:
        from pipelines.scaling.measure import measure

        found = measure([config], lambda label, speed: None)
        decoding = measure_decoding(config, data)
        machine = replace(machine, speed=found[model_label(config)], decoding=decoding)
    validation = DatasetIndex.open(config.data.validation_url).num_samples
    return make_plan(config, machine, workers=workers, data=data, num_validation=validation, past=past)


def as_table(plan: Plan) -> Group:
    return Group(_model(plan), "", _memory(plan), "", *_lines(plan))


def _model(plan: Plan) -> str:
    return (
        f"{plan.run}: {plan.parameters:,} parameters, {plan.flops_per_image / 1e9:.3g} GFLOPs/image forward, "
        f"{plan.training_flops:.3g} FLOPs of training, {plan.workers} workers on {plan.hardware}"
    )


def _memory(plan: Plan) -> Table:
    table = Table("memory of a worker", "GiB", "", box=None)
    memory, host = asdict(plan.memory), asdict(plan.host)
    for name, text in KINDS.items():
        if memory[name]:
            table.add_row(f"  {name}", f"{memory[name] / GIB:.3f}", text)
    table.add_row("device, at its peak", f"{memory['peak'] / GIB:.3f}", "not all of these are there at once")
    for name, text in HOST_KINDS.items():
        if host[name]:
            table.add_row(f"  {name}", f"{host[name] / GIB:.3f}", text)
    table.add_row("host", f"{plan.host.total / GIB:.3f}", "")
    if plan.memory_limit is not None:
        share = needed_bytes(plan.memory, plan.host) / plan.memory_limit
        table.add_row("of what it has", f"{plan.memory_limit / GIB:.3f}", f"{share:.0%}")
    return table


def _lines(plan: Plan) -> list[str]:
    lines = []
    if plan.speed is not None and plan.images_per_second is not None:
        mfu = "" if plan.mfu is None else f", {plan.mfu:.1%} MFU"
        lines.append(f"speed: {plan.images_per_second:,.4g} images/s{mfu}; {plan.speed.source}")
    lines.append(
        f"data: {plan.decodable_per_second:,.0f} images/s can be decoded; "
        f"{plan.decoding.images_per_second:,.0f} a core, {plan.decoding.source}"
    )
    if plan.reads is not None and plan.epochs is not None:
        how = "at first, then held in memory" if plan.reads.held_by else "an epoch"
        lines.append(
            f"reads: {plan.reads.gets:,} GETs and {plan.reads.num_bytes / 1e9:.3g} GB {how}, "
            f"{plan.reads.row_gets:,} GETs of the index; {plan.epochs:.3g} epochs, {plan.gets:,} GETs in all"
        )
    commit = "" if plan.commit_seconds is None else f", {clock(plan.commit_seconds)} each"
    lines.append(
        f"writes: {plan.writes.commits:,} commits of {plan.writes.num_bytes / 1e9:.3g} GB and "
        f"{plan.writes.puts:,} PUTs{commit}; {plan.puts:,} PUTs in all"
    )
    lines.append(_time(plan))
    if plan.price is not None:
        lines.append(f"price: {plan.price:,.2f} {plan.currency}".rstrip())
    lines += plan.limits
    if plan.suggestions:
        lines.append(f"fits with: {plan.suggestions[0]}")
        lines += [f"       or: {other}" for other in plan.suggestions[1:]]
    return lines


def _time(plan: Plan) -> str:
    if plan.seconds is None:
        return "time: unknown"
    text = f"time: {clock(plan.seconds)} from submission to the last commit"
    if plan.interval is not None:
        low, high = map(clock, plan.interval)
        return f"{text}; 90 % interval {low} to {high}, by {plan.interval_runs} past runs on {plan.hardware}"
    return f"{text}; no interval: {plan.interval_runs} past runs on {plan.hardware}, 9 are needed"
