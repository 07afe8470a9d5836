"""Our public readers in a process of their own, for `test_fuzz`: a path a line in, what came of it a line out.

"read", "refused", or the traceback of what should not have come out. Features that are given must bear their checksums.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path

import xxhash

from featurecache.commands.inspect import view_lines, view_record
from featurecache.errors import FeatureCacheError
from featurecache.store.shards import layout_in, map_rows, read_shard
from featurecache.store.view import View


def read(path: Path) -> str:
    if path.parent.parent.name == "cache":  # <cache>/<store>/<view>.h5
        view = View(path)
        view_lines(view_record(view))
        for output in view.outputs:
            rows = view.array(output).reshape(len(view), -1)
            sums = [xxhash.xxh3_64_intdigest(row.tobytes()) for row in rows]
            assert sums == view._stored[output].checksums.tolist()
            view.tensor(output, [0] if len(view) else [])
    else:
        layout = layout_in(path)
        shard = read_shard(path, layout)
        rows = map_rows(path, shard.size, shard.offset, len(shard.digests), layout.row_shape, layout.dtype)
        assert rows.shape == (len(shard.digests), *layout.row_shape)
        rows.sum()
    return "read"


def main() -> None:
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        try:
            answer = read(Path(json.loads(line)))
        except FeatureCacheError as error:
            answer = "refused" if str(error) else "a refusal without words"
        except BaseException:
            answer = traceback.format_exc()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
