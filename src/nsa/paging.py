"""Pages of a cache: who holds which, and the block table that tells the device.

A page is a run of rows in a cache's tensors. Sequences with a common past point to the same pages; a page is copied when one of
them writes to it while another still points there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch


class PageAllocator:
    """Hands out the pages ``0 .. num_pages - 1`` and counts who points to each.

    Args:
        num_pages: pages there are.

    Raises:
        ValueError: ``num_pages`` is not positive.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages must be positive, got {num_pages}")
        self.num_pages = num_pages
        self._free = list(range(num_pages))[::-1]  # the lowest leaves first
        self._references = [0] * num_pages

    @property
    def num_free(self) -> int:
        """Pages that nobody points to."""
        return len(self._free)

    def references(self, page: int) -> int:
        """How many point to ``page``; 0 where it is free."""
        return self._references[self._known(page)]

    def allocate(self, count: int) -> list[int]:
        """``count`` free pages, now with one reference each.

        Raises:
            ValueError: fewer are free; none is taken then.
        """
        if count > len(self._free):
            raise ValueError(f"the cache needs {count} more pages, and {len(self._free)} of {self.num_pages} are free")
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._references[page] = 1
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """One more reference to each of ``pages``.

        Raises:
            ValueError: one of them is free, or there is no such page; nothing is counted then.
        """
        pages = list(pages)
        for page in pages:
            if self.references(page) == 0:
                raise ValueError(f"pages must be in use to be shared, got page {page}, which is free")
        for page in pages:
            self._references[page] += 1

    def free(self, pages: Iterable[int]) -> None:
        """One reference less to each of ``pages``; those without any are free again.

        Raises:
            ValueError: one of them is free already, or there is no such page; nothing is freed then.
        """
        pages = list(pages)
        for page, times in Counter(pages).items():
            if self.references(page) < times:
                raise ValueError(f"page {page} is free already: it has {self.references(page)} references, got {times} to drop")
        for page in pages:
            self._references[page] -= 1
            if self._references[page] == 0:
                self._free.append(page)

    def _known(self, page: int) -> int:
        if not 0 <= page < self.num_pages:
            raise ValueError(f"pages must be from 0 to {self.num_pages - 1}, got {page}")
        return page


