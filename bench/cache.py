"""The L2 of the model: one least-recently-used list over lines of any size, written back, allocated by writes.

Real caches have sets, sectors of 32 bytes, two halves and a hashed placement. A line here is one operand of one tile
(4 KiB for 1,024 elements in fp32), which a block reads or writes at once: smaller lines would come and go together.
"""

from collections import OrderedDict


class Cache:
    """Lines by key, the first to go in front.

    Attributes:
        capacity, held: bytes it has room for, and bytes of the lines in it.
        eager: whether a dirty line that is the first to go is written back at once, or when its room is needed.
    """

    def __init__(self, capacity, eager=False):
        self.capacity, self.held, self.eager = capacity, 0, eager
        self._lines = OrderedDict()
        self._dirty = set()

    def touch(self, key, size, writes, keep):
        """Reads or writes one line as a whole; a written one is not filled from memory first.

        Args:
            writes: whether the line is dirty from now on.
            keep: False marks it as the first to go: with the next line that needs room.

        Returns:
            Whether it was there, and the bytes that went back to memory for it.
        """
        hit = key in self._lines
        if not hit:
            self._lines[key] = size
            self.held += size
        if hit or not keep:
            self._lines.move_to_end(key, last=keep)
        if writes:
            self._dirty.add(key)
        written = 0
        if self.eager and not keep and key in self._dirty:
            self._dirty.remove(key)
            written = size
        return hit, written + (self._evict() if self.held > self.capacity else 0)

    def _evict(self):
        written = 0
        while self.held > self.capacity:
            key, size = self._lines.popitem(last=False)
            self.held -= size
            if key in self._dirty:
                self._dirty.remove(key)
                written += size
        return written

    def flush(self):
        """Bytes of all dirty lines, which are clean from now on."""
        written = sum(self._lines[key] for key in self._dirty)
        self._dirty.clear()
        return written
