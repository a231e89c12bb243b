"""PagePool: which pages of the cache are taken, by how many, and which full pages hold a text that may come again.

A full page is known by the digest of everything up to its end, so a chain of digests finds the longest cached prefix.
Pages that nobody holds keep their text until they are needed, the one let go longest ago first.
"""

import hashlib
import secrets
from array import array
from collections import OrderedDict
from collections.abc import Sequence


class PagePool:
    def __init__(self, count: int, size: int, caching: bool = True):
        self.count, self.size, self.caching = count, size, caching
        self._holders = [0] * count
        self._free: OrderedDict[int, None] = OrderedDict((page, None) for page in range(count))
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        self._salt = secrets.token_bytes(16)  # so that nobody can make two texts with one digest
        self.queries = self.hits = 0  # tokens asked for, tokens found

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self.count - len(self._free)

    def take(self, count: int) -> list[int] | None:
        """So many pages, or None when there are not that many."""
        if count > len(self._free):
            return None
        taken = [self._free.popitem(last=False)[0] for _ in range(count)]
        for page in taken:
            self._holders[page] = 1
            if (digest := self._digest_of.pop(page, None)) is not None:
                del self._page_of[digest]
        return taken

    def release(self, pages: Sequence[int]) -> None:
        """Let go, the end of a text first: prefixes are worth more than what follows them."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free[page] = None
                if page not in self._digest_of:  # nothing to keep: first to be taken
                    self._free.move_to_end(page, last=False)

    def digest(self, before: bytes, tokens: Sequence[int]) -> bytes:
        """Of a page, given that of the page before it (b"" for the first)."""
        return hashlib.blake2b(array("q", tokens).tobytes(), digest_size=16, key=self._salt + before).digest()

    def match(self, tokens: Sequence[int]) -> tuple[list[int], list[bytes]]:
        """The longest run of whole pages that the pool holds of a text's beginning. They are taken with the call."""
        found: list[int] = []
        digests: list[bytes] = []
        if not self.caching:
            return found, digests
        before = b""
        for start in range(0, len(tokens) - self.size + 1, self.size):
            before = self.digest(before, tokens[start : start + self.size])
            page = self._page_of.get(before)
            if page is None:
                break
            found.append(page)
            digests.append(before)
        for page in found:
            self._holders[page] += 1
            self._free.pop(page, None)
        self.queries += len(tokens)
        self.hits += len(found) * self.size
        return found, digests

    def commit(self, page: int, digest: bytes) -> None:
        """A page is full: whoever comes with the same text may have it."""
        if self.caching and digest not in self._page_of and page not in self._digest_of:
            self._page_of[digest] = page
            self._digest_of[page] = digest
