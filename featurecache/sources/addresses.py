"""Data in object storage: s3:// and gs:// addresses of folders, tables, archives and tars.

A folder is fetched whole, a file alone. Of a table and of tars the table, and names and sizes of all that lies below
their folder; an image or a tar is fetched when it is first read. What has come stays in this machine's state folder,
where a later run finds it unless the object has changed (`featurecache.files.mirror`).
"""

from __future__ import annotations

import os
import re

from featurecache.errors import SourceError
from featurecache.files.mirror import Mirror
from featurecache.files.storage import canonical, local_path
from featurecache.sources.tables import is_table
from featurecache.sources.webdataset import is_pattern


def mirrored_source(address: str | os.PathLike[str], *, folder: bool = False) -> str:
    """The absolute path that stands for an address on this machine; ``folder``: of which nothing is fetched yet.
    Raises BadOption, SourceError, StorageError."""
    if (path := local_path(address)) is not None:
        return str(path)
    address = canonical(address)
    if folder or not (is_table(address) or address.lower().endswith(".tar")):
        mirror, name = Mirror.of(address, "data"), ""
    else:
        plain = re.split(r"[*?\[{]", address)[0] if is_pattern(address) else address
        above = plain.rpartition("/")[0]
        mirror, name = Mirror.of(above, "data"), address.removeprefix(f"{above}/")
    if not mirror.pull(lambda each: each == name or not (name or folder)):
        raise SourceError(f"there is nothing at {mirror.address}.")
    return str(mirror.folder / name)
