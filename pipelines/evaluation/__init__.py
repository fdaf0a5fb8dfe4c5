"""Measuring a checkpoint on a data set: in this process or, part by part, on a cluster."""
