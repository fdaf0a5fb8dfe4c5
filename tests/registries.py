"""A site that lives through anything: runs are saved, registered, promoted, rolled back, retired, fine-tuned
from and collected, by clients of which any may die. For Hypothesis, in a test and in soaks (row R16)."""

import contextlib
import functools
import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from mlflow.exceptions import MlflowException

from orchestrator.gates import Gate
from orchestrator.job import JobSpec, write_spec
from orchestrator.job_records import wish, write_done
from orchestrator.registry import Registry
from orchestrator.retention import Retention
from orchestrator.versions import Version
from tests.fake_mlflow import FakeMlflow
from tests.test_config import changed
from tests.test_retention import Run, Stopped
from workers.config import RunConfig, make_config
from workers.errors import CheckpointError, ConfigError, DataError
from workers.storage import NotFound, S3Store, Store, join_url, open_store
from workers.training.commits import Commit
from workers.training.manifest import MANIFEST, open_manifest

MODELS, ALIASES = ("toy", "other"), ("champion", "candidate")
MEMORY = Path("/dev/shm")
FIRST = {**changed("model.size", "digits-xs"), "init": None}


@functools.cache
def first_config(seed: int) -> RunConfig:
    return make_config({**FIRST, "seed": seed})


def verify(url: str, digest: str) -> str:
    """What a restore test reads, without a model of it."""
    store, manifest = open_manifest(url, digest)
    for name, entry in manifest.objects.items():
        data = store.read(f"{manifest.directory}/{name}")
        assert hashlib.sha256(data).hexdigest() == entry["sha256"]
    return "it is there"


def begin_upload(store: Store, key: str) -> None:
    """Whose writer dies in it: a temporary file, or parts that nobody completes."""
    if isinstance(store, S3Store):
        name = {"Bucket": store.bucket, "Key": f"{store.prefix}/{key}"}
        store._client.write("create_multipart_upload", store.url, **name)
    else:
        (store.root / key).with_name(".tmp-1").write_bytes(b"half")


class Trained:
    """A run and whoever writes it."""

    def __init__(self, runs: str, config: RunConfig, spec: JobSpec | None = None) -> None:
        self.config, self.spec = config, spec
        self.writer = Run(runs, config.run, config.model_dump(mode="json"))
        self.writer.metrics = {"val_accuracy": 0.9}
        self.images = 0
        self.complete = False

    def commit(self, *, complete: bool = False) -> None:
        self.images += 1
        self.writer.commit(self.images, complete=complete)
        self.complete = complete

    @property
    def lineage(self) -> list[Commit]:
        head = self.writer.log.head()
        return list(self.writer.log.lineage_from(head.seq)) if head else []


