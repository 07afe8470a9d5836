"""Evaluation: families of runs, comparisons with intervals, other data, subgroups, controls, costs."""
