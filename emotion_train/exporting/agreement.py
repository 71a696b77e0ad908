"""Compares a server's answers with the adapter's, and finds which posts differ: posts that are cut,
posts that quote control tokens, or all posts.

Letters: N posts, C labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from emotion_train.data.tokenization import PostTokenizer
from emotion_train.evaluation.decision import Decision


@dataclass(frozen=True)
class Agreement:
    """Largest absolute difference of a probability among the posts of each group, 0 for an empty
    group; each post is in one group.

    `answers` is the number of different answers; `misnamed` maps labels to the server's other names
    for them.
    """

    posts: int
    cut: float
    quoting: float
    others: float
    answers: int
    misnamed: Mapping[str, str | None]

    @classmethod
    def of(
        cls,
        texts: Sequence[str],
        ours_NC: npt.NDArray[np.float32],
        theirs_NC: npt.NDArray[np.float32],
        tokenizer: PostTokenizer,
        decision: Decision,
        called: Mapping[int, str | None],
    ) -> Agreement:
        lengths_N = np.array([len(ids) for ids in tokenizer.encode_whole(texts)])
        cut_N = lengths_N > tokenizer.max_length
        quoted = tokenizer.control_tokens
        quoting_N = np.array([any(one in text for one in quoted) for text in texts]) & ~cut_N
        off_N = np.abs(ours_NC - theirs_NC).max(axis=1)
        return cls(
            len(texts),
            float(off_N[cut_N].max(initial=0)),
            float(off_N[quoting_N].max(initial=0)),
            float(off_N[~cut_N & ~quoting_N].max(initial=0)),
            int((decision.answers(ours_NC) != decision.answers(theirs_NC)).any(axis=1).sum()),
            {
                decision.labels[number]: name
                for number, name in called.items()
                if name != decision.labels[number]
            },
        )

    @property
    def largest(self) -> float:
        return max(self.cut, self.quoting, self.others)

    def lines(self, tolerance: float) -> list[str]:
        """The lines to print: the differences, and their likely cause where they exceed
        `tolerance`.
        """
        lines = [
            f"{self.posts:,} posts: a probability differs by {self.largest:.2g} at most, {self.answers:,}"
            " answers differ"
        ]
        if self.others > tolerance:
            lines.append(
                f"posts that are neither cut nor quote a control token differ by {self.others:.2g}: the"
                " server has another model, tokenizer, pooling or head; give it --tokenizer ADAPTER where it"
                " serves the adapter"
            )
        elif self.quoting > tolerance:
            lines.append(
                f"posts that quote a control token differ by {self.quoting:.2g}: the server's tokenizer takes"
                " them for the token; it must read tokenizer_config.json (split_special_tokens)"
            )
        if self.cut > tolerance >= self.others:
            lines.append(
                f"posts that are cut differ by {self.cut:.2g}: the server cuts elsewhere or not at all; it"
                " must take truncate_prompt_tokens of a request, and cut on the right"
            )
        for label, name in self.misnamed.items():
            called = "has no name for" if name is None else f"calls {name!r} the label"
            lines.append(
                f"the server {called} {label!r}; read probs by the numbers of labels.json, or give the server"
                " a config.json with id2label"
            )
        return lines
