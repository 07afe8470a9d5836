"""Images that a program holds: paths, arrays and PIL images, as a dataset or one by one."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from support.small_sets import pictures, refused, shades, shades_of

from featurecache.errors import BadOption, SourceError, UnreadableImage
from featurecache.images.decoding import decode
from featurecache.sources import open_source, reopen
from featurecache.sources.in_memory import encoded_of_pil

COLOUR = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)


def test_a_list_of_paths_gives_these_images_in_this_order(tmp_path, monkeypatch):
    pictures(tmp_path, "a.png", "sub/b.png")
    monkeypatch.chdir(tmp_path)
    data = open_source(["sub/b.png", tmp_path / "a.png"])
    assert (data.ids, data.task, data.name) == (["sub/b.png", str(tmp_path / "a.png")], "unlabelled", "images")
    assert data.read(1) == (tmp_path / "a.png").read_bytes() and shades_of(data) == [1, 0]


@pytest.mark.parametrize("images", [shades(3, 5, 4), shades(3, 5, 4, 3), list(shades(3, 5, 4, 3))])
def test_an_array_of_images_or_a_list_of_them(images):
    data = open_source(images)
    assert (data.ids, data.classes) == (["image 1", "image 2", "image 3"], [])
    assert [int(np.ravel(data.read(row))[0]) for row in (2, 0, 1)] == [2, 0, 1]


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "1", "I;16"])
def test_a_pil_image_is_what_its_png_is(tmp_path, mode):
    picture = Image.fromarray(shades(40, 6)) if mode in ("L", "I;16") else Image.fromarray(COLOUR)
    picture = Image.fromarray(np.arange(20, dtype=np.uint16).reshape(4, 5) * 3000) if mode == "I;16" else picture
    picture = picture.convert(mode)
    picture.save(tmp_path / "a.png")
    (row,) = open_source([picture]).images.parts[0]
    assert np.array_equal(decode(row), decode((tmp_path / "a.png").read_bytes()))


def test_a_pil_image_is_turned_as_its_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.repeat(np.repeat(COLOUR, 16, 0), 16, 1)).save(tmp_path / "a.jpg", exif=exif, quality=95)
    from_file = decode((tmp_path / "a.jpg").read_bytes())
    opened = decode(encoded_of_pil(Image.open(tmp_path / "a.jpg")))
    assert opened.shape == from_file.shape == (3, 48, 32)
    assert (opened.int() - from_file.int()).abs().max() <= 2  # two decoders of JPEG


def test_a_pil_image_that_png_cannot_hold_is_a_named_failure():
    with pytest.raises(UnreadableImage, match=r"PIL image of mode F .*convert it to RGB"):
        encoded_of_pil(Image.new("F", (2, 2)))


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (None, "the images are NoneType; expected a folder"),
        ([], "the images are list; expected"),
        ([1, "a.png"], "the images are list of int, str; expected"),
        (COLOUR, "uint8 [2, 3, 3]"),
        (COLOUR, "one image is a list of one"),
        (shades(2, 3, 4, 4), "uint8 [2, 3, 4, 4]"),
        (["a.png", "a.png"], "holds a.png twice"),
        (["."], "holds the folder ."),
    ],
)
def test_what_is_no_image_gets_a_sentence(images, words):
    refused(images, words)


WORDS = {"columns": {"label": "x"}, "leave_out": ["a"], "letter_case": "keep", "classes_at": 1, "order": ["a", "b"],
         "root": ".", "uncertain": "zero"}  # fmt: skip


@pytest.mark.parametrize("word", WORDS)
def test_words_about_a_folder_or_a_table_are_refused_and_not_ignored(word):
    refused(shades(3, 5, 4), f"{word} says how a folder or a table is read", **{word: WORDS[word]})


def test_bits_and_pages_are_those_of_listed_files_too(tmp_path):
    pictures(tmp_path, "a.png")
    assert open_source([tmp_path / "a.png"], bits=12, page="0").bits == 12
    with pytest.raises(BadOption, match="--page is for images in files of their own"):
        open_source(shades(3, 5, 4), page="1")


def test_what_a_program_gave_cannot_be_opened_again():
    with pytest.raises(SourceError, match="3 images in memory were given by a program"):
        reopen(open_source(shades(3, 5, 4)).source)
