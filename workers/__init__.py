"""The data plane of vitscale: all that a GPU node imports."""

DISTRIBUTION = "vitscale"
"""`workers` is a common name; jobs check at start that they got this one."""

__version__ = "0.1.0"
