"""R4, R5: a run outlives its driver, Ray's controller, its supervisor, and the whole cluster."""

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator

import psutil

from orchestrator.daemons import ray_folder
from orchestrator.job import run_url
from orchestrator.processes import State, family
from tests.chaos.checkpoints import same_run
from tests.chaos.cluster import PATIENCE, LocalCluster, await_group, write_config
from tests.chaos.row import Lab, Row
from tests.chaos.tracking import told_wrongly
from tests.processes import command_line
from tests.runs import BATCH, tiny_config, train_on
from workers.config import RunConfig
from workers.storage import open_store
from workers.training.commits import CommitLog

STEPS, SHORT_STEPS = 120, 60


class Life:
    """A submitted run, a process that supervises it, and the cluster that it is on."""

    def __init__(self, lab: Lab, cluster: LocalCluster, config: RunConfig) -> None:
        self.cluster, self.config = cluster, config
        self.url = run_url(cluster.site.runs, config)
        self.log = CommitLog(open_store(self.url))
        self._said = lab.new_folder("log")
        submitted = cluster.command("submit", str(write_config(lab.folder, config)), log=self._said)
        assert submitted.wait(PATIENCE) == 0, self._said.read_text()
        self.supervise()

    def supervise(self) -> None:
        """As systemd would, again and again."""
        self.supervisor = self.cluster.command("supervise", self.config.run, log=self._said)

    def end(self) -> str:
        """What went wrong, once the supervisor says that the run is done."""
        try:
            code = self.supervisor.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.supervisor.kill()
            self.supervisor.wait()
            return f"not done {PATIENCE:.0f} s later: {self._said.read_text()[-300:]}"
        return f"the supervisor ends with {code}: {self._said.read_text()[-300:]}" if code else ""


def kill_driver(life: Life) -> bool:
    return kill_all(life.cluster.processes("orchestrator.driver"))


def kill_controller(life: Life) -> bool:
    return kill_all(life.cluster.processes("TrainController"))


def kill_supervisor(life: Life) -> bool:
    life.supervisor.kill()
    life.supervisor.wait()
    life.supervise()
    return True


def kill_cluster(life: Life) -> bool:
    """All of Ray with SIGKILL, and what it remembered; then a new one."""
    folder = life.cluster.folder
    while members := [p for p in family(State.load(folder).services["ray"]) if is_alive(p)]:
        kill_all(members)
        time.sleep(0.2)
    shutil.rmtree(ray_folder(folder), ignore_errors=True)
    life.cluster.up()
    return True


def kill_all(processes: list[psutil.Process]) -> bool:
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    return bool(processes)


def is_alive(process: psutil.Process) -> bool:
    return bool(command_line(process))


def lives(kills: dict[str, Callable[[Life], bool]]) -> Callable[[Lab], Iterator[str]]:
    """Trials in which one of these happens to a run of its own."""

    def trials(lab: Lab) -> Iterator[str]:
        with LocalCluster(lab.new_folder("site")) as cluster:
            number, steps = 0, SHORT_STEPS if lab.short else STEPS
            while True:
                for what, kill in lab.random.sample(list(kills.items()), len(kills)):
                    number += 1
                    config = tiny_config(
                        lab.data,
                        f"train.checkpoint_every_images={5 * BATCH}",
                        f"train.eval_every_images={steps * BATCH}",
                        "train.probe_images=0",
                        "compute.deterministic=true",
                        f"seed={number}",
                        "name=life",
                        steps=steps,
                    )
                    yield outlives(lab, cluster, config, what, kill)

    return trials


def outlives(
    lab: Lab, cluster: LocalCluster, config: RunConfig, what: str, kill: Callable[[Life], bool]
) -> str:
    undisturbed = lab.new_url("undisturbed")
    train_on(2, config, undisturbed, PATIENCE)
    life = Life(lab, cluster, config)
    if not await_group(life.log, 0, lab.random.randint(1, 3), life.supervisor):
        return f"{what}: the run was over before"
    time.sleep(lab.random.uniform(0, 0.5))
    epoch = life.log.newest_epoch() or 0
    if not kill(life):
        return f"{what}: there is none"
    started = time.monotonic()
    if kill is not kill_supervisor and await_group(life.log, epoch + 1, 0, life.supervisor):
        lab.seconds.append(time.monotonic() - started)
    if problem := life.end():
        return f"{what}: {problem}"
    if not same_run(life.url, undisturbed):
        return f"{what}: another result"
    wrong = told_wrongly(cluster.site.mlflow, "vitscale", config, life.url)
    return f"{what}: {wrong}" if wrong else ""


ROWS = [
    Row(
        "R4",
        "driver, controller, supervisor killed: the run ends as if nothing had been",
        lives(
            {
                "the driver is killed": kill_driver,
                "the controller is killed": kill_controller,
                "the supervisor is killed": kill_supervisor,
            }
        ),
        short=1,
        cluster=True,
    ),
    Row(
        "R5",
        "the whole cluster is lost and another comes: the run ends as if nothing had been",
        lives({"the cluster is lost": kill_cluster}),
        short=0,
        cluster=True,
    ),
]
