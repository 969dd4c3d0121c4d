"""What may stand in a URL before a route, from trainers that can set nothing but the URL."""

import re
from collections.abc import MutableMapping
from typing import Any
from urllib.parse import quote


def prefix_pattern(name: str) -> re.Pattern[bytes]:
    """Of `/<name>/<value>/<route>`. Of several values in a row the last one counts, and none stays."""
    word = name.encode()
    return re.compile(rb"(?:/%s/([^/]*))+?(/(?!%s/[^/]*/).*)" % (word, word), re.DOTALL)


def take_prefix(scope: MutableMapping[str, Any], pattern: re.Pattern[bytes]) -> bytes | None:
    """The value in the path of an ASGI scope, out of which it is taken; None if there is none."""
    match = pattern.fullmatch(scope["path"].encode())
    if match is None:
        return None
    scope["path"] = match[2].decode()
    # Made anew: the value may have been sent with escapes.
    scope["raw_path"] = quote(scope["path"]).encode()
    return bytes(match[1])
