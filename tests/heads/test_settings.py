"""The table of training options: what commands offer, what values are allowed, and what a run can be told by."""

from __future__ import annotations

import json
from dataclasses import fields

import numpy as np
import pytest
import torch

import cli
from featurecache.errors import BadOption
from featurecache.files.records import canonical_json
from heads.runs.run import option_words
from heads.settings import TABLE, Settings, options_for
from heads.training.job import check_options

TAKERS = {
    "train-head": ("any", "head"),
    "train-baseline": ("any", "network", "finetune"),
    "ablate": ("any", "head", "network", "finetune"),
}


@pytest.mark.parametrize("command", TAKERS)
def test_a_command_offers_those_options_of_the_table_that_are_for_it(command):
    offered = {option.name for option in cli.main.commands[command].params}
    several = {"output", "seed", "fraction", "fold"} if command == "ablate" else set()
    assert offered & {*TABLE} == {*options_for(*TAKERS[command])} - several


def test_every_field_but_the_head_is_in_the_table_with_a_help_text():
    assert [*TABLE] == [each.name for each in fields(Settings)][1:]
    assert all(option.metadata["help"] for option in TABLE.values())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"fraction": 0.0}, "--fraction is 0; it must be above 0 and at most 1"),
        ({"fraction": 1.1}, "--fraction is 1.1"),
        ({"dropout": 1.0}, "--dropout is 1; it must be at least 0 and below 1"),
        ({"label_smoothing": -0.1}, "at least 0"),
        ({"sensitivity": 1.5}, "--sensitivity is 1.5"),
        ({"weight_decay": float("inf")}, "--weight-decay is inf; it must be at least 0"),
        ({"lr": -1.0}, "--lr is -1; it must be above 0"),
        ({"lr": float("nan")}, "--lr is nan; it must be above 0"),
        ({"ram": -1.0}, "--ram is -1"),
        ({"epochs": 0}, "--epochs is 0; it must be at least 1"),
        ({"train_per_class": 0}, "must be at least 1"),
        ({"folds": 3}, "give both"),
        ({"folds": 3, "fold": 3}, "0 to 2"),
        ({"schedule": "step"}, "--schedule step: it is one of constant, linear, cosine, plateau"),
        ({"optimizer": "rmsprop"}, "one of adam, adamw, sgd"),
        ({"precision": "fp16"}, "one of fp32, bf16"),
        ({"standardize": "minmax"}, "one of none, zscore, l2"),
        ({"warmup": 1.0}, "--warmup is 1; it must be at least 0 and below 1"),
        ({"clip_norm": 0.0}, "--clip-norm is 0; it must be above 0"),
        ({"momentum": 0.9}, "momentum: no such option"),
        ({"augment": "spin"}, "no step is called"),
        ({"augment": "flip,none"}, "none stands alone.*--augment none --augment"),
        ({"image_size": 0}, "--image-size is 0"),
    ],
)
def test_a_value_outside_its_words_or_interval_is_refused(options, says):
    with pytest.raises(BadOption, match=says):
        Settings.of("linear", **options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"epochs": 3.5}, "--epochs is 3.5; it must be a whole number"),
        ({"seed": 1.5}, "--seed is 1.5; it must be a whole number"),
        ({"seed": True}, "--seed is True; it must be a whole number"),
        ({"epochs": None}, "--epochs is None; it must be a whole number"),
        ({"train_per_class": "3"}, "--train-per-class is '3'; it must be a whole number"),
        ({"lr": "0.01"}, "--lr is '0.01'; it must be a number"),
        ({"lr": np.array([0.1, 0.2])}, r"--lr is \[0.1, 0.2\]; it must be a number"),
        ({"balance": "no"}, "--balance is 'no'; it must be True or False"),
    ],
)
def test_a_value_of_another_type_is_refused(options, says):
    with pytest.raises(BadOption, match=says):
        Settings.of("linear", **options)


def test_numbers_of_numpy_are_those_of_python():
    counts = dict.fromkeys(("epochs", "batch_size", "patience", "train_per_class", "folds", "seed"), np.int64(2))
    given = {**counts, "fold": np.int8(1), "lr": np.float32(0.5), "balance": np.bool_(False), "ram": torch.tensor(0.5)}
    settings = Settings.of("linear", **given, classes=np.array(["a", "b"]), only=np.array(["a"]))
    own = {**dict.fromkeys(counts, 2), "fold": 1, "lr": 0.5, "balance": False, "ram": 0.5}
    assert settings == Settings("linear", **own, classes=("a", "b"), only=("a",))
    assert Settings.from_dict(json.loads(canonical_json(settings.to_dict()))) == settings


def test_the_ends_of_an_interval_belong_to_it_as_its_brackets_say():
    assert Settings("linear", fraction=1.0, dropout=0.0, weight_decay=0.0, patience=0, ram=0.0).fraction == 1


def test_what_is_for_others_is_refused_where_the_name_is_resolved():
    for head, taken in (("linear", ()), ("cnn-cifar", ("network",)), ("finetune:resnet50", ("network", "finetune"))):
        for name in options_for("network", "finetune"):
            given = {"augment": "flip", "device": "cuda", "weights": "/w", "image_size": 1, "lora": 1}
            value = given.get(name, True)
            settings = Settings(head, **{name: value})
            if name in options_for(*taken):
                check_options(settings)
            else:
                way = ".*extract --copies" if name == "augment" else ""
                with pytest.raises(BadOption, match=f"--{name.replace('_', '-')} would do nothing{way}"):
                    check_options(settings)


def test_the_words_of_a_command_line_are_the_options_that_differ():
    settings = Settings("linear", lr=0.01, balance=False, only=("a", "b"), classes=("c", "d=e,f"), gated=True)
    said = "--lr 0.01 --no-balance --classes c --classes d=e,f --only a,b --gated"
    assert " ".join(option_words(settings.to_dict())) == said
    assert option_words(Settings("linear", only=("a,b",)).to_dict()) == ["--only", "a,b"]  # as it was typed
    assert option_words(Settings("linear", only=("a, b", "c")).to_dict()) == ["--only", '"a, b",c']
    assert option_words(Settings("cnn-cifar").to_dict(), {"augment": "flip"}) == ["--augment", "none"]
    assert option_words(Settings("linear", lr=0.012345678).to_dict()) == ["--lr", "0.012345678"]
    assert option_words(Settings("linear", lr=np.float64(0.012345678)).to_dict()) == ["--lr", "0.012345678"]
    assert Settings.from_dict(settings.to_dict()) == settings