class BlockTable:
    """The pages of every sequence in order, on the host and as int32 ``[B, max_pages]`` on the device, -1 where there is none.

    Args:
        batch_size: B, sequences.
        max_pages: pages a sequence may have.
        page_size: tokens of a page.
        allocator: where pages come from and go to; None gives sequence ``b`` page ``b`` for good.
        device: of the table.
    """

    def __init__(
        self,
        batch_size: int,
        max_pages: int,
        page_size: int,
        allocator: PageAllocator | None,
        device: torch.device | str | None,
    ) -> None:
        self.max_pages, self.page_size = max_pages, page_size
        self.allocator, self.fixed = allocator or PageAllocator(batch_size), allocator is None
        self.pages: list[list[int]] = [self.allocator.allocate(1) if self.fixed else [] for _ in range(batch_size)]
        self.device = torch.full((batch_size, max_pages), -1, dtype=torch.int32, device=device)
        self._upload()

    def reserve(self, lengths: Sequence[int], ends: Sequence[int]) -> list[tuple[int, int]]:
        """Give every sequence ``b`` pages of its own for its tokens ``lengths[b] .. ends[b] - 1``.

        Returns:
            pairs of pages: the first, which others need too, has to be copied to the second.

        Raises:
            ValueError: too few pages are free; nothing is changed then.
        """
        missing = [max(0, -(-end // self.page_size) - len(pages)) for end, pages in zip(ends, self.pages)]
        shared = list(self._written_and_shared(lengths, ends))
        if not shared and not any(missing):
            return []
        fresh = self.allocator.allocate(sum(missing) + len(shared))
        self._check_inside(fresh)
        copies = []
        for b, i in shared:
            copies.append((self.pages[b][i], fresh.pop()))
            self.pages[b][i] = copies[-1][1]
        for pages, count in zip(self.pages, missing):
            pages += [fresh.pop() for _ in range(count)]
        self.allocator.free(old for old, _ in copies)
        self._upload()
        return copies

    def give(self, sequence: int, pages: Sequence[int]) -> None:
        """Let ``sequence`` go on in ``pages``, which the caller allocated and leaves to it.

        Raises:
            ValueError: a page outside the pool, one that is free or given twice, or more than ``max_pages``.
        """
        held = self.pages[sequence]
        self._check_inside(pages)
        for page in pages:
            if self.allocator.references(page) == 0:
                raise ValueError(f"pages must be allocated before they are given, got page {page}, which is free")
        if len({*held, *pages}) < len(held) + len(pages):
            raise ValueError(f"pages must not be given twice, got {list(pages)} after {held}")
        if len(held) + len(pages) > self.max_pages:
            raise ValueError(f"a sequence has at most {self.max_pages} pages, got {len(held)} + {len(pages)}")
        held += pages
        self._upload()

    def keep(self, lengths: Sequence[int]) -> None:
        """Give back the pages that hold none of the first ``lengths[b]`` tokens."""
        counts = [-(-length // self.page_size) for length in lengths]
        if self.fixed or all(len(pages) <= count for pages, count in zip(self.pages, counts)):
            return
        self.allocator.free(page for pages, count in zip(self.pages, counts) for page in pages[count:])
        self.pages = [pages[:count] for pages, count in zip(self.pages, counts)]
        self._upload()

    def replace(self, lengths: Sequence[int]) -> None:
        """Give back all pages, and every sequence new ones for ``lengths[b]`` tokens.

        Raises:
            ValueError: too few pages would be free; nothing is changed then.
        """
        if self.fixed:
            return
        needed = sum(-(-length // self.page_size) for length in lengths)
        held = Counter(page for pages in self.pages for page in pages)
        free = self.allocator.num_free + sum(self.allocator.references(page) == times for page, times in held.items())
        if needed > free:
            raise ValueError(f"the sequences need {needed} pages, and {free} of {self.allocator.num_pages} would be free")
        self.keep([0] * len(lengths))
        self.reserve([0] * len(lengths), lengths)

    def become(self, order: Sequence[int], lengths: Sequence[int]) -> None:
        """Sequence ``b`` points to the pages that hold the ``lengths[order[b]]`` tokens of what sequence ``order[b]`` was."""
        before = self.pages
        self.pages = [before[i][: -(-lengths[i] // self.page_size)] for i in order]
        self.allocator.share(page for pages in self.pages for page in pages)
        self.allocator.free(page for pages in before for page in pages)
        self._upload()

    def _written_and_shared(self, lengths: Sequence[int], ends: Sequence[int]) -> Iterable[tuple[int, int]]:
        """Sequence and place of the pages that will be written while another sequence points to them."""
        left: Counter[int] = Counter()
        for b, pages in enumerate(self.pages):
            for i in range(lengths[b] // self.page_size, min(len(pages), -(-ends[b] // self.page_size))):
                if self.allocator.references(pages[i]) - left[pages[i]] > 1:
                    left[pages[i]] += 1  # the last who points there keeps the page
                    yield b, i

    def _check_inside(self, pages: Sequence[int]) -> None:
        outside = [page for page in pages if not 0 <= page < self.allocator.num_pages]
        if outside:
            raise ValueError(f"the block table must point to pages 0 to {self.allocator.num_pages - 1}, got {outside[0]}")

    def _upload(self) -> None:
        rows = [pages + [-1] * (self.max_pages - len(pages)) for pages in self.pages]
        # From memory that is not pinned the copy is staged before the call returns: nobody waits for the device.
        self.device.copy_(torch.tensor(rows, dtype=torch.int32), non_blocking=True)
