"""Measuring as a job of the cluster: a task for each part of the validation set."""

import hashlib
import secrets
from collections.abc import Sequence

import torch

import workers
from orchestrator.site import Site
from pipelines.evaluation.measure import Bar, Subject, join_parts
from pipelines.evaluation.tasks import EXTRAS, PART_IMAGES, Asked, Extras, extras_key, read_extras, read_part
from workers.config import ComputeConfig
from workers.data.quarantine import BadSample
from workers.errors import DataError
from workers.evaluation.predictions import Predictions
from workers.storage import join_url, open_store

JOB = "pipelines.evaluation.job"


class ClusterJob:
    """Of one subject; `url` is where its results are kept."""

    def __init__(
        self, site: Site, subject: Subject, url: str, *, data: str | None, gpus: int | None, fresh: bool
    ) -> None:
        """`gpus`: of each task; None: as many as a worker of its training had. `fresh`: what another job has
        left is not used."""
        self._site = site
        self._extras = ""
        """Key of what was measured besides predictions."""
        self._total = subject.validation.num_samples
        config = subject.manifest.run_config
        compute = config.compute if config else ComputeConfig()
        self._cpus = compute.cpus_per_worker
        self._gpus = compute.gpus_per_worker if gpus is None else gpus
        # What other code or other batches give is the same but for the last digits; it is kept apart.
        alone = secrets.token_hex(4) if fresh else ""
        facts = (workers.__version__, torch.__version__, subject.batch_size, self._cpus, self._gpus, alone)
        folder = join_url(url, "parts", hashlib.sha256(repr(facts).encode()).hexdigest()[:8])
        self._asked = Asked(
            name=subject.checkpoint.name,
            url=subject.checkpoint.url,
            digest=subject.checkpoint.digest,
            data=data,
            fingerprint=subject.validation.fingerprint,
            image_size=subject.facts.image_size,
            batch_size=subject.batch_size,
            folder=folder,
        )

    def predict(self, bar: Bar) -> tuple[Predictions, list[BadSample], str]:
        """With the names of the devices."""
        count = -(-self._total // PART_IMAGES)
        arguments = [[self._asked.model_dump_json(), part, count] for part in range(count)]
        self._map("predict", arguments, "predict", self._total, bar)
        parts = [read_part(self._asked, part, count) for part in range(count)]
        bad = [sample for _, about in parts for sample in about.bad_samples]
        devices = sorted({about.device for _, about in parts})
        return join_parts([predictions for predictions, _ in parts]), bad, ", ".join(devices)

    def measure(self, shots: Sequence[int], *, throughput: bool, bar: Bar) -> Extras:
        key = extras_key(shots, throughput)
        self._map("measure", [[self._asked.model_dump_json(), list(shots), throughput]], key, 1, bar)
        self._extras = key
        return read_extras(self._asked, shots, throughput)

    def forget(self) -> None:
        """The parts are needed no more; the extras of another command are."""
        store = open_store(self._asked.folder)
        for info in list(store.list()):
            if info.key == self._extras or not info.key.startswith(EXTRAS):
                store.delete(info.key)

    def _map(
        self, function: str, arguments: Sequence[Sequence[object]], writes: str, total: int, bar: Bar
    ) -> None:
        """`writes`: what in the folder; another job that does is stopped."""
        # Here, because Ray reads its settings when it is imported, and evaluations in this process need none.
        from orchestrator.tasks import map_on_cluster

        seen = 0
        with bar("images" if function == "predict" else "few-shot, throughput") as advance:
            advance(0, total)

            def done(more: int) -> None:
                nonlocal seen
                seen += more
                advance(seen, total)

            try:
                map_on_cluster(
                    self._site,
                    JOB,
                    function,
                    arguments,
                    f"{self._asked.folder}#{writes}",
                    done,
                    cpus=self._cpus,
                    gpus=self._gpus,
                )
            except DataError as error:
                raise DataError(
                    f"{error}\n  On a cluster, data must be reachable from all nodes: s3://, or a path that "
                    "all of them share. --here evaluates in this process"
                ) from error
