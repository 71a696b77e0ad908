"""Numbers as a person reads them; the terminal and the page use the same words."""

from __future__ import annotations

import math


def signed(value: float) -> str:
    """Three digits with sign, and never -0.000."""
    return f"{round(value, 3) + 0.0:+.3f}".replace("-", "−")


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return (
        f"{seconds / 60:.1f} min"
        if seconds < 600
        else f"{minutes} min"
        if minutes < 60
        else f"{minutes // 60} h {minutes % 60:02d} min"
    )


def memory(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def dollars(usd: float) -> str:
    return f"${usd:,.2f}" if usd >= 0.1 or usd == 0 else f"${usd:.4f}"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def rate(per_second: float) -> str:
    return f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.1f}"


def round_up(number: float) -> int:
    """The number rounded up to two significant digits.

    >>> round_up(1234.5), round_up(17)
    (1300, 17)
    """
    step = int(10 ** max(0, math.floor(math.log10(max(1.0, number))) - 1))
    return math.ceil(number / step) * step


def posts_of(count: float) -> str:
    """A number of posts, or a sum of shares in them, which has a digit after the point.

    >>> posts_of(1234), posts_of(1234.56)
    ('1,234', '1,234.6')
    """
    return f"{count:,}" if isinstance(count, int) else f"{count:,.1f}"


def short_count(count: int) -> str:
    """At most four characters: 0, 17, 999, 1.2k, 34k, 5.6M."""
    for size, letter in ((10**6, "M"), (10**3, "k")):
        if count >= size:
            scaled = count / size
            return f"{scaled:.0f}{letter}" if scaled >= 9.95 else f"{scaled:.1f}{letter}"
    return str(count)


def saving(saves: int, stall_seconds: float, train_seconds: float, upload_seconds: float) -> str:
    """The number of saves of a run, and their cost."""
    if not saves:
        return "none"
    share = percent(stall_seconds / train_seconds if train_seconds else 0)
    return (
        f"{saves:,}, each a stall of {1000 * stall_seconds / saves:.1f} ms ({share} of the training),"
        f" {duration(upload_seconds)} upload"
    )


def training_words(
    loss: float | None, posts_per_second: float | None, macro_f1: float | None, note: str = ""
) -> str:
    """The known figures of a running training: `loss 1.234, 388 posts/s, last macro-F1 0.512`."""
    told = (
        f"loss {loss:.3f}" if loss is not None else "",
        f"{rate(posts_per_second)} posts/s" if posts_per_second is not None else "",
        f"last macro-F1 {macro_f1:.3f}" if macro_f1 is not None else "",
        note,
    )
    return ", ".join(word for word in told if word)
