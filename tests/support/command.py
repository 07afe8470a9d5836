"""The command line in this process: words as somebody types them, what is typed when it asks, and its answer."""

from __future__ import annotations

from click.testing import CliRunner, Result

import cli


def call(*words: object, typed: str | None = None) -> Result:
    result = CliRunner().invoke(cli.main, [str(word) for word in words], input=typed)
    assert "Traceback" not in result.stderr
    return result
