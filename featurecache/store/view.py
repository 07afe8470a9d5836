"""View: a dataset through one store; columns as numpy, features as tensors gathered from the mapped shards.

Opening one reads its index and looks at the sizes of the shards, never at a feature. Rows come in any order, each
checked against its checksum when it is first read; outputs that are functions of stored tokens are derived on the way.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featurecache import outputs as _outputs
from featurecache.arithmetic import exact_arithmetic
from featurecache.errors import CacheError, NotInCache, UnsafeFile, ViewReplaced
from featurecache.files.atomic import refuse_links
from featurecache.files.delimited import data_frame
from featurecache.files.directory import ALIGNMENT, USER_BLOCK
from featurecache.formatting import html_table, shell_words
from featurecache.store.mapped_rows import MappedRows
from featurecache.store.schema import Layout, StoredOutput, ViewContent, read_view, source_options, text_array
from featurecache.store.shards import empty_rows, file_size, torch_dtype
from featurecache.store.store import is_default_cache, open_store

if TYPE_CHECKING:
    import pandas
    import torch


def _changed(settings: Mapping[str, Any], *keys: str) -> list[tuple[str, Any]]:
    """The options of settings that are not as they are without one; a switch has no value."""
    usual = {"fit": "model", "precision": "fp32", "dtype": "float16"}
    values = {key: settings.get(key) for key in keys if settings.get(key) and settings.get(key) != usual.get(key)}
    return [(f"--{key}".replace("_", "-"), "" if value is True else value) for key, value in values.items()]


class View(ViewContent):
    """A dataset's features, opened for reading. Holds no open file; may be pickled and survives a fork.

    >>> view = featurecache.open_view("vit-in21k/chest")            # doctest: +SKIP
    >>> view.tensor("cls", rows=view.split("train"))                # doctest: +SKIP

    Of a view with augmented copies the columns, ``len`` and the rows that are read by default are those of the plain
    images. `copies` says where their copies lie.
    """

    def __init__(self, path: Path, *, columns_only: bool = False, copies: bool = False) -> None:
        """``columns_only``: ids, labels, names of outputs; the shards may be missing and are not looked at.
        ``copies``: the columns hold the rows of augmented copies too, behind those of the images."""
        self.path = path
        self.with_copies = copies
        self.name = path.stem
        self.store = path.parent
        store = open_store(self.store)
        self.spec: dict[str, Any] = store.spec.to_dict()
        self.provenance = store.provenance
        self.untrained, self.imported = store.spec.untrained, store.spec.imported
        self._show(read_view(path))
        if self.fingerprint != store.fingerprint:
            raise CacheError(
                f"{path} belongs to the store {self.fingerprint}, but lies in that of {store.fingerprint}."
            )
        self._maps: dict[str, MappedRows] = {}
        self._checked = False
        if not columns_only:
            self._check(opening=True)

    def _show(self, content: ViewContent) -> None:
        self._all = content
        self._copies: np.ndarray | None = None
        vars(self).update(vars(content if self.with_copies else content.plain()))

    def _check(self, opening: bool = False) -> None:
        while not self._checked:
            try:
                self._check_files()
            except CacheError:
                if not self._follow(opening):
                    raise
            else:
                self._check_index()
                self._checked = True

    def _follow(self, opening: bool = False) -> bool:
        """Rows may be moved to other shards, and the view be written on those, while it is read here (compact, gc,
        repair): take over where they lie now. False where nothing has changed. Raises ViewReplaced, unless ``opening``,
        where other images or other bytes have come."""
        now = read_view(self.path)
        if now.fingerprint != self.fingerprint or np.array_equal(now.files, self.files):
            return False
        columns = [(now.ids, self._all.ids), (now.digests, self._all.digests)]
        same = all(np.array_equal(a, b) for a, b in columns) and all(
            name in now.index and np.array_equal(now.index[name].checksums, stored.checksums)
            for name, stored in self.index.items()
        )
        if opening:
            self._show(now)
        elif same:
            self.files, self.index = now.files, {name: now.index[name] for name in self.index}
        else:
            raise ViewReplaced(
                f"{self.label} was written again with other images or features while it was open here, and what it had "
                "then is gone: open it again."
            )
        self._checked = False
        return True

    def _check_files(self) -> None:
        names, sizes = [name.decode() for name in self.files["path"].tolist()], self.files["size"].tolist()
        for folder in {name.split("/")[0] for name in names}:
            refuse_links(self.store / folder)
        folder = f"{self.store}{os.sep}"
        for name, size in zip(names, sizes, strict=True):
            actual = file_size(folder + name)  # of ten thousand files a Path each would take longer than their sizes
            if actual != size:
                path = self.store / name
                refuse_links(path)
                what = "is missing" if actual is None else f"has {actual:,} bytes, not {size:,}"
                way = "Run" if actual is None else "Delete it and run"
                raise CacheError(
                    f"{path}, which the view {self.label} needs, {what}. "
                    f"{way} the extraction again: that computes what is not there."
                )

    def _check_index(self) -> None:
        """Every row lies inside its file: the gather trusts these numbers with addresses."""
        files = self.files
        places = [files[key].tolist() for key in ("offset", "rows", "size")]  # whole numbers without bounds
        placed = (files["offset"] >= USER_BLOCK) & (files["offset"] % ALIGNMENT == 0) & (files["rows"] > 0)
        for name, stored in self.index.items():
            file, row = stored.index[:, 0], stored.index[:, 1]
            fine = ((0 <= file) & (file < len(files))).all()
            if fine and len(file):
                ends = [offset + rows * stored.info.row_bytes for offset, rows, _ in zip(*places, strict=True)]
                inside = np.array([end <= size for end, size in zip(ends, places[2], strict=True)])
                used = np.bincount(file, minlength=len(files)) > 0
                fine = ((0 <= row) & (row < files["rows"][file])).all() and (inside & placed)[used].all()
            if not fine:
                raise UnsafeFile(f"{self.path}: its index of {name} points outside the shards.")

    def stored(self, output: str) -> StoredOutput:
        """Where the rows of a stored output lie, and what their bytes hash to."""
        return self.index[output].first(len(self))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    def __len__(self) -> int:
        return self.count

    @property
    def rows(self) -> int:
        """Rows that can be read: those of the images and of their augmented copies."""
        return self._all.count

    @property
    def distinct(self) -> int:
        """Different images and copies: what takes room in the store."""
        return len(np.unique(self._all.digests))

    def __repr__(self) -> str:
        outputs = ", ".join(f"{name} {list(info.shape)}" for name, info in self.outputs.items())
        return f"<View {self.label}: {len(self):,} × ({outputs})>"

    def _repr_html_(self) -> str:
        """What a notebook shows: images of each class and split, and the outputs."""
        splits, counts = self.counts_by_split()
        rows = [[name, *(f"{n:,}" for n in row)] for name, row in zip(self.classes, counts, strict=True)]
        return html_table(repr(self), [["", *(split or "no split" for split in splits)], *rows])

    @property
    def label(self) -> str:
        """``store/view`` as people type it: the backbone's name, or the folder's where two stores have such a view."""
        kin = self.store.name.rpartition("-")[0] or self.store.name
        twins = list(self.store.parent.glob(f"{glob.escape(kin)}-*/{glob.escape(self.name)}.h5"))
        return f"{self.store.name if len(twins) > 1 else kin}/{self.name}"

    @property
    def outputs(self) -> dict[str, Layout]:
        return {name: stored.info for name, stored in self.index.items()}

    @property
    def cost(self) -> dict[str, Any] | None:
        """What an image costs, in milliseconds, as its extraction measured it: see `Store.cost`."""
        return open_store(self.store).cost(self.name)

    def counts_by_split(self) -> tuple[list[str], list[list[int]]]:
        """The splits there are, and for each class how many images of it each of them has."""
        splits = [split for split in ("train", "val", "test", "") if split in self.splits]
        hits = self.labels.T == 1 if self.labels.ndim == 2 else [self.labels == k for k in range(len(self.classes))]
        return splits, [[int((hit & (self.splits == split)).sum()) for split in splits] for hit in hits]

    def split(self, name: str) -> np.ndarray:
        """Rows of a split ("train", "val", "test", ""), in order."""
        return np.flatnonzero(self.splits == name)

    def copies(self, rows: Any = None) -> np.ndarray:
        """int64 [n, 1+k]: where each image of ``rows`` (by default all) and its k augmented copies lie, as row numbers
        for `tensor` and `take`; those of copies are beyond the last image. k is 0 where the view has no copies. In the
        place of a copy that an image has not (only those that may be trained on have some) stands the image itself."""
        if self._copies is None:
            self._copies = self._all.copy_rows(self.path)
        return self._copies if rows is None else self._copies[self._rows(rows)]

    def has(self, output: str) -> bool:
        """Stored here, or a function of tokens stored here."""
        try:
            self.info(output)
        except NotInCache:
            return False
        return True

    def info(self, output: str) -> Layout:
        """Raises NotInCache when it is neither stored nor derivable, with the command that stores it."""
        if output in self.index:
            return self.index[output].info
        if len(parts := _outputs.members(output)) > 1:
            vectors = [self.info(part.name) for part in parts]
            return Layout(output, (sum(vector.shape[0] for vector in vectors),), vectors[0].dtype)
        parsed, tokens = self._derivation(output)
        begin, patches = _places(tokens)
        prefix, grid = parsed.layout(begin, patches) or (None, None)
        shape = parsed.row_shape((tokens.shape[0], tokens.shape[1]), len(begin))
        return Layout(parsed.name, shape, tokens.dtype, prefix, grid)

    def _derivation(self, output: str) -> tuple[_outputs.Output, Layout]:
        """Of an output that is not stored: what it is, and the stored tokens that it is derived from."""
        parsed = _outputs.parse(output)
        if parsed.source not in self.index:
            missing = f"{self.label} holds {', '.join(self.index)}, not {output}."
            if self.imported:
                raise NotInCache(
                    f"{missing} It was imported, so nothing more can be computed: import a file that has it."
                )
            name = parsed.name if not parsed.is_derived or not parsed.size else parsed.source
            raise NotInCache(f"{missing} Store it with: {self.extract_command(name)}")
        tokens = self.index[parsed.source].info
        if tokens.prefix is None and len(parsed.size) != 1:  # tokens-N mixes them all alike
            raise NotInCache(
                f"{parsed.name} does not follow from the {parsed.source} of {self.label}: which of them are patches is "
                "not known. Import the file again with --prefix and --grid."
            )
        if parsed.base == "cls" and "cls" not in (tokens.prefix or ()):
            raise NotInCache(f"{self.label} has no class token: its tokens begin with {list(tokens.prefix or ())}.")
        return parsed, tokens

    def extract_command(self, output: str) -> str:
        """The command line that adds ``output`` to this view: the same backbone, settings, images and cache."""
        request = self.provenance.get("request", {})
        options: list[tuple[str, Any]] = [("--backbone", request.get("name", self.provenance.get("backbone")))]
        options += _changed(request, "random_weights", "seed", "weights", "image_size", "fit")
        options += _changed(self.spec, "precision", "dtype")
        options += source_options(self.source) + _changed(self.source, "hash_ids", "hash_groups")
        options += [("--outputs", output), ("--name", self.name)]
        if not is_default_cache(self.store.parent):
            options.append(("--cache", self.store.parent))
        words = [str(word) for option in options for word in option if word != ""]
        return f"featurecache extract {shell_words(words)}"

    @exact_arithmetic()
    def tensor(self, output: str, rows: Any = None) -> torch.Tensor:
        """Rows of an output in memory, [n, ...] in the storage dtype, in the order asked; all rows by default."""
        import torch

        picked = self._rows(rows)
        if output in self.index:
            return self.take(output, picked)
        if len(parts := _outputs.members(output)) > 1:
            return torch.cat([self.tensor(part.name, picked) for part in parts], 1)
        parsed, tokens = self._derivation(output)
        prefix, grid = _places(tokens)
        result = empty_rows((len(picked), *self.info(output).shape), torch_dtype(tokens.dtype))
        for start in range(0, len(picked), 256):
            stretch = self.take(parsed.source, picked[start : start + 256])
            result[start : start + 256] = _outputs.derive(parsed, stretch, len(prefix), grid)
        return result

    def array(self, output: str, rows: Any = None) -> np.ndarray:
        """`tensor` as numpy, float16 or float32."""
        return self.tensor(output, rows).numpy()

    def __getitem__(self, output: str) -> np.ndarray:
        """``view["cls"]``: all rows of an output, [N, ...] in the storage dtype, in the order of ``ids``."""
        if not isinstance(output, str):
            raise TypeError(f'{self.label} is read by output, view["{next(iter(self.index))}"], not by {output!r}.')
        return self.array(output)

    def table(self) -> dict[str, Any]:
        """Columns [N] by name: id, label and class (of several labels ``label.CLASS`` each), split, digest, group,
        version of copies, and the further columns of the data; one whose name is taken is ``meta.NAME``."""
        columns: dict[str, Any] = {"id": self.ids}
        if self.task == "multilabel":
            columns |= {f"label.{name}": self.labels[:, k] for k, name in enumerate(self.classes)}
        else:
            columns["label"] = self.labels
            columns["class"] = text_array([self.classes[k] if k >= 0 else None for k in self.labels])
        columns |= {"split": self.splits, "digest": text_array([digest.decode() for digest in self.digests.tolist()])}
        columns |= {} if self.groups is None else {"group": self.groups}
        columns |= {"version": self.versions} if self.with_copies and self.versions is not None else {}
        taken = {*columns, "label", "class", "group", "version", *self.outputs}
        return columns | {f"meta.{key}" if key in taken else key: column for key, column in self.meta.items()}

    def frame(self) -> pandas.DataFrame:
        """`table` as a pandas DataFrame. Raises BadOption without pandas."""
        return data_frame(self.table())

    def take(self, output: str, rows: Any, out: torch.Tensor | None = None) -> torch.Tensor:
        """Rows of a *stored* output, [n, ...], in the order asked; ``out`` is filled when given."""
        self.index[output]
        while output not in self._maps:
            self._check()
            try:
                self._maps[output] = MappedRows(self.index[output], self.store, self.files)
            except CacheError:
                if not self._follow():
                    raise
        return self._maps[output].take(self._rows(rows), out)

    def _rows(self, rows: Any) -> np.ndarray:
        if rows is None:
            return np.arange(len(self))
        picked = np.asarray(rows)
        if picked.ndim != 1 or (len(picked) and picked.dtype.kind not in "biu"):
            raise TypeError(
                f"rows of {self.label} are a list of whole numbers or a mask of booleans; got {picked.dtype} "
                f"{list(picked.shape)}."
            )
        if picked.dtype == bool and len(picked) not in (len(self), self.rows):
            raise IndexError(f"a mask of {self.label} has {len(self)} booleans, one a row; got {len(picked)}.")
        picked = np.flatnonzero(picked) if picked.dtype == bool else picked.astype(np.int64, copy=False)
        if len(picked) and not (0 <= picked.min() and picked.max() < self.rows):
            raise IndexError(f"{self.label} has rows 0 to {self.rows - 1}; asked for {picked.min()} to {picked.max()}.")
        return picked


def _places(tokens: Layout) -> tuple[tuple[str, ...], tuple[int, int]]:
    """(prefix, grid) of stored tokens; where they are unknown, one row of patches."""
    return tokens.prefix or (), tokens.grid or (1, tokens.shape[0])
