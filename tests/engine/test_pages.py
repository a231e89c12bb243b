"""The page pool and the scheduler under any sequence of calls: no page lost, none held twice, no text mixed up."""

import random

import pytest

from fewbit.engine.pages import PagePool


def test_takes_and_gives_back() -> None:
    pool = PagePool(4, 2)
    first = pool.take(3)
    assert first is not None and pool.used == 3 and pool.take(2) is None
    pool.release(first)
    assert pool.used == 0 and pool.free == 4


def test_the_longest_prefix_is_found() -> None:
    pool = PagePool(8, 2)
    tokens = [1, 2, 3, 4, 5]
    pages = pool.take(3)
    assert pages is not None
    a = pool.digest(b"", tokens[:2])
    b = pool.digest(a, tokens[2:4])
    pool.commit(pages[0], a)
    pool.commit(pages[1], b)
    pool.release(pages)
    found, digests = pool.match([1, 2, 3, 4, 9, 9])
    assert found == pages[:2] and digests == [a, b] and pool.used == 2
    assert pool.match([3, 4]) == ([], []), "a page is known by all that comes before it"
    assert pool.match([1, 2, 9, 9])[0] == pages[:1]


def test_a_page_taken_for_another_text_is_forgotten() -> None:
    pool = PagePool(1, 2)
    (page,) = pool.take(1) or []
    pool.commit(page, pool.digest(b"", [1, 2]))
    pool.release([page])
    pool.take(1)
    assert pool.match([1, 2]) == ([], [])


@pytest.mark.parametrize("seed", range(20))
def test_any_sequence_of_calls(seed: int) -> None:
    """Against a plain model of what each holder holds and what each page means."""
    draw = random.Random(seed)
    pool = PagePool(12, 2)
    held: list[tuple[list[int], list[int]]] = []  # (tokens, pages)
    meaning: dict[int, tuple[int, ...]] = {}
    for _ in range(300):
        if held and draw.random() < 0.45:
            _, pages = held.pop(draw.randrange(len(held)))
            pool.release(pages)
        else:
            tokens = [draw.randrange(2) for _ in range(draw.randrange(1, 9))]
            found, digests = pool.match(tokens)
            for i, page in enumerate(found):
                assert meaning[page] == tuple(tokens[: 2 * i + 2])
            taken = pool.take(-(-len(tokens) // 2) - len(found))
            if taken is None:
                pool.release(found)
                continue
            pages = found + taken
            for i in range(len(found), len(tokens) // 2):
                before = digests[-1] if digests else b""
                digests.append(pool.digest(before, tokens[2 * i : 2 * i + 2]))
                pool.commit(pages[i], digests[-1])
                meaning[pages[i]] = tuple(tokens[: 2 * i + 2])
            held.append((tokens, pages))
        counts: dict[int, int] = {}
        for _, pages in held:
            for page in pages:
                counts[page] = counts.get(page, 0) + 1
        assert pool.used == len(counts) and pool.free == 12 - len(counts)
        assert all(pool._holders[page] == counts.get(page, 0) for page in range(12))
