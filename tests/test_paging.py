"""Pages: who holds them, when they are shared and copied, and what is refused."""

from __future__ import annotations

import pytest
import torch

import nsa
from tests.streams import Stream, Tokens

EXACT = {"rtol": 0, "atol": 1e-12}


@pytest.fixture
def stream() -> Stream:
    return Stream(page_size=4)


def test_pages_come_back_when_the_last_reference_goes() -> None:
    pages = nsa.PageAllocator(3)
    assert pages.allocate(2) == [0, 1]
    pages.share([1])
    pages.free([0, 1])
    assert (pages.num_free, pages.references(0), pages.references(1)) == (2, 0, 1)
    pages.free([1])
    assert pages.num_free == 3
    assert sorted(pages.allocate(3)) == [0, 1, 2]


def test_what_an_allocator_refuses_changes_nothing() -> None:
    pages = nsa.PageAllocator(3)
    pages.allocate(2)
    for call, message in [
        (lambda: pages.allocate(2), "the cache needs 2 more pages, and 1 of 3 are free"),
        (lambda: pages.free([0, 2]), "page 2 is free already: it has 0 references, got 1 to drop"),
        (lambda: pages.free([0, 0]), "page 0 is free already: it has 1 references, got 2 to drop"),
        (lambda: pages.share([0, 2]), "pages must be in use to be shared, got page 2, which is free"),
        (lambda: pages.share([3]), "pages must be from 0 to 2, got 3"),
        (lambda: pages.free([-1]), "pages must be from 0 to 2, got -1"),
        (lambda: nsa.PageAllocator(0), "num_pages must be positive, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
        assert (pages.num_free, pages.references(0), pages.references(1)) == (1, 1, 1)


def test_a_fork_shares_its_past_and_copies_the_page_it_writes(stream: Stream) -> None:
    cache = stream.cache(2, 40)
    stream.append(cache, Tokens.draw(2, 14))
    assert cache.allocator.num_free == 20 - 8
    cache.fork(0, 1)
    table = cache.view().table
    assert torch.equal(table[0], table[1])
    assert cache.allocator.num_free == 20 - 4
    stream.append(cache, Tokens.draw(2, 1, seed=1))
    assert (table[0, :3] == table[1, :3]).all()  # full, so shared for good
    assert table[0, 3] != table[1, 3]
    assert cache.allocator.num_free == 20 - 5


def test_a_crop_into_a_shared_page_copies_it(stream: Stream) -> None:
    cache, first = stream.cache(2, 40, max_crop=5), Tokens.draw(2, 12)
    stream.append(cache, first)
    cache.fork(0, 1)
    cache.crop([12, 10])
    table = cache.view().table
    assert torch.equal(table[0, :3], table[1, :3])
    new = Tokens.draw(2, 2, seed=1)
    got = stream.feed(cache, new)
    assert table[0, 2] != table[1, 2]
    for b, n in enumerate([12, 10]):
        torch.testing.assert_close(got[b], stream.full(first[:1, :n].then(new[b : b + 1]))[0, -2:], **EXACT)


def test_sequences_over_less_memory_than_they_might_need(stream: Stream) -> None:
    """Ten pages for two sequences of up to ten pages each; running out is told before anything is written."""
    cache, tokens = stream.cache(2, 40, allocator=nsa.PageAllocator(10)), Tokens.draw(2, 30)
    stream.append(cache, tokens[:, :20])
    before = cache.state_dict()
    with pytest.raises(ValueError, match="the cache needs 2 more pages, and 0 of 10 are free"):
        stream.append(cache, tokens[:, 20:21])
    assert all(torch.equal(x, before[name]) for name, x in cache.state_dict().items())
    cache.crop([0, 20])
    assert cache.allocator.num_free == 5
    held, new = [Tokens.draw(1, 0), tokens[1:, :20]], Tokens.draw(2, 8, seed=1)
    got = stream.feed(cache, new)
    for b, s in enumerate(held):
        torch.testing.assert_close(got[b], stream.full(s.then(new[b : b + 1]))[0, -8:], **EXACT)


def test_a_state_that_needs_too_many_pages_is_refused(stream: Stream) -> None:
    cache, small = stream.cache(2, 40), stream.cache(2, 40, allocator=nsa.PageAllocator(9))
    tokens = Tokens.draw(2, 20)
    stream.append(cache, tokens)
    stream.append(small, tokens[:, :16])
    before = small.state_dict()
    with pytest.raises(ValueError, match="the sequences need 10 pages, and 9 of 9 would be free"):
        small.load_state_dict(cache.state_dict())
    assert all(torch.equal(x, before[name]) for name, x in small.state_dict().items())


def test_the_caller_may_give_pages(stream: Stream) -> None:
    cache, tokens = stream.cache(2, 40), Tokens.draw(2, 10)
    pages = cache.allocator.allocate(5)
    cache.give_pages(1, [pages[4], pages[0]])
    cache.give_pages(1, pages[2:3])
    torch.testing.assert_close(stream.feed(cache, tokens), stream.full(tokens), **EXACT)
    assert cache.view().table[1, :4].tolist() == [4, 0, 2, -1]
    cache.allocator.free([1, 3])
    cache.crop(0)
    assert cache.allocator.num_free == 20


def test_pages_that_cannot_be_given(stream: Stream) -> None:
    cache = stream.cache(2, 8)
    cache.give_pages(0, cache.allocator.allocate(1))
    for sequence, pages, message in [
        (2, [0], "sequence must be a sequence number below 2, got 2"),
        (1, [4], "the block table must point to pages 0 to 3, got 4"),
        (1, [-1], "the block table must point to pages 0 to 3, got -1"),
        (1, [3], "pages must be allocated before they are given, got page 3, which is free"),
        (0, [0], r"pages must not be given twice, got \[0\] after \[0\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            cache.give_pages(sequence, pages)
    taken = cache.allocator.allocate(2)
    with pytest.raises(ValueError, match=r"a sequence has at most 2 pages, got 1 \+ 2"):
        cache.give_pages(0, taken)
    with pytest.raises(ValueError, match="pages can only be given to a paged cache, got one without page_size"):
        Stream().cache(2, 8).give_pages(0, [0])


def test_an_allocator_of_the_callers_own(stream: Stream) -> None:
    """It decides which pages; one that leads outside the pool is refused before anything is written."""

    class Backwards(nsa.PageAllocator):
        offset = 0

        def allocate(self, count: int) -> list[int]:
            return [page + self.offset for page in sorted(super().allocate(count), reverse=True)]

    cache, tokens = stream.cache(1, 40, allocator=Backwards(10)), Tokens.draw(1, 12)
    torch.testing.assert_close(stream.feed(cache, tokens[:, :9]), stream.full(tokens)[:, :9], **EXACT)
    Backwards.offset = 10
    with pytest.raises(ValueError, match="the block table must point to pages 0 to 9, got 13"):
        stream.append(cache, Tokens.draw(1, 5, seed=1))
    assert cache.lengths == (9,)
    torch.testing.assert_close(stream.feed(cache, tokens[:, 9:]), stream.full(tokens)[:, 9:], **EXACT)
