"""The control plane of vitscale: Ray, MLflow and the services of one machine."""

import workers

DISTRIBUTION = "vitscale"

# Here, before any module of either is used: the names are common ones.
if getattr(workers, "DISTRIBUTION", None) != DISTRIBUTION:
    raise ImportError(f"{workers.__file__} is not vitscale's; install vitscale in an environment of its own")
