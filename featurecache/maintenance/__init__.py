"""Looking after a cache: verify, repair, remove and collect, compact, merge, export, and leaks between splits."""