class SiteMachine(RuleBasedStateMachine):
    bucket = ""
    """Of an S3 server; empty: a folder."""

    def __init__(self) -> None:
        super().__init__()
        # In memory: a third of the time is fsync.
        self.folder = tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None)
        folder = Path(self.folder.name)
        self.url = join_url(self.bucket, folder.name) if self.bucket else folder.as_uri()
        self.mlflow = FakeMlflow()
        self.registry = Registry(self.mlflow, self.url)
        self.runs: list[Trained] = []
        self.retired: set[tuple[str, int]] = set()
        self.evaluations: dict[str, str] = {}
        """Keys, and the manifests of what was measured."""
        self.patches = contextlib.ExitStack()
        self.patches.enter_context(mock.patch("workers.training.restore.restore_test", verify))
        for number in range(2):
            # There is something from the start: most sequences would not come so far.
            run = Trained(self.url, first_config(number))
            run.commit(complete=True)
            self.registry.register("toy", run.config, "id")
            self.runs.append(run)

    def teardown(self) -> None:
        try:
            self.nothing_is_left_that_nobody_needs()
        finally:
            self.patches.close()
            self.folder.cleanup()

    # What users and clusters do.

    @rule()
    def begin(self) -> None:
        self.runs.append(Trained(self.url, first_config(len(self.runs))))

    @precondition(lambda self: self.unfinished())
    @rule(data=st.data(), complete=st.booleans())
    def save(self, data: st.DataObject, complete: bool) -> None:
        data.draw(st.sampled_from(self.unfinished())).commit(complete=complete)

    @precondition(lambda self: self.unfinished())
    @rule(data=st.data(), manifest=st.booleans(), upload=st.booleans(), again=st.booleans())
    def die_in_a_commit(self, data: st.DataObject, manifest: bool, upload: bool, again: bool) -> None:
        run = data.draw(st.sampled_from(self.unfinished()))
        run.images += 1
        directory, _ = run.writer.write(run.images, manifest=manifest)
        if upload:
            begin_upload(run.writer.store, f"{directory}/optimizer-00000-of-00001.safetensors")
        if again:
            run.writer.start()

    @precondition(lambda self: self.finished())
    @rule(data=st.data(), model=st.sampled_from(MODELS), dies=st.booleans())
    def register(self, data: st.DataObject, model: str, dies: bool) -> None:
        """As a driver at the end of its job; if it dies, MLflow has the version and nobody heard of it."""
        run = data.draw(st.sampled_from(self.finished()))
        if not run.writer.has(run.lineage[0]):
            assert self.is_out_of_use(run)
            return
        with self.lost_reply() if dies else contextlib.nullcontext():
            self.registry.register(model, run.config, "id")
        if run.spec is not None and not dies:
            write_done(open_store(self.url), run.spec.digest)

    @precondition(lambda self: self.registry.versions())
    @rule(data=st.data(), alias=st.sampled_from(ALIASES), dies=st.booleans())
    def promote(self, data: st.DataObject, alias: str, dies: bool) -> None:
        version = self.any_version(data)
        if dies:
            self.mlflow.before_alias = _die
        try:
            self.registry.promote(version, alias, Gate())
        except CheckpointError:
            assert (version.model, version.version) in self.retired
        except Stopped:
            assert dies
        self.mlflow.before_alias = lambda: None

    @precondition(lambda self: self.registry.log.models())
    @rule(data=st.data(), alias=st.sampled_from(ALIASES))
    def roll_back(self, data: st.DataObject, alias: str) -> None:
        model = data.draw(st.sampled_from(sorted(self.registry.log.models())))
        # There may be nothing to go back to, or a retired one.
        with contextlib.suppress(ConfigError, CheckpointError):
            self.registry.roll_back(model, alias, None, "")

    @precondition(lambda self: self.registry.versions())
    @rule(data=st.data())
    def retire(self, data: st.DataObject) -> None:
        version = self.any_version(data)
        needed = version.manifest in {url for url, unfinished in self.begun_with() if unfinished}
        held = version.label in {f"{p.model}/{p.version}" for p in self.holders()}
        try:
            self.registry.retire(version.model, version.version, "")
        except ConfigError:
            assert needed or held
        else:
            assert not held
            self.retired.add((version.model, version.version))

    @precondition(lambda self: self.registry.versions())
    @rule(data=st.data(), begins=st.booleans())
    def fine_tune(self, data: st.DataObject, begins: bool) -> None:
        """A job is submitted; its run may begin at once, or never."""
        version = self.any_version(data)
        if (version.model, version.version) in self.retired:
            return
        init = {"manifest": version.manifest, "digest": version.digest, "parent": version.label}
        config = make_config({**FIRST, "seed": len(self.runs), "init": {**init, "new_head": False}})
        spec = JobSpec(configs=(config,), runs=self.url, mlflow="http://x", experiment="x")
        write_spec(spec)
        wish(open_store(self.url), spec.digest, running=True)
        child = Trained(self.url, config, spec)
        if begins:
            child.commit()
        self.runs.append(child)

    @precondition(lambda self: self.finished())
    @rule(data=st.data())
    def evaluate(self, data: st.DataObject) -> None:
        run = data.draw(st.sampled_from(self.finished()))
        commit = run.lineage[0]
        if run.writer.has(commit):
            key = f"runs/{run.config.run}/evaluations/{commit.digest[:16]}-{16 * 'a'}-8/0000.json"
            open_store(self.url).write(key, b"{}")
            self.evaluations[key] = run.writer.url_of(commit)

    @rule()
    def reconcile(self) -> None:
        for model in self.registry.models():
            self.registry.reconcile(model)
        assert {(a.model, a.alias): str(a.version) for a in self.holders()} == self.mlflow.aliases

    @rule(keep=st.integers(1, 3) | st.none(), stop_after=st.integers(0, 6) | st.none())
    def collect(self, keep: int | None, stop_after: int | None) -> None:
        retention = self.retention(keep)
        delete, left = retention._store.delete, iter(range(stop_after if stop_after is not None else 1 << 30))

        def stopped(key: str) -> None:
            if next(left, None) is None:
                raise Stopped
            delete(key)

        retention._store.delete = stopped
        with contextlib.suppress(Stopped):
            for garbage in list(retention.garbage()):
                retention.delete(garbage)

    # What must be true at all times.

    @invariant()
    def what_is_named_is_there(self) -> None:
        for version in self.registry.versions():
            if (version.model, version.version) not in self.retired:
                verify(version.manifest, version.digest)
        for promotion in self.holders():
            verify(promotion.manifest, promotion.digest)
        for run in self.runs:
            if run.lineage and not self.is_out_of_use(run):
                assert run.writer.has(run.lineage[0])
            if run.config.init is not None and self.is_needed(run):
                verify(run.config.init.manifest, run.config.init.digest)
        for key, manifest in self.evaluations.items():
            assert self.is_there(key) or not self.is_there(manifest.removeprefix(f"{self.url}/"))

    @invariant()
    def mlflow_names_what_was_promoted(self) -> None:
        for (model, alias), version in self.mlflow.aliases.items():
            assert (alias, int(version)) in {(p.alias, p.version) for p in self.registry.log.read(model)}

    def nothing_is_left_that_nobody_needs(self) -> None:
        """All writers are gone, and whoever begins again finds a store without a byte too many."""
        for run in self.unfinished():
            run.writer.start()
        keep = 2
        retention = self.retention(keep)
        for garbage in list(retention.garbage()):
            retention.delete(garbage)
        for upload in list(retention.uploads()):
            retention.abort(upload)
        assert list(open_store(self.url).uploads()) == []
        assert list(self.retention(keep).garbage()) == list(self.retention(keep).uploads()) == []
        needed = {v.manifest for v in self.registry.versions() if (v.model, v.version) not in self.retired}
        needed |= {promotion.manifest for promotion in self.holders()}
        needed |= {url for url, _ in self.begun_with()}
        for run in self.runs:
            if not self.is_out_of_use(run):
                needed |= {run.writer.url_of(commit) for commit in run.lineage[:keep]}
        store = open_store(self.url)
        left = {info.key.rpartition("/")[0] for info in store.list("runs/") if "/checkpoints/" in info.key}
        wanted = {url.removeprefix(f"{self.url}/").removesuffix(f"/{MANIFEST}") for url in needed}
        assert left <= wanted, "orphans"
        for key, manifest in self.evaluations.items():
            assert self.is_there(key) == self.is_there(manifest.removeprefix(f"{self.url}/"))
        self.what_is_named_is_there()

    # What is the case.

    def is_there(self, key: str) -> bool:
        try:
            open_store(self.url).head(key)
        except NotFound:
            return False
        return True

    def unfinished(self) -> list[Trained]:
        return [run for run in self.runs if not run.complete]

    def finished(self) -> list[Trained]:
        return [run for run in self.runs if run.complete]

    def holders(self) -> list[Any]:
        return [p for model in self.registry.log.models() for p in self.registry.log.holders(model).values()]

    def any_version(self, data: st.DataObject) -> Version:
        return data.draw(st.sampled_from(self.registry.versions()))

    def begun_with(self) -> Iterator[tuple[str, bool]]:
        """Manifests that jobs and runs begin with, and whether these have not come to their end."""
        for run in self.runs:
            if run.config.init is not None:
                yield run.config.init.manifest, self.is_needed(run)

    def is_needed(self, run: Trained) -> bool:
        """Does it need what it began with? Until its job is done."""
        assert run.spec is not None
        return not any(
            info.key == f"jobs/{run.spec.digest}.done" for info in open_store(self.url).list("jobs/")
        )

    def is_out_of_use(self, run: Trained) -> bool:
        """Its result was retired wherever it was registered."""
        if not run.complete:
            return False
        url = run.writer.url_of(run.lineage[0])
        of = [v for v in self.registry.versions() if v.manifest == url]
        return bool(of) and all((v.model, v.version) in self.retired for v in of)

    def retention(self, keep: int | None) -> Retention:
        now = float("inf")
        registry = Registry(self.mlflow, self.url)
        return Retention(
            self.url, registry.needed(now), retired=registry.retired(now), keep=keep, older_than=-10
        )

    @contextlib.contextmanager
    def lost_reply(self) -> Iterator[None]:
        create = self.mlflow.create_model_version

        def lose(*arguments: Any, **fields: Any) -> None:
            create(*arguments, **fields)
            # And whoever looks for it afterwards is dead.
            self.mlflow.down = True
            raise MlflowException("connection reset")

        self.mlflow.create_model_version = lose
        try:
            with contextlib.suppress(DataError):
                yield
        finally:
            self.mlflow.create_model_version = create
            self.mlflow.down = False


def _die() -> None:
    raise Stopped


def run_sequences(count: int, *, shrink: bool = True, machine: type[SiteMachine] = SiteMachine) -> None:
    """Whatever a sequence ends with is raised, for the shortest one that is found if it is to `shrink`."""
    phases = (Phase.generate, Phase.shrink) if shrink else (Phase.generate,)
    plain = settings(max_examples=count, stateful_step_count=25, deadline=None, database=None, phases=phases)
    run_state_machine_as_test(machine, settings=plain)
