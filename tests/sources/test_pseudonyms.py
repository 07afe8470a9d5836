"""``--hash-ids``, ``--hash-groups``: no byte of a cache holds a patient's name, and images are found again."""

from __future__ import annotations

import json
import shlex
import shutil
import stat
from pathlib import Path

import pytest
import torch
from support.command import call
from support.pictures import save_picture

import featurecache
from featurecache.errors import BadOption, CannotWrite, SourceError
from featurecache.extraction import plan, scan
from featurecache.sources import Dataset, open_source, pseudonyms, reopen
from featurecache.sources.pseudonyms import Secret, load_secret, pseudonymise, secret_of
from featurecache.store.view import View
from featurecache.store.write_view import find_view

NAMES = ["Meier", "Garcia", "Nguyen", "Ørsted"]


@pytest.fixture(autouse=True)
def _config(tmp_path: Path, monkeypatch) -> Path:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(scan, "YOUNG", 0)
    monkeypatch.delenv(pseudonyms.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config"


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A table whose paths, groups and some further columns are names; one image is text, one is missing."""
    lines = ["path,label,patient,portrait,remark,case,age,number"]
    for k, name in enumerate(NAMES * 2):
        path = f"{name}/{name}_Anna_{k}.png"
        save_picture(tmp_path / "scans" / path, k)
        lines.append(f"{path},{k % 2},{name} Anna,{path.upper()},seen by Dr. {name} anna,{k},{30 + k},{70 + k % 4}")
    (tmp_path / "scans" / "Weiss.png").write_text("Weiss")
    lines += ["Weiss.png,0,,,,,,", "Schwarz.png,1,Schwarz Anna,,,,,"]
    (tmp_path / "scans" / "list.csv").write_text("\n".join(lines), "utf-8")
    return tmp_path / "scans" / "list.csv"


def found_in(cache: Path, *words: str) -> list[str]:
    """Which words stand in any byte of any file, or in its name, however they are written."""
    files = [path for path in cache.rglob("*") if path.is_file()]
    content = b"\0".join(str(path.relative_to(cache)).encode() + path.read_bytes() for path in files)

    def forms(word: str) -> list[bytes]:
        cases = {word, word.lower(), word.upper()}
        return [
            form for case in cases for form in (case.encode(), case.encode("utf-16-le"), ascii(case)[1:-1].encode())
        ]

    return [word for word in words if any(form in content for form in forms(word))]


def hidden(data: Path, ids: bool = True, groups: bool = True, key: bytes = bytes(32)) -> Dataset:
    return pseudonymise(open_source(data), Secret(key), ids=ids, groups=groups)


EVERYBODY = [*NAMES, "Weiss", "Schwarz", "Anna"]


def test_no_byte_of_the_cache_holds_a_name(tmp_path: Path, table: Path, vit: str) -> None:
    options = {"backbone": vit, "outputs": "cls,tokens", "cache": tmp_path / "c", "workers": 2}
    result = featurecache.extract(table, **options, hash_ids=True, hash_groups=True)
    assert (result.images, len(result.failed)) == (8, 2)
    assert found_in(tmp_path / "c", *EVERYBODY) == []
    view = View(result.view)
    assert view.groups is not None and all(len(name) == 32 for name in [*view.ids, *view.groups])
    assert view.source["data"] == str(table)  # that remains
    assert view.meta["age"].tolist() == [30 + k for k in range(8)]
    plain = featurecache.extract(table, **options, name="plain")  # the grep does find what is there
    assert found_in(tmp_path / "c", *EVERYBODY) == EVERYBODY
    assert torch.equal(View(plain.view).tensor("tokens"), view.tensor("tokens"))


def test_the_memory_of_files_is_keyed_with_the_secret_too(tmp_path: Path, table: Path) -> None:
    options = {"backbone": "vit-demo", "random_weights": True, "cache": tmp_path / "c", "remember": True}
    hashed = plan.prepare(table, **options, hash_ids=True).scan
    plain = plan.prepare(table, **options).scan
    assert hashed is not None and plain is not None
    assert not set(hashed.files.keys.tolist()) & set(plain.files.keys.tolist())


def test_columns_that_hold_what_is_hashed_are_hashed_and_named(table: Path) -> None:
    dataset = hidden(table)
    assert dataset.notes[-1].endswith("and are hashed too: portrait, remark.")
    assert set(dataset.meta) == {"portrait", "remark", "case", "age", "number"}
    assert dataset.meta["portrait"][-1] == ""


def test_numbers_of_patients_in_a_further_column_are_hashed_and_other_numbers_are_not(tmp_path: Path) -> None:
    lines = ["path,patient,mrn,pulse", *(f"{k}.png,{4000 + k},{4000 + k},{4000 - k}" for k in range(5))]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    for k in range(5):
        (tmp_path / f"{k}.png").touch()
    dataset = hidden(tmp_path / "t.csv", ids=False)
    assert all(len(cell) == 32 for cell in dataset.meta["mrn"])
    assert (dataset.meta["pulse"][1], dataset.ids) == (3999, [f"{k}.png" for k in range(5)])


def test_an_image_without_a_group_does_not_leave_its_name_as_one(table: Path) -> None:
    dataset = hidden(table, groups=False)
    assert dataset.groups is not None and dataset.groups[8] == dataset.ids[8] != "Weiss.png"
    assert dataset.groups[0] == "Meier Anna"


def test_groups_stay_together_and_keep_their_hash_across_data_sets(table: Path) -> None:
    one, other = hidden(table), hidden(table, key=b"\1" * 32)
    assert one.groups is not None and one.groups[0] == one.groups[4] != one.groups[1]
    table.with_name("b.csv").write_text("path,patient\nMeier/Meier_Anna_0.png,Meier Anna\n")
    two = hidden(table.with_name("b.csv"))
    assert (two.ids[0], two.groups) == (one.ids[0], [one.groups[0]])
    assert not {*other.ids, *(other.groups or [])} & {*one.ids, *one.groups}


def test_the_same_images_are_found_again_through_the_view(tmp_path: Path, table: Path, vit: str) -> None:
    options = {"backbone": vit, "outputs": "cls", "cache": tmp_path / "c", "hash_ids": True, "hash_groups": True}
    view = View(featurecache.extract(table, **options).view)
    dataset = reopen(view.source)
    assert [name for name in dataset.ids if name in view.ids] == view.ids.tolist()
    assert dataset.read(0) == (table.parent / "Meier" / "Meier_Anna_0.png").read_bytes()
    assert dataset.source == view.source
    assert pseudonymise(dataset, load_secret(), ids=True, groups=True) is dataset  # not once more
    assert featurecache.extract(table, **options).computed == 0
    assert featurecache.extract(dataset, backbone=vit, cache=tmp_path / "c", outputs="cls").computed == 0
    assert "--hash-ids --hash-groups" in view.extract_command("pooler")


def test_another_secret_or_none_is_said_and_not_taken_for_other_images(tmp_path, monkeypatch, table, vit):
    view = View(featurecache.extract(table, backbone=vit, outputs="cls", cache=tmp_path / "c", hash_ids=True).view)
    monkeypatch.setenv(pseudonyms.VARIABLE, "of somebody else")
    with pytest.raises(SourceError, match="a secret that is another one"):
        reopen(view.source)
    monkeypatch.delenv(pseudonyms.VARIABLE)
    shutil.rmtree(tmp_path / "config")
    with pytest.raises(SourceError, match="a secret that is not here"):
        reopen(view.source)
    assert not (tmp_path / "config").exists()


def test_the_command_hashes_and_its_lines_show_the_files(tmp_path: Path, table: Path, vit: str) -> None:
    words = ["extract", "--backbone", vit, "--data", str(table), "--cache", str(tmp_path / "c"), "--outputs", "cls"]
    dry = call(*words, "--hash-ids", "--hash-groups", "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert not (tmp_path / "config").exists() and not (tmp_path / "c").exists()
    record = json.loads(call(*words, "--hash-ids", "--hash-groups", "--json").stdout)
    assert [Path(entry["id"]).name for entry in record["failed"]] == ["Weiss.png", "Schwarz.png"]
    assert found_in(tmp_path / "c", *EVERYBODY) == []
    assert "Schwarz.png: no such file" in call(*words, "--hash-ids", "--on-error", "fail", "--name", "x").output


def test_a_view_with_names_is_not_replaced_by_one_without(tmp_path: Path, table: Path, vit: str) -> None:
    options = {"backbone": vit, "outputs": "cls", "cache": tmp_path / "c"}
    featurecache.extract(table, **options)
    with pytest.raises(
        BadOption, match=r"was made without --hash-ids: with it no image.*--name.*: featurecache rm \S+ --cache"
    ) as refused:
        featurecache.extract(table, **options, hash_ids=True)
    view, _, cache = shlex.split(str(refused.value))[-3:]
    assert find_view(view, cache).parent.parent == options["cache"]
    hashed = featurecache.extract(table, **options, hash_ids=True, name="hashed")
    assert hashed.computed == 0
    with pytest.raises(BadOption, match="was made with --hash-ids: without it"):
        featurecache.extract(table, **options, name="hashed")


def test_groups_hashed_later_replace_those_that_were_there(tmp_path: Path, vit: str) -> None:
    lines = ["path,patient", *(f"{k}.png,{name} Anna" for k, name in enumerate(NAMES))]
    for k in range(len(NAMES)):
        save_picture(tmp_path / f"{k}.png", k)
    (tmp_path / "list.csv").write_text("\n".join(lines), "utf-8")
    options = {"backbone": vit, "outputs": "cls", "cache": tmp_path / "c"}
    featurecache.extract(tmp_path / "list.csv", **options)
    assert found_in(tmp_path / "c", *NAMES) == NAMES
    view = View(featurecache.extract(tmp_path / "list.csv", **options, hash_groups=True).view)
    assert (found_in(tmp_path / "c", *NAMES), view.ids[0]) == ([], "0.png")


def test_ids_that_name_the_groups_are_pointed_out(table: Path) -> None:
    note = "The ids still name the groups: --hash-ids hides them too."
    assert note not in hidden(table, ids=False).notes  # the group is "Meier Anna", the id "Meier_Anna"
    table.write_text("path,patient\nMeier/Meier_Anna_0.png,Meier\n")
    assert hidden(table, ids=False).notes[-1] == note


def test_the_secret_is_made_once_for_this_user_alone(tmp_path: Path) -> None:
    first = load_secret()
    assert not (tmp_path / "config").exists()
    first.keep()
    path = tmp_path / "config" / "featurecache" / "secret"
    assert (stat.S_IMODE(path.stat().st_mode), len(path.read_text().strip())) == (0o600, 64)
    assert load_secret() == Secret(first.value)
    assert [file.name for file in path.parent.iterdir()] == ["secret"]
    first.keep()
    with pytest.raises(BadOption, match="another process has just made the secret"):
        Secret(bytes(32), path).keep()


@pytest.mark.parametrize(
    ("content", "mode", "words"),
    [
        (b"0" * 64, 0o644, "can be read by others; close it: chmod 600"),
        (b"password", 0o600, "is not a secret of featurecache"),
        (b"\xff", 0o600, "cannot be read"),
    ],
)
def test_a_secret_that_others_can_read_or_that_is_none_is_refused(tmp_path, content, mode, words) -> None:
    load_secret().keep()
    pseudonyms.secret_file().write_bytes(content)
    pseudonyms.secret_file().chmod(mode)
    with pytest.raises(BadOption, match=words):
        load_secret()


def test_a_secret_inside_the_cache_is_refused(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "c" / "config"))
    with pytest.raises(BadOption, match="lies in the cache"):
        plan.prepare("digits", backbone="vit-demo", random_weights=True, cache=tmp_path / "c", hash_ids=True)


def test_where_it_cannot_be_kept_nothing_is_extracted(tmp_path: Path, vit: str, table: Path) -> None:
    (tmp_path / "config").symlink_to("nowhere")
    with pytest.raises(CannotWrite, match=r"cannot keep the secret of --hash-ids in .*FEATURECACHE_SECRET="):
        featurecache.extract(table, backbone=vit, cache=tmp_path / "c", hash_ids=True)
    assert not (tmp_path / "c").exists()


def test_a_secret_from_the_environment(monkeypatch, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv(pseudonyms.VARIABLE, "a long random text")
    secret = load_secret()
    assert (len(secret.value), secret.file, secret_of({"secret": secret.check})) == (32, None, secret)
    assert "long" not in repr(secret)
    monkeypatch.setenv(pseudonyms.VARIABLE, "another")
    assert load_secret().check != secret.check
