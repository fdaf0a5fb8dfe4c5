"""Which code this is, beyond its version: the wheel that the job brought, the image of the node."""

import os
import re

WHEEL_VARIABLE = "VITSCALE_WHEEL_SHA256"
"""Of every process of a job that brought its own wheel."""
IMAGE_VARIABLE = "VITSCALE_IMAGE_DIGEST"
"""Of every process of a container: its image's digest, or its name with the digest."""
VARIABLES = {"wheel": WHEEL_VARIABLE, "image": IMAGE_VARIABLE}


def code_digests() -> dict[str, str]:
    """sha256 of `wheel` and `image`, those that are known, as 64 hexadecimal digits."""
    found = {name: _digest(variable) for name, variable in VARIABLES.items()}
    return {name: digest for name, digest in found.items() if digest}


def _digest(variable: str) -> str:
    """Empty if the variable holds none, or only the zeros of a template."""
    found = re.search(r"\b[0-9a-f]{64}$", os.environ.get(variable, "").strip())
    return found[0] if found and found[0].strip("0") else ""
