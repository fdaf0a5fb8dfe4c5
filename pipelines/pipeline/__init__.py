"""Pipelines: stages in a YAML file, each done once, from images to promoted children."""
