"""Commands of the cache: their options, what they print as text and as JSON."""
