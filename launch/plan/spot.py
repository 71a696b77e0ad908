"""What a plan assumes of spot machines; this page imports nothing, since these are defaults of
options.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Spot:
    """What is assumed of spot machines; a rate of 0.1 is one preemption in ten hours."""

    preemptions_per_hour: float = 0.1
    startup_minutes: float = 10.0
    checkpoint_minutes: float = 1.0
