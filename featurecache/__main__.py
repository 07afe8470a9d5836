"""``python -m featurecache``: the command line, whatever heads.py or cli.py the working folder holds."""

import sys
from pathlib import Path

if Path(sys.path[0]).resolve() != Path(__file__).resolve().parents[1]:  # the working folder, which -m puts first
    del sys.path[0]

from cli import main

main(prog_name="featurecache")
