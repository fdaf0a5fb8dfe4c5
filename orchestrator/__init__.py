"""The control plane of vitscale: Ray, MLflow and the services of one machine."""

DISTRIBUTION = "vitscale"
