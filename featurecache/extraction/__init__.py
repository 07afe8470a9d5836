"""Extraction: plan, scan the images, forward passes, shards and view; the canary; why the cache misses."""
