"""Random layouts whose truth is known, 2,500 of them: each is read right, or refused; never otherwise."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from featurecache.errors import SourceError
from featurecache.sources.layout import read_layout

LAYOUTS = 2500
SPLITS = {
    "train": ("train", "Train", "TRAIN", "training", "training_set", "Train Set", "train_data", "trainset", "seg_train",
              "train-images", "Training Data", "TrainingImages"),
    "val": ("val", "valid", "Validation", "validate", "val_images", "dev", "validation_set", "VAL", "valset"),
    "test": ("test", "Test", "testing", "test_set", "test data", "seg_test", "Testing", "test-images", "holdout"),
}  # fmt: skip
CLASSES = (
    ("NORMAL", "PNEUMONIA"), ("cats", "dogs", "birds"), ("0", "1"), tuple(map(str, range(12))),
    ("class_001", "class_002"),
    ("Mild", "Moderate", "No_DR"), ("benign", "malignant", "normal"), ("n01440764", "n01443537"), ("akiec", "bcc"),
    ("train station", "airport"), ("grade 1", "grade 2", "grade 10"), ("all", "hem"), ("a", "b", "c", "d"),
    ("runs", "cache"), ("\u00dcbung", "\u00f6lig"), ("left", "right"), ("with_mask", "without_mask"),
)  # fmt: skip
PERSONS = ("patient{:05d}", "{:04d}9", "P{:03d}", "subject-{}", "case_{:02d}", "LIDC-IDRI-{:04d}", "TCGA-A1-{:04d}")


@dataclass
class Case:
    """Paths below a folder, and of each (split, class, person, fold), or None of a mask."""

    truth: dict[str, tuple[str, str, str, str] | None]

    @classmethod
    def drawn(cls, rng: random.Random) -> Case:
        classes = rng.choice(CLASSES)
        splits = rng.choice(([], ["train", "test"], ["train", "val", "test"], ["train", "val"]))
        words = {split: rng.choice(SPLITS[split]) for split in splits}
        split_first = rng.random() < 0.5
        folds = 0 if splits or rng.random() < 0.8 else rng.randint(2, 5)
        person, form = rng.choice((None, None, "above", "below")), rng.choice(PERSONS)
        person = None if folds else person
        wrapper = rng.choice(("", "", "chest_xray/", "data/set/"))
        twice = split_first and rng.random() < 0.15
        mask = rng.choice((None, None, None, "_mask", "masks/"))
        images = "images/" if mask == "masks/" else rng.choice(("", "", "", "images/"))
        visit = rng.choice(("", "", "study1/")) if person == "below" else ""
        truth: dict[str, tuple[str, str, str, str] | None] = {}
        for split in splits or [""]:
            for name in classes:
                if split not in ("", "train") and rng.random() < 0.1:
                    continue
                for _ in range(rng.randint(2, 4)):
                    number = len(truth)
                    owner = number if person == "below" else rng.randint(0, 3) + 10 * ["", *SPLITS].index(split)
                    somebody = form.format(1000 + owner) if person else ""
                    fold = f"fold_{number % folds}" if folds else ""
                    parts = [words[split]] * (1 + twice) if split else []
                    parts = [*parts, name] if split_first else [name, *parts]
                    if person == "above":
                        parts.insert(len(parts) - 1 if split_first else 0, somebody)
                    parts = [*([fold] if fold else []), *parts, *([somebody] if person == "below" else [])]
                    folder = f"{wrapper}{'/'.join(parts)}/{visit}"
                    truth[f"{folder}{images}{number}.png"] = split, name, somebody, fold
                    if mask:
                        truth[f"{folder}masks/{number}.png" if images and mask == "masks/" else
                              f"{folder}{images}{number}_mask.png"] = None  # fmt: skip
        return cls(truth)

    def outcome(self) -> str:
        """right, refused or wrong."""
        paths = sorted(self.truth)
        try:
            layout = read_layout(paths, "data")
        except SourceError:
            return "refused"
        none = [""] * len(layout.rows)
        columns = layout.splits, layout.classes, layout.groups or none, layout.folds or none
        rows = dict(zip((paths[row] for row in layout.rows), zip(*columns, strict=True), strict=True))
        return "right" if rows == {path: row for path, row in self.truth.items() if row is not None} else "wrong"


@pytest.mark.integration
def test_layouts_are_read_right_or_refused_and_never_otherwise():
    outcomes = {seed: Case.drawn(random.Random(seed)).outcome() for seed in range(LAYOUTS)}
    assert [seed for seed, outcome in outcomes.items() if outcome == "wrong"] == []
    assert list(outcomes.values()).count("right") > 0.9 * LAYOUTS


def test_a_mistake_in_a_layout_would_be_noticed():
    noticed = 0
    for seed in range(100):
        case, rng = Case.drawn(random.Random(seed)), random.Random(seed)
        path = rng.choice([path for path, row in case.truth.items() if row is not None])
        column, row = rng.randrange(4), list(case.truth[path] or ())
        row[column] += "other"
        case.truth[path] = (row[0], row[1], row[2], row[3])
        outcome = case.outcome()
        assert outcome != "right"
        noticed += outcome == "wrong"
    assert noticed > 80
