"""Commands of heads: their options, what they print as text and as JSON."""
