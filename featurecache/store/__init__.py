"""How a cache lies on disk: what shards and views hold."""
