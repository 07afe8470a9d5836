"""The order of training rows."""

from __future__ import annotations

import numpy as np
import pytest

from heads.training.batches import BalancedBatches, PlainBatches


def drawn(labels, size, epochs=1, seed=0):
    batches = BalancedBatches(np.array(labels), size, seed)
    return [[batch.numpy() for batch in batches.epoch()] for _ in range(epochs)]


def test_a_plain_epoch_is_every_row_once_in_a_new_order():
    batches = PlainBatches(10, 4, split_seed=0)
    first, second = batches.epoch(), batches.epoch()
    assert [len(b) for b in first] == [4, 4, 2]
    assert sorted(np.concatenate(first)) == sorted(np.concatenate(second)) == list(range(10))
    assert (np.concatenate(first) != np.concatenate(second)).any()


def test_every_balanced_batch_has_its_classes_equally():
    labels = np.array([0] * 90 + [1] * 10)
    (epoch,) = drawn(labels, 8)
    assert [len(b) for b in epoch] == [8] * 12 + [4]
    assert all((labels[b] == 0).sum() == (labels[b] == 1).sum() for b in epoch)


@pytest.mark.parametrize(("classes", "size"), [(3, 32), (6, 32), (20, 32), (50, 32), (7, 3)])
def test_a_remainder_goes_round_so_that_no_batch_and_no_class_differs_by_more_than_one(classes, size):
    labels = np.arange(classes * 40) % classes
    (epoch,) = drawn(labels, size)
    in_batch = np.array([np.bincount(labels[b], minlength=classes) for b in epoch])
    assert (in_batch.max(1) - in_batch.min(1)).max() <= 1
    assert np.ptp(in_batch[:-1].sum(0)) <= 1


def test_a_class_comes_round_only_after_all_its_images_across_epochs_too():
    labels = np.array([0] * 17 + [1] * 5)
    rows = np.concatenate([b for epoch in drawn(labels, 4, epochs=5) for b in epoch])
    for c, count in ((0, 17), (1, 5)):
        mine = rows[labels[rows] == c]
        for start in range(0, len(mine) - count, count):
            assert len(set(mine[start : start + count])) == count


def test_an_epoch_is_n_draws_and_a_class_that_is_not_there_is_not_drawn():
    rows = np.concatenate(drawn([0] * 30 + [5] * 3, 10)[0])
    assert len(rows) == 33 and 16 <= (rows >= 30).sum() <= 17
