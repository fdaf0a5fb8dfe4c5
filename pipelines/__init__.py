"""Compositions: which runs there are, and the command."""

DISTRIBUTION = "vitscale"
