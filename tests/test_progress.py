"""The bar of a job: what its runs have done, and what it waits for."""

import io

from rich.console import Console

from orchestrator.job import JobSpec, run_url
from orchestrator.job_records import write_note
from pipelines import progress as progress_module
from pipelines.progress import JobProgress
from tests.test_config import VALUES, changed
from workers.config import make_config
from workers.storage import open_store
from workers.training.metrics import EventWriter

CONFIGS = (make_config(VALUES), make_config(changed("seed", 2)))
TOTAL = sum(config.num_steps * config.train.global_batch_size for config in CONFIGS)


def test_a_line_says_how_far_the_job_is_or_what_it_waits_for(store_url: str, monkeypatch) -> None:
    monkeypatch.setattr(progress_module, "PLAIN_SECONDS", -1.0)  # a line at each tick
    spec = JobSpec(configs=CONFIGS, runs=store_url, mlflow="http://mlflow", experiment="x")
    store = open_store(store_url)
    output = io.StringIO()
    writer = EventWriter(open_store(run_url(store_url, CONFIGS[0])), 0)

    def trained(images: int) -> None:
        writer.write("metrics", images, values={"loss": 1.5, "images_per_second": 2000.0})
        writer.flush()

    with JobProgress(spec, "study", Console(file=output, width=200)) as progress:
        progress.tick("job-0", "")
        progress.tick("job-0", "")  # says nothing new
        write_note(store, "job-0", "waiting for nodes")
        progress.tick("job-0", "")
        trained(TOTAL // 2)
        progress.tick("job-0", "")
        write_note(store, "job-0", "a worker died")
        progress.tick("job-0", "")
        progress.tick("job-0", "Ray is away")
    assert output.getvalue().splitlines() == [
        "  study: 0 %  waiting for workers",
        "  study: 0 %  waiting for nodes",
        "  study: 50 %  loss 1.500  2,000 images/s",
        "  study: 50 %  a worker died",
        "  study: 50 %  Ray is away",
    ]
    with JobProgress(spec, "study", Console(file=output, width=200)) as again:
        again.tick("job-0", "")
    assert output.getvalue().splitlines()[-1] == "  study: 50 %  a worker died"
