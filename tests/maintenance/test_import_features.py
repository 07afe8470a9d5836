"""Import: features that somebody else made become a view of unknown origin."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from support.builders import make_view
from support.command import call
from support.foreign import TOKENS, X, Y, bring, h5, npy, refused

import featurecache
from featurecache.errors import BadOption, NotInCache, SourceError
from featurecache.images import decoding
from featurecache.maintenance import import_features
from featurecache.maintenance.export import export_view
from featurecache.maintenance.import_features import import_view
from featurecache.store.store import open_store
from featurecache.store.view import View


@pytest.fixture(autouse=True)
def _in_a_fresh_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.integration
@pytest.mark.slow
def test_an_npy_with_labels_beside_it_trains_a_head():
    import heads

    far = (X + 5 * np.eye(6, dtype=np.float32)[Y]).repeat(3, 0)
    view = bring(npy(far), labels=npy(Y.repeat(3), "y.npy"))
    assert torch.equal(view.tensor("vector"), torch.from_numpy(far)) and view.label == "imported/mine"
    assert (view.labels.tolist(), view.classes, view.task) == (Y.repeat(3).tolist(), ["0", "1", "2"], "multiclass")
    assert view.ids[:2].tolist() == ["feats.npy:0", "feats.npy:1"] and set(view.splits) == {""}
    run = heads.train_head(view, "linear", epochs=2, controls=False)
    with pytest.raises(NotInCache, match="was imported: nobody knows which backbone"):
        heads.predict(run, [np.zeros((8, 8), np.uint8)])


def test_it_is_marked_as_of_unknown_origin():
    view = bring(npy(X))
    store = open_store(view.store)
    assert store.spec.imported and view.imported and not view.untrained
    assert store.spec.precision == store.spec.position_embeddings == "unknown"
    assert store.spec.architecture == store.spec.preprocess == {"origin": "unknown"}
    assert store.provenance["origin"] == "imported" and store.provenance["file"] == str(Path("feats.npy").absolute())
    assert store.provenance["when"].startswith("20") and "request" not in store.provenance
    for output in ("tokens", "cls", "tokens-257", "gap"):
        with pytest.raises(NotInCache, match="It was imported, so nothing more can be computed"):
            view.info(output)
    with pytest.raises(SourceError, match="nobody knows its images"):
        featurecache.sources.reopen(view.source)


def test_the_digest_of_a_row_is_that_of_an_array_and_copies_are_stored_once():
    twice = np.concatenate([X[:5], X[2:4]])
    view = bring(npy(twice))
    assert view.digests.tolist() == [decoding.digest(row).encode() for row in twice]
    assert np.array_equal(view.array("vector"), twice)
    with h5py.File(next(view.store.glob("vector/*.h5"))) as file:
        assert len(file["digests"]) == 5


def test_the_same_file_imported_twice_is_one_store_and_another_under_its_name_is_refused():
    first = bring(npy(X))
    before = {p: p.stat().st_mtime_ns for p in first.store.glob("vector/*.h5")}
    again, other = bring(npy(X, "renamed.npy"), labels=npy(Y, "y.npy")), bring(npy(X), "other")
    assert first.store == again.store == other.store and again.task == "multiclass" and other.task == "unlabelled"
    assert {p: p.stat().st_mtime_ns for p in first.store.glob("vector/*.h5")} == before
    refused(r"imported-\w+/mine was imported from .*feats.npy", npy(X + 1, "new.npy"), error=BadOption)


def test_shards_are_cut_and_an_import_that_was_stopped_continues(monkeypatch):
    monkeypatch.setattr("featurecache.store.store.SHARD_ROWS", 16)
    monkeypatch.setattr(import_features, "BLOCK", 5 * 48)
    calls, real = [], import_features.ShardWriter.commit

    def commit(self):
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(import_features.ShardWriter, "commit", commit)
    with pytest.raises(KeyboardInterrupt):
        bring(npy(X))
    assert len(list(Path().glob("cache/*/vector/*"))) == 1  # and no draft
    view = bring(npy(X))
    assert len(calls) == 4 and np.array_equal(view.array("vector"), X)


@pytest.mark.parametrize("ending", ["h5", "npz", "safetensors"])
@pytest.mark.parametrize("outputs", [None, "cls", "tokens-3x3"])
def test_our_own_export_comes_back_without_options(ending, outputs):
    meta = {"age": np.array([1.5, np.nan, 3, 4, 5, 6]), "site": np.array([*"abcdeé"], object)}
    view = make_view(Path("ours"), [7, 3, 3, 0, 11, 10], groups=[*"ppqrst"], meta=meta)
    path = export_view(view, f"set.{ending}", outputs=outputs, compress=ending != "safetensors").path
    back = bring(path)
    for column in ("ids", "splits", "groups", "classes"):
        assert np.array_equal(getattr(back, column), getattr(view, column))
    assert back.labels.tolist() == view.labels.tolist() and back.task == "binary"
    assert np.array_equal(back.meta["age"], meta["age"], equal_nan=True) and back.meta["site"].tolist() == [*"abcdeé"]
    for name in (outputs or "cls,tokens").split(","):
        assert np.array_equal(back.array(name), view.array(name)) and back.info(name) == view.info(name)
    assert open_store(back.store).provenance["claims"] == view.fingerprint
    assert back.digests[1] == back.digests[2] != back.digests[0]
    refused("says what its features are", path, output="pooler", error=BadOption)


def test_an_h5_by_the_names_people_use():
    words = np.array(["cat", "dog"] * 20, object)
    file = h5(embeddings=X.astype(np.float64), targets=words, filenames=[f"a/{k}.png" for k in range(40)],
              split=["Train", "valid"] * 20, patient=np.arange(40) // 4, coords=np.zeros((40, 2), int))  # fmt: skip
    done = import_view(file, "mine", cache="cache")
    view = View(done.view)
    assert view.ids[3] == "a/3.png" and view.splits[:2].tolist() == ["train", "val"] and view.groups[4] == "1"
    assert (view.classes, view.labels[:3].tolist()) == (["cat", "dog"], [0, 1, 0])
    assert view.info("vector").dtype == "float32"
    assert "Left out: coords." in done.notes and any("float64 is kept as vector, float32" in n for n in done.notes)


def test_arrays_are_chosen_by_their_keys():
    file = h5(test__a=X, test__b=X + 1, test__which=Y, labels=Y[::-1].copy())
    refused(r"holds labels \[40\] int64, test/a \[40, 6\] float32, .*--features-key test/a", file)
    view = bring(file, features_key="test/b", labels="test/which", output="pooler")
    assert np.array_equal(view.array("pooler"), X + 1) and view.labels.tolist() == Y.tolist()
    refused(r"has no 'test/c'\. Near: test/", file, features_key="test/c")
    refused(r"test/which of feats\.h5 is \[40\] int64; features are float16", file, features_key="test/which")


def test_an_npz_is_read_in_blocks_and_by_its_names(monkeypatch):
    monkeypatch.setattr(import_features, "BLOCK", 7 * 48)
    np.savez_compressed("a.npz", X=X.astype(np.float16), y=Y.astype(np.float32)[:, None])
    view = bring("a.npz")
    assert np.array_equal(view.array("vector"), X.astype(np.float16)) and view.labels.tolist() == Y.tolist()


@pytest.mark.parametrize("array", [np.asfortranarray(X), X.astype(">f4"), X[:, ::-1]])
def test_orders_of_memory_and_of_bytes(array):
    assert np.array_equal(bring(npy(array)).array("vector"), array)


# --- tokens


def test_tokens_without_a_grid_give_what_needs_none():
    view = bring(npy(TOKENS))
    assert np.array_equal(view.array("tokens"), TOKENS) and view.info("tokens").grid is None
    assert view.has("tokens-7") and view.array("tokens-7").shape == (8, 7, 6)
    for output in ("cls", "mean", "tokens-3x3"):
        assert not view.has(output)
        with pytest.raises(NotInCache, match="which of them are patches is not known"):
            view.tensor(output)


def test_tokens_with_prefix_and_grid_give_all_that_follows():
    view = bring(npy(TOKENS), prefix=("cls",), grid=(2, 2))
    assert np.array_equal(view.array("cls"), TOKENS[:, 0])
    assert np.allclose(view.array("mean"), TOKENS[:, 1:].mean(1), atol=1e-6)
    other = bring(npy(TOKENS), "other", grid=(1, 5))
    assert other.store != view.store and not other.has("cls")
    assert np.allclose(other.array("mean"), TOKENS.mean(1), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"grid": (2, 3)}, r"0 \+ 2·3 does not say what 5 tokens are; --grid HxW has to cover 5"),
        ({"prefix": ("cls",)}, "--prefix alone does not say what 5 tokens are; --grid HxW has to cover 4"),
        ({"output": "cls"}, r"--output cls does not fit features \[N,T,D\]: they are tokens"),
        ({"output": "tokens-5", "grid": (1, 5)}, "--prefix and --grid are for tokens"),
    ],
)
def test_tokens_that_do_not_add_up_are_refused(options, said):
    refused(said, npy(TOKENS), error=BadOption, **options)


# --- labels


def test_a_table_with_paths_is_joined_by_id_and_not_by_order():
    file, table = h5(features=X[:3], ids=["b.png", "a.png", "c.png"]), Path("t.csv")
    table.write_text("path,finding,split,age\na.png,ill,test,3\nb.png,well,train,4\nc.png,ill,train,5\nd.png,ill,,6\n")
    view = bring(file, labels="t.csv", columns={"label": "finding"})
    assert [view.classes[k] for k in view.labels] == ["well", "ill", "ill"]
    assert view.splits.tolist() == ["train", "test", "train"] and view.meta["age"].tolist() == [4, 3, 5]
    table.write_text("path,label\na.png,ill\nc.png,well\n")
    refused(r"the table of labels lacks 1 id of the features: b.png", file, labels="t.csv")


def test_a_table_without_paths_is_taken_in_order_and_its_only_column_is_the_label():
    Path("t.csv").write_text("whatever\n" + "\n".join(["no", "yes"] * 20) + "\n")
    view = bring(npy(X), labels="t.csv", classes=["yes", "no"])
    assert view.classes == ["yes", "no"] and view.labels[:2].tolist() == [1, 0]
    refused("table of labels has 40 rows, the features have 39", npy(X[:39]), labels="t.csv")


@pytest.mark.parametrize("name", ["id", "scan"])
def test_a_table_is_joined_by_the_column_that_holds_the_ids_and_else_its_order_is_said(name):
    file, table = h5(features=X[:3], ids=["b", "a", "c"]), Path("t.csv")
    table.write_text(f"{name},label\na,ill\nb,well\nc,ill\n")
    view = bring(file, labels="t.csv")
    assert [view.classes[k] for k in view.labels] == ["well", "ill", "ill"] and not view.meta
    table.write_text("label,age\nill,1\nwell,2\nill,3\n")
    done = import_view(file, "order", labels="t.csv", cache="cache")
    assert "Rows of t.csv are taken in the order of the features." in done.notes
    table.write_text("id,label\nx,ill\ny,well\nz,ill\n")
    refused(r"lacks 3 ids of the features: b, a, c\. --ids-key '' takes its rows in their order", file, labels="t.csv")


def test_what_an_option_names_comes_before_the_table_and_that_before_the_file():
    own = {"ids": [*"abcd"], "splits": ["train", "val", "test", "test"], "groups": [*"ppqq"]}
    file, table = h5(features=X[:4], **own), Path("t.csv")
    table.write_text("path,label\n" + "".join(f"{n},{k}\n" for n, k in zip("dcba", [*"nyny"], strict=True)))
    view = bring(file, labels="t.csv")
    assert (view.splits.tolist(), view.groups.tolist()) == (own["splits"], own["groups"])  # the table has none
    rows = zip("dcba", [*"nyny"], [*"1223"], ["train", "train", "val", "test"], strict=True)
    table.write_text("path,label,patient,split\n" + "".join(",".join(row) + "\n" for row in rows))
    view = bring(file, "theirs", labels="t.csv")
    assert (view.splits.tolist(), view.groups.tolist()) == (["test", "val", "train", "train"], [*"3221"])
    done = import_view(file, "own", labels="t.csv", groups_key="groups", splits_key="splits", cache="cache")
    view = View(done.view)
    assert (view.splits.tolist(), view.groups.tolist()) == (own["splits"], own["groups"])
    assert not any("groups from" in note for note in done.notes) and view.meta["patient"].tolist() == [3, 2, 2, 1]
    said = "--groups-key groups and --column group=… both say the groups"
    refused(said, file, labels="t.csv", groups_key="groups", columns={"group": "patient"}, error=BadOption)


def test_classes_and_task_of_an_export_are_of_its_own_labels_alone():
    view = make_view(Path("ours"), [7, 3, 3, 0, 11, 10])
    path, table = export_view(view, "set.npz", outputs="cls").path, Path("t.csv")
    swapped = bring(path, "swapped", classes=view.classes[::-1])
    assert [swapped.classes[k] for k in swapped.labels] == [view.classes[k] for k in view.labels]
    assert swapped.classes == view.classes[::-1]
    table.write_text("path,label\n" + "".join(f"{name},{k}\n" for k, name in enumerate(view.ids)))
    assert bring(path, "six", labels="t.csv").task == "multiclass"
    other = bring(path, "other", labels=npy(np.arange(6) % 2, "sex.npy"))
    assert other.classes == ["0", "1"] and other.labels.tolist() == [0, 1] * 3


def test_several_labels_need_all_their_names():
    file = h5(features=X, y=np.eye(3)[Y] > 0)
    Path("t.csv").write_text("A,B\n" + "1,0\n1,1\n" * 20)
    two = {"labels": "t.csv", "columns": {"label": "A,B"}}
    refused("the labels are A, B; name each once", file, classes=["A", "B", "C"], error=BadOption, **two)
    assert bring(file, classes=["B", "A"], **two).labels[:2].tolist() == [[0, 1], [1, 1]]


def test_several_labels_and_one_hot_ones():
    hot = np.eye(3)[Y]
    view = bring(h5(features=X, labels=hot), task="multiclass", classes=["a", "b", "c"])
    assert view.labels.tolist() == Y.tolist() and view.classes == ["a", "b", "c"]
    hot[0] = [1, np.nan, 1]
    several = bring(h5(features=X, labels=hot), "two")
    assert several.task == "multilabel" and several.classes == ["label 0", "label 1", "label 2"]
    assert np.array_equal(several.labels, hot.astype(np.float32), equal_nan=True)


def test_numbers_without_names_keep_their_own_and_minus_one_is_none():
    view = bring(h5(features=X[:4], labels=[-1, 2, 1, 2]))
    assert (view.classes, view.labels.tolist()) == (["1", "2"], [-1, 1, 0, 1])


@pytest.mark.parametrize(
    ("arrays", "options", "said"),
    [
        ({"labels": np.full(40, 0.5)}, {}, "labels row 0 is 0.5; a label is a whole number, or -1 for none"),
        ({"labels": np.full(40, -2)}, {}, "row 0 is -2"),
        ({"labels": Y[:9]}, {}, "labels of feats.h5 has 9 rows, the features have 40"),
        ({"labels": Y}, {"classes": ["a", "b"]}, "has the label 2, and there are 2 classes"),
        ({"labels": ["x", "y"] * 20}, {"classes": ["x", "z"]}, "--classes x,z: the labels are x, y; name each once"),
        ({"labels": np.full((40, 2), 3)}, {}, "row 0, label 0 is 3; expected 0, 1, or NaN"),
        ({"labels": np.ones((40, 2))}, {"task": "multiclass"}, "has rows with other than one 1"),
        ({"labels": Y}, {"labels": "nowhere.csv"}, "there is no file nowhere.csv"),
        ({"labels": Y}, {"labels": "y.txt"}, "--labels y.txt: expected a table"),
        ({"labels": Y}, {"columns": {"label": "x"}}, "--column is about columns of a table"),
        ({"labels": Y, "y": Y}, {}, "several arrays that could be the labels: labels, y"),
        ({"ids": ["a"] * 40}, {}, "names 'a' twice .rows 0 and 1."),
        ({"splits": ["fold 1"] * 40}, {}, 'splits row 0 is "fold 1", expected train, val or test'),
    ],
)
def test_columns_that_do_not_fit_are_refused(arrays, options, said):
    refused(said, h5(features=X, **arrays), error=(SourceError, BadOption), **options)
    assert not Path("cache").exists()


def test_an_empty_key_leaves_a_column_out():
    view = bring(h5(features=X, ids=["a"] * 40, split=["x"] * 40), ids_key="", splits_key="")
    assert view.ids[1] == "feats.h5:1" and set(view.splits) == {""}


# --- the command line


@pytest.mark.integration
def test_the_command_says_that_the_origin_is_unknown(tmp_path):
    npy(X), npy(Y, "y.npy")
    done = call("import", "feats.npy", "--labels", "y.npy", "--classes", "a,b,c", "--name", "mine")
    assert done.exit_code == 0
    assert "imported/mine in cache/imported-" in done.stdout and "of unknown origin" in done.stdout
    assert done.stderr.splitlines()[-1] == "next       featurecache train-head --head linear --features imported/mine"
    assert "imported, origin unknown, float32" in call("ls").stdout
    shown = call("info", "mine").stdout
    assert f"imported from {tmp_path}/feats.npy, 20" in shown and "0×0" not in shown
    nearest = call("why", "--backbone", "vit-demo", "--random-weights")
    assert "imported" not in nearest.stdout + nearest.stderr
    none = call("extract", "--backbone", "vit-demo", "--random-weights", "--outputs", "vector")
    assert none.exit_code == 1 and "vector is what an imported vector is called; vit-demo has cls" in none.stderr


def test_tokens_by_the_command_line():
    npy(TOKENS)
    words = ("import", "feats.npy", "--name", "mine", "--json")
    done = json.loads(call(*words, "--prefix", "1", "--grid", "2x2").stdout)
    assert done["outputs"] == {"tokens": [5, 6]} and done["new_rows"] == 8
    assert featurecache.open_view("mine").info("tokens").prefix == ("prefix0",)
    for wrong, said in (("2", "takes HxW"), ("0x4", "takes HxW"), ("3x3", "0 + 3·3 does not say what 5 tokens are")):
        bad = call(*words, "--grid", wrong)
        assert bad.exit_code == 2 and said in bad.stderr and bad.stdout == ""
    assert call("import", "feats.npy", "--name", "x", "--column", "label").exit_code == 2


def test_ordinal_classes_of_an_import_need_their_order_as_those_of_an_extraction(tmp_path):
    words = ["mild", "none", "severe", "mild"] * 10
    Path("grades.csv").write_text("\n".join(["finding", *words]))
    labels = {"labels": "grades.csv", "task": "ordinal"}
    refused("say their order from the lowest to the highest, --order mild,none,severe", npy(X), **labels)
    refused("--order names none, mild, sever, .* Near: severe", npy(X), **labels, order=["none", "mild", "sever"])
    view = bring(npy(X), **labels, order=["none", "mild", "severe"])
    assert (view.task, view.classes, view.labels[:3].tolist()) == ("ordinal", ["none", "mild", "severe"], [1, 0, 2])
    assert view.source["order"] == view.classes
    named = bring(npy(X), "named", **labels, classes=["none", "mild", "severe"])
    numbers = bring(npy(X), "numbers", labels=npy(Y, "y.npy"), task="ordinal")
    assert named.labels.tolist() == view.labels.tolist() and numbers.classes == ["0", "1", "2"]


@pytest.mark.parametrize(("how", "second"), [(None, -1), ("zero", 0), ("one", 1)])
def test_uncertain_cells_of_an_import_are_read_as_said_and_recorded(how, second):
    Path("cells.csv").write_text("\n".join(["edema", *["1", "-1", "0", "0"] * 10]))
    done = import_view(npy(X), "mine", labels="cells.csv", uncertain=how, cache="cache")
    view = View(done.view)
    assert view.labels[:4].tolist() == [1, second, 0, 0] and view.source["uncertain"] == (how or "ignore")
    assert any("-1 (10 cells) is read as" in note for note in done.notes)
    refused("--uncertain is about labels that are text", npy(X), "other", uncertain="zero", error=BadOption)
