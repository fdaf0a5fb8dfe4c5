"""The entry point of an ingest on a cluster.

python -P -m pipelines.ingest.job STORE_URL SPEC_DIGEST JOB_ID
"""

import sys

from orchestrator.tasks import main
from pipelines.ingest.tasks import TASKS

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], TASKS))
