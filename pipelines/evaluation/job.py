"""The entry point of an evaluation on a cluster.

python -P -m pipelines.evaluation.job STORE_URL SPEC_DIGEST JOB_ID
"""

import sys

from orchestrator.tasks import main
from pipelines.evaluation.tasks import TASKS

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], TASKS))
