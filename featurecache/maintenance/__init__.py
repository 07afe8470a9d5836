"""Looking after a cache: verify, repair, garbage collection, merge, export, import, leaks between splits."""
