"""batches.py: the same batches in the same order, also for those who come in the middle."""

import itertools

import pytest
from torch.utils.data import DataLoader

from engine.data.batches import Endless, GlobalBatches


def loader(rank=0, world_size=1, seed=0):
    batches = GlobalBatches(11, 4, seed=seed, rank=rank, world_size=world_size)
    return DataLoader(list(range(11)), batch_sampler=batches, collate_fn=list)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("drawn", range(10))
def test_whoever_comes_later_gets_what_was_left(drawn, world_size):
    for rank in range(world_size):
        whole = list(itertools.islice(Endless(loader(rank, world_size)), 14))
        late = Endless(loader(rank, world_size), drawn=drawn)
        assert list(itertools.islice(late, 14 - drawn)) == whole[drawn:]
        assert late.drawn == 14


def test_every_epoch_has_an_order_of_its_own():
    whole = list(itertools.islice(Endless(loader()), 6))
    first, second = (sorted(itertools.chain.from_iterable(epoch)) for epoch in (whole[:3], whole[3:]))
    assert first == second == list(range(11)) and whole[:3] != whole[3:]


def test_going_on_from_the_very_first_is_the_first_epoch_again():
    batches = loader()
    whole = list(itertools.islice(Endless(batches, drawn=0), 5))
    assert list(itertools.islice(Endless(batches, drawn=0), 5)) == whole
    assert list(itertools.islice(Endless(batches), 5)) != whole  # where nobody asks for it, the order goes on


def test_lists_go_on_too():
    assert list(itertools.islice(Endless("abc", drawn=4), 4)) == list("bcab")


def test_nothing_to_go_through_is_an_error():
    for batches in ([], iter("ab")):
        endless = Endless(batches)
        with pytest.raises(ValueError, match="came to their end"):
            list(endless)
