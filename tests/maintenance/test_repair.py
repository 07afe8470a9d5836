"""verify names what is damaged; repair computes exactly that again, and every other row keeps its bytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.builders import CLS, make_store, make_view
from support.checkpoints import save_vit
from support.command import call
from support.pictures import image_folder
from support.plant import flip

import featurecache
from featurecache.backbones.base import Backbone
from featurecache.errors import DamagedFile
from featurecache.extraction import canary
from featurecache.maintenance import verify as verification
from featurecache.maintenance.repair import repair
from featurecache.maintenance.verify import Damage, verify
from featurecache.store.view import View

N = 10


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:  # type: ignore[no-untyped-def]
    home = tmp_path_factory.mktemp("whole")
    save_vit(home / "vit")
    image_folder(home / "data", N)
    featurecache.extract(
        home / "data", backbone=str(home / "vit"), cache=home / "cache", outputs="cls,tokens", batch_size=4, workers=1
    )
    return home


@pytest.fixture
def home(undisturbed: Path, tmp_path: Path) -> Path:
    """The same cache and images to be damaged; the backbone stays where it was."""
    shutil.copytree(undisturbed / "cache", tmp_path / "cache")
    return tmp_path


def shard(home: Path, output: str = "tokens") -> Path:
    (path,) = (home / "cache").glob(f"*/{output}/*.h5")
    return path


def view(home: Path) -> View:
    return featurecache.open_view("data", home / "cache")


def place_of(home: Path, row: int, output: str = "tokens") -> int:
    """Where the bytes of a row of the view begin in its shard."""
    opened = View(home / "cache" / shard(home, output).parent.parent.name / "data.h5", columns_only=True)
    stored, info = opened.stored(output), opened.outputs[output]
    size = 2 * int(torch.tensor(info.shape).prod())
    return int(opened.files[stored.index[row, 0]]["offset"]) + int(stored.index[row, 1]) * size


def whole(home: Path, undisturbed: Path) -> bool:
    """Every shard has the bytes it had, and every row can be read."""
    for path in (undisturbed / "cache").glob("*/*/*.h5"):
        assert (home / "cache" / path.relative_to(undisturbed / "cache")).read_bytes() == path.read_bytes(), path
    opened = view(home)
    assert all(torch.equal(opened.tensor(name), view(undisturbed).tensor(name)) for name in opened.outputs)
    return verify(home / "cache").damages == ()


def run(home: Path, *words: str) -> tuple[int, str, str]:
    result = call(*words, "--cache", home / "cache")
    return result.exit_code, result.stdout, result.stderr


def test_a_whole_cache_is_said_to_be_whole(home: Path) -> None:
    code, out, err = run(home, "verify")
    assert code == 0 and out.startswith("checked    3 files, ") and "all are what was written" in out
    assert err.startswith("next       featurecache ls")
    assert run(home, "repair")[:2] == (0, "repaired   nothing: every file is what was written\n")


def test_a_flipped_bit_in_a_row_is_that_rows_and_one_row_is_computed(home: Path, undisturbed: Path) -> None:
    ids = view(home).ids
    flip(shard(home), place_of(home, 3) + 17)
    (damage,) = verify(home / "cache").damages
    assert damage.path == shard(home) and damage.rows == ((ids[3], "tokens"),)
    assert "does not match the hash in its first line; 1 of the 10 rows that views name is wrong" in str(damage)
    (done,) = repair(home / "cache")
    assert (done.computed, done.kept, done.replaced, done.left) == (1, N - 1, (shard(home),), ())
    assert whole(home, undisturbed)


def test_a_row_is_computed_at_the_place_in_its_batch_that_it_had(home: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    at, batches, forward = view(home).stored("tokens").index[:, 1].tolist(), [], Backbone.forward
    for place in (1, 3, 6):
        flip(shard(home), place_of(home, at.index(place)))

    def spy(self: Backbone, pixels: torch.Tensor, want: set[str]) -> dict[str, torch.Tensor]:
        batches.append(torch.nonzero(pixels.flatten(1).std(1) > 1e-3).flatten().tolist())
        return forward(self, pixels, want)

    monkeypatch.setattr(Backbone, "forward", spy)
    assert repair(home / "cache")[0].computed == 3
    assert batches[-2:] == [[1, 3], [2]]


def test_what_follows_from_stored_tokens_needs_no_backbone(home: Path, undisturbed: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(canary, "load_backbone", lambda **_: pytest.fail("the tokens are there"))
    shard(home, "cls").unlink()
    (done,) = repair(home / "cache")
    assert done.computed == N and whole(home, undisturbed)


def with_images(home: Path, undisturbed: Path) -> Path:
    """The view made again on a copy of the images, so that they can be lost."""
    shutil.copytree(undisturbed / "data", home / "data")
    for path in (home / "cache").glob("*/data.h5"):
        path.unlink()
    options = {"backbone": str(undisturbed / "vit"), "cache": home / "cache", "outputs": "cls,tokens", "workers": 1}
    assert featurecache.extract(home / "data", **options).computed == 0
    return home / "data"


def test_rows_whose_image_is_gone_are_named_and_nothing_is_changed(home: Path, undisturbed: Path) -> None:
    data, ids = with_images(home, undisturbed), view(home).ids
    for row in (2, 5, 7):
        flip(shard(home), place_of(home, row))
    (data / ids[2]).unlink()
    (data / ids[5]).write_bytes((data / ids[6]).read_bytes())
    before = shard(home).read_bytes()
    code, out, err = run(home, "repair")
    assert code == 1 and "2 images cannot be computed again" in out and "put the images back" in out
    words = " ".join(out.split())
    assert f"{ids[2]} {data} has no image of this name any more" in words
    assert f"{ids[5]} the file of this name holds another image now" in words
    assert "featurecache repair --drop" in err and shard(home).read_bytes() == before


def test_dropped_rows_leave_the_view_and_are_listed_there(home: Path, undisturbed: Path) -> None:
    data, whole_view = with_images(home, undisturbed), view(home)
    tokens, ids = whole_view.tensor("tokens"), whole_view.ids
    flip(shard(home), place_of(home, 2))
    flip(shard(home), place_of(home, 7))
    (data / ids[2]).unlink()
    code, out, _ = run(home, "repair", "--drop")
    assert code == 0 and "1 image left the views" in out and "1 row computed" in out
    rest, opened = [k for k in range(N) if k != 2], view(home)
    assert opened.ids.tolist() == [ids[k] for k in rest] and torch.equal(opened.tensor("tokens"), tokens[rest])
    assert opened.failed == [{"id": ids[2], "reason": f"{data} has no image of this name any more"}]
    assert verify(home / "cache").damages == ()


def test_a_damaged_view_is_left_and_its_extraction_brings_it_back(home: Path, undisturbed: Path) -> None:
    (path,) = (home / "cache").glob("*/data.h5")
    flip(path, 2000)
    code, out, _ = run(home, "repair")
    assert code == 1 and f"left       {path}" in out and "run the extraction again" in out
    path.unlink()
    options = {"backbone": str(undisturbed / "vit"), "cache": home / "cache", "outputs": "cls,tokens", "workers": 1}
    assert featurecache.extract(undisturbed / "data", **options).computed == 0
    assert whole(home, undisturbed)


def test_a_shard_that_is_whole_but_not_the_views_is_found(home: Path) -> None:
    made = make_view(home / "other", [0, 1, 2, 3], layouts=(CLS,), per_shard=4)
    path = made.store / made.files[0]["path"].decode()
    elsewhere = make_view(home / "third", [4, 5, 6, 7], layouts=(CLS,), per_shard=4)
    path.write_bytes((elsewhere.store / elsewhere.files[0]["path"].decode()).read_bytes())
    (damage,) = verify(home / "other").damages
    assert "its name is not the hash of its digests" in damage.what


def test_a_shard_of_another_store_is_found(tmp_path: Path) -> None:
    made = make_view(tmp_path, [0, 1], layouts=(CLS,))
    strange = make_store(tmp_path, "other", precision="bf16")
    moved = strange.path / made.files[0]["path"].decode()
    moved.parent.mkdir()
    shutil.copy(made.store / made.files[0]["path"].decode(), moved)
    (damage,) = verify(tmp_path).damages
    assert f"belongs to the store {made.fingerprint}" in damage.what


def test_stores_are_named_by_folder_or_view(home: Path) -> None:
    make_view(home / "cache", [0, 1], layouts=(CLS,), name="toys")
    assert {store.path for store in verification.stores_called(["data"], home / "cache")} == {shard(home).parent.parent}
    flip(shard(home), -1)
    assert run(home, "verify", "toys")[0] == 0
    assert run(home, "verify", str(shard(home).parent.parent))[0] == 1


def test_bytes_that_change_while_a_shard_is_repaired_are_not_taken(home: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    flip(shard(home), place_of(home, 3))
    before = shard(home).read_bytes()
    monkeypatch.setattr(verification.ReferencedShard, "is_whole", lambda self: np.ones(len(self.numbers), bool))
    with pytest.raises(DamagedFile, match="other bytes than a moment ago"):
        repair(home / "cache")
    assert shard(home).read_bytes() == before


def test_a_python_backbone_is_not_run_without_being_trusted(home: Path) -> None:
    store = shard(home).parent.parent
    record = json.loads((store / "spec.json").read_text())
    del record["check"]
    record["provenance"]["request"]["name"] = "python:evil:factory"
    (store / "spec.json").write_text(json.dumps(record))
    shard(home).unlink()
    code, _, err = run(home, "repair")
    assert code == 1 and "--trust-code" in err


def test_a_damage_says_its_file_once(tmp_path: Path) -> None:
    assert str(Damage(tmp_path / "a", f"{tmp_path / 'a'} is missing")) == f"{tmp_path / 'a'} is missing"
