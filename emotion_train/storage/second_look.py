"""Whether bytes that do not verify are stored so, or were changed on their way: they are read
again, by another way, before anything is called damaged.

A bit that flips in a network, a proxy or a cache looks like damage in a single read. Only the same
wrong bytes twice count as the stored ones. It costs nothing where the first read verifies, one more
read where an object is damaged, and 8 s where every read gives other bytes.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from typing import TypeVar

from emotion_train.errors import EmotionTrainError, StorageError

# before each look after the first
PAUSES_S = (0.0, 0.1, 0.5, 1.0, 2.0, 4.0)

Read = TypeVar("Read", bound=bytes | memoryview)
T = TypeVar("T")


def second_look(read: Callable[[int], Read], verify: Callable[[Read], T], url: str) -> T:
    """What `verify` returns for the first bytes that it accepts.

    `read` gets the number of the look: 0 is the ordinary read, and each later look takes another
    way than the one before. `verify` refuses bytes with an error of the family or a `ValueError`,
    which is raised once the same bytes were refused twice. Raises a transient `StorageError` when
    each look gave other bytes, which says nothing about the stored bytes.
    """
    refused: set[bytes] = set()
    failure: StorageError | None = None
    for look, pause_s in enumerate((0.0, *PAUSES_S)):
        time.sleep(pause_s)
        try:
            data = read(look)
        except StorageError as error:
            if look == 0 or not error.transient:
                raise
            failure = error
            continue
        try:
            return verify(data)
        except (EmotionTrainError, ValueError):
            digest = hashlib.sha256(data).digest()
            if digest in refused:
                raise
            refused.add(digest)
    if failure is not None and len(refused) == 1:
        raise failure
    raise StorageError(
        f"{url} was read {len(refused)} times with other bytes each time: the network, or a proxy on the way,"
        " flips bits, and nothing is known about the stored bytes; try again, or read over https or from"
        " another machine.",
        transient=True,
    )
