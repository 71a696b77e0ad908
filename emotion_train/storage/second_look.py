"""Whether bytes that do not verify are stored like that or were changed on their way: they are read
again, by another way, before anything is called damaged.

A bit that flips in a network, a proxy or a cache looks like damage to whoever reads once. Only the
same wrong bytes twice are what is stored. It costs nothing where the first read verifies, one more
read where something is damaged, and 8 s where every read brings other bytes.
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
    """What `verify` returns for the first bytes that it does not refuse.

    `read` gets the number of the look: 0 is the ordinary read, each later one takes another way
    than the one before. `verify` refuses with an error of the family or a `ValueError`; it is
    raised once the same bytes were refused twice. Raises a transient `StorageError` when each look
    brought other bytes, which says nothing about what is stored.
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
        f"{url} was read {len(refused)} times and came with other bytes each time: the network, or a proxy on"
        " the way, flips bits, and nothing is known about what is stored; try again, or read over https or"
        " from another machine.",
        transient=True,
    )
