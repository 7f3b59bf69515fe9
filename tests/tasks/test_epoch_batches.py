"""Another number of workers goes on with the batches that are left of an epoch."""

import pytest
import torch
from fairseq.data.iterators import EpochBatchIterator

from fairseq_hyperrouter.tasks.epoch_batches import EpochBatches


def batches(workers, rank, total=12):
    stock = EpochBatchIterator(
        torch.utils.data.TensorDataset(torch.arange(total)),
        collate_fn=lambda rows: [int(row[0]) for row in rows],
        batch_sampler=[[number] for number in range(total)],
        num_shards=workers,
        shard_id=rank,
    )
    return EpochBatches.like(stock)


def taken(workers, count, state=None):
    """The next *count* batches of every worker, and the state after them."""
    all_taken = []
    for rank in range(workers):
        iterator = batches(workers, rank)
        if state is not None:
            iterator.load_state_dict(state)
        epoch = iterator.next_epoch_itr()
        all_taken += [next(epoch)[0] for _ in range(count)]
    return all_taken, iterator.state_dict()


@pytest.mark.parametrize("before", [1, 2, 4])
@pytest.mark.parametrize("after", [1, 2, 4])
def test_every_batch_once(before, after):
    first, state = taken(before, 4 // before)
    rest, end = taken(after, 8 // after, state)
    assert sorted(first + rest) == list(range(12))
    assert end["epoch"] == 2 and end["iterations_in_epoch"] == 0


def test_a_place_that_another_number_does_not_divide():
    """After 6 batches four workers repeat the last two: at most one batch each, and none is left out."""
    first, state = taken(2, 3)
    rest, _ = taken(4, 2, state)
    assert set(first + rest) == set(range(12)) and len(first + rest) == 14


def test_an_empty_batch_comes_first_in_its_update():
    """11 batches for 2 workers: the second has 5 and an empty one, of which the last two are one update."""
    for update_freq, place in (((1,), 5), ((2,), 4), ((4,), 4), ((3,), 3), ((1, 6), 0)):
        stock = batches(2, 1, total=11)
        epoch = len(update_freq)
        order = EpochBatches.like(stock, update_freq).ordered_batches(epoch, False, shuffle=False)
        assert [len(batch) for batch in order].index(0) == place
        assert sorted(number for batch in order for number in batch) == [1, 3, 5, 7, 9]


def test_a_checkpoint_of_the_stock_task():
    iterator = batches(2, 0)
    iterator.load_state_dict({"version": 2, "epoch": 3, "iterations_in_epoch": 2, "shuffle": True})
    assert iterator.epoch == 3 and iterator.iterations_in_epoch == 2
