"""Fine-tunes each new holder of an alias: looks again and again, and does what is not done.

Who holds the alias is in the log of promotions, what was fine-tuned of it in the store of runs and the
registry, whether a job is wished beside the job: nothing is remembered here, so a watch may be killed at any
time, and several at once do no harm.
"""

from collections.abc import Callable
from typing import Protocol

from rich.console import Console

from orchestrator.job import JobSpec, find_spec
from orchestrator.job_records import find_wish
from orchestrator.registry import Registry, open_registry
from orchestrator.site import Site
from orchestrator.supervisor import Stopped, Supervisor
from orchestrator.versions import Version
from pipelines.finetune import Tuning, finetune_configs, name_children, sweep_label
from pipelines.interrupts import Interrupts
from pipelines.pipeline.file import Pipeline
from pipelines.pipeline.run import new_states, plan, run
from pipelines.pipeline.show import shown
from pipelines.pipeline.tell import teller
from pipelines.pretrain import find_versions, make_spec, submit
from workers.config import RunConfig
from workers.errors import ConfigError, VitscaleError
from workers.storage import Unavailable, open_store

Tell = Callable[[str], None]


class Plan(Protocol):
    """What is to become of an alias's holder."""

    def step(self, registry: Registry, holder: Version) -> str:
        """Do what is not done and can be done now, and say how it stands."""


class Jobs:
    """Those of a watch, which waits for none."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._supervisors: dict[str, Supervisor] = {}
        """By their specifications' digests."""

    def look(self, spec: JobSpec, command: str) -> tuple[Supervisor, bool]:
        """After a job that somebody has asked for, and whether it is done; one that died is started again.

        Stopped if somebody has stopped it: `command` goes on. What it has failed of for good, at each look,
        until somebody asks for it anew."""
        found = find_wish(open_store(spec.runs), spec.digest)
        if found is not None and not found.running:
            why = f"stopped: {found.reason}" if found.reason else "stopped by somebody"
            raise Stopped(f"{why}; {command} goes on")
        supervisor = self._supervisors.pop(spec.digest, None) or Supervisor(self._site, spec)
        done = supervisor.step()
        self._supervisors[spec.digest] = supervisor
        return supervisor, done


class FineTune:
    """Children of the holder, trained by a job that this starts and keeps alive without waiting for it."""

    def __init__(self, site: Site, tuning: Tuning, register_as: str | None) -> None:
        self._site, self._tuning, self._register_as = site, tuning, register_as
        self._jobs = Jobs(site)
        self._configs: dict[str, list[RunConfig]] = {}
        """By the holder's digest."""

    def step(self, registry: Registry, holder: Version) -> str:
        if holder.digest not in self._configs:
            self._configs = {holder.digest: finetune_configs(self._site, holder, self._tuning)}
        configs = self._configs[holder.digest]
        runs = name_children(configs, self._register_as)
        found = find_versions(registry, self._site, runs)
        children = [version.label for version in found if version is not None]
        if len(children) == len(runs):
            return f"has its children: {', '.join(children)}"
        label = sweep_label(configs)
        return f"{label}: {self._keep_alive(make_spec(self._site, runs, label))}"

    def _keep_alive(self, spec: JobSpec) -> str:
        """Start it, unless somebody has stopped it, or see how it stands."""
        if find_wish(open_store(spec.runs), spec.digest) is None:
            submit(self._site, spec)
        try:
            supervisor, done = self._jobs.look(spec, "`vitscale finetune` with the same options")
        except Stopped as error:
            return str(error)
        except VitscaleError as error:
            return f"failed: {error}"
        if done:
            return "done, but not in the registry; `vitscale finetune` with the same options registers it"
        return supervisor.note or f"job {supervisor.job} runs"


class RunPipeline:
    """A pipeline that begins with the holder; attached to it until it ends."""

    def __init__(self, site: Site, pipeline: Pipeline, reference: str, console: Console) -> None:
        if reference not in pipeline.outside():
            raise ConfigError(f"pipeline {pipeline.name}: none of its stages takes {reference}")
        self._site, self._pipeline, self._console = site, pipeline, console
        self._jobs = Jobs(site)
        self._ended: dict[str, str] = {}
        """How it ended, by digests of holders: it is not tried again until there is another."""

    def step(self, registry: Registry, holder: Version) -> str:
        if holder.digest not in self._ended:
            try:
                if held := self._held():
                    return held
                self._run()
                self._ended[holder.digest] = f"pipeline {self._pipeline.name} is done"
            except Unavailable:
                raise  # it comes back
            except VitscaleError as error:
                self._ended[holder.digest] = f"ended: {error}"
        return self._ended[holder.digest]

    def _held(self) -> str:
        """A job of its stages that somebody has stopped, or that has failed for good, is not begun again."""
        states = new_states(self._pipeline)
        plan(self._site, self._pipeline, states)
        for state in states:
            for run_name in state.runs if state.state != "done" else ():
                try:
                    spec = find_spec(self._site.runs, run_name)
                except ConfigError:
                    continue  # nobody has asked for it yet
                try:
                    self._jobs.look(spec, "`vitscale run` with this pipeline")
                except Stopped as error:
                    return f"stage {state.name}: {error}"
                except VitscaleError as error:
                    return f"stage {state.name}: failed: {error}"
        return ""

    def _run(self) -> None:
        states = new_states(self._pipeline)
        with shown(states, self._console) as show:
            told = [show, teller(self._site, self._pipeline)]
            run(self._site, self._pipeline, states, self._console, told, detach=True)


class Watch:
    def __init__(self, site: Site, model: str, alias: str, plan: Plan, tell: Tell) -> None:
        self._site, self._model, self._alias, self._plan = site, model, alias, plan
        self._tell = tell
        self._registry: Registry | None = None
        self._told = ""

    def look(self) -> None:
        """Once: start what is missing, keep alive what runs."""
        self._registry = self._registry or open_registry(self._site)
        self._registry.reconcile(self._model)  # it warns of what was moved by hand
        holder = self._registry.resolve(f"{self._model}@{self._alias}")
        self._say(f"{self._model}@{self._alias}, {holder.label}: {self._plan.step(self._registry, holder)}")

    def watch(self, every: float) -> None:
        """Until a signal comes; what runs then goes on without it. Outages, and what is wrong with one
        holder, are told and waited out."""
        with Interrupts() as interrupts:
            try:
                while True:
                    try:
                        self.look()
                    except VitscaleError as error:
                        self._registry = None
                        self._say(f"{self._model}@{self._alias}: {error}; looking again")
                    interrupts.wait(every)
            except KeyboardInterrupt:
                self._say("ended; the same command goes on from here")

    def _say(self, text: str) -> None:
        """Only what is new."""
        if text != self._told:
            self._told = text
            self._tell(text)
