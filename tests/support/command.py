"""The command line in this process: words as somebody types them, and its answer."""

from __future__ import annotations

from click.testing import CliRunner, Result

import cli


def call(*words: object) -> Result:
    result = CliRunner().invoke(cli.main, [str(word) for word in words])
    assert "Traceback" not in result.stderr
    return result
