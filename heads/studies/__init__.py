"""Studies: published comparisons as recipes, planned, run by the public functions, shown on one page."""
