"""Requests that were counted: a request that is sent again must not count as another sample.

Policies write the same text many times, above all when they collapse. Equal requests are therefore different
samples, unless they have the same id. An answer whose client has gone is not counted: it was never delivered,
and the client will ask again.
"""

import time
from collections import OrderedDict

KEEP_S = 600.0
"""Longer than any client repeats one request."""
MAX_COUNTED = 65_536
"""About 10 MB."""


class CountedRequests:
    """Ids of the requests that were counted recently. Used from the event loop only."""

    def __init__(self) -> None:
        self._until_s: OrderedDict[bytes, float] = OrderedDict()  # oldest first

    def add(self, request_id: bytes | None) -> bool:
        """Add a request; whether it is a new one. A request without an id always is."""
        if request_id is None:
            return True
        self._forget_old()
        if request_id in self._until_s:
            return False
        self._until_s[request_id] = time.monotonic() + KEEP_S
        if len(self._until_s) > MAX_COUNTED:
            self._until_s.popitem(last=False)
        return True

    def _forget_old(self) -> None:
        now_s = time.monotonic()
        while self._until_s and next(iter(self._until_s.values())) <= now_s:
            self._until_s.popitem(last=False)
