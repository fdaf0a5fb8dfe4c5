"""Writes requirements.txt and torch.txt beside it: what the image installs, each with its digests from PyPI.

    make lock

The versions are those of constraints.txt; what that does not name is torch's CUDA, the newest that fits. For
Linux on x86-64 and Python 3.11, as the image is.
"""

import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MORE = "flask-wtf\npsycopg[binary]\nsetuptools>=77\n"
"""Of MLflow's server with passwords, on Postgres; and what builds our own wheel."""
CUDA = re.compile(r"(torch|triton|nvidia-[a-z0-9-]+|cuda-[a-z0-9-]+)==")
"""What the CPU's build of torch takes the place of."""
HEADER = "# Made by `make lock` from constraints.txt and pyproject.toml.\n"


def main(uv: str) -> None:
    command = [uv, "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--generate-hashes"]
    command += ["--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_28"]
    command += ["--default-index", "https://pypi.org/simple", "-c", "constraints.txt", "pyproject.toml", "-"]
    found = subprocess.run(command, input=MORE, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    # A requirement is a line, its digests are on the next ones.
    blocks = re.split(r"\n(?=\S)", found.stdout.strip())
    for name, is_ours in (("torch.txt", True), ("requirements.txt", False)):
        ours = [block for block in blocks if bool(CUDA.match(block)) == is_ours]
        (HERE / name).write_text(HEADER + "\n".join(ours) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
