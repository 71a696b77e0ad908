"""Asks a server of an export or adapter for probabilities, by the protocol of vLLM's /classify.

Each request has 64 posts and asks the server to cut them at the training's length, which it does
only when asked. A server's key comes from the environment, never from a command line.

Letters: N posts, C labels.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from emotion_train.edges.bounded import Unreadable, object_in
from emotion_train.errors import EmotionTrainError, WrongRequest
from emotion_train.evaluation.decision import Decision

KEY = "EMOTION_TRAIN_ENDPOINT_KEY"
ANSWER_S = 120.0  # the first request to a server that has just started compiles its kernels
AT_A_TIME = 64
_MAX_BYTES = 64 << 20
_ROUNDING = 0.02  # of probabilities in bfloat16, and of the sum of a post's


class NoAnswer(EmotionTrainError):
    """The server did not answer, or answered with an error of its own."""


class Served:
    """Probabilities by the server at `url`, which serves a model by the name `model` (None: the
    first that it names), with the labels and answers of the adapter's `decision`.

    `called` are the server's own names for labels that it has ranked first, by their number; None
    where it has no name.
    """

    def __init__(self, url: str, model: str | None, decision: Decision, max_length: int) -> None:
        if not url.lower().startswith(("http://", "https://")):
            raise WrongRequest(
                f"--endpoint {url} is no address of a server; type http://HOST:PORT, for vLLM"
                " http://localhost:8000."
            )
        self.url = url.rstrip("/").removesuffix("/classify")
        self.decision = decision
        self.labels, self.targets, self.answers = decision.labels, decision.targets, decision.ranked
        self.called: dict[int, str | None] = {}
        self._max_length = max_length
        self._model = model or self._first_model()

    def probabilities(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """`prob_NC` of the texts, in their order. Raises `WrongRequest` for a server that refuses
        or has another model, and `NoAnswer`.
        """
        found = [self._of(texts[start : start + AT_A_TIME]) for start in range(0, len(texts), AT_A_TIME)]
        return np.concatenate([np.zeros((0, len(self.labels)), np.float32), *found])

    def remark(self) -> str | None:
        """A sentence on names that the server has for labels and the adapter has not, since such a
        server may have another model; None where all are the same. It does not say which posts it
        cut.
        """
        for number, name in self.called.items():
            if name not in (None, self.labels[number], f"LABEL_{number}"):
                return (
                    f"the server calls {name!r} what the adapter calls {self.labels[number]!r}, so it may"
                    " serve another model; name one by --model, and compare it by --against in place of"
                    " --adapter"
                )
        return None

    def _of(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        asked = {"model": self._model, "input": list(texts), "truncate_prompt_tokens": self._max_length}
        answer = self._ask("/classify", json.dumps(asked).encode())
        try:
            data = sorted(answer["data"], key=lambda one: int(one["index"]))
            prob_NC = np.array([one["probs"] for one in data], np.float32)
            names = [one.get("label") for one in data]
            numbers = [int(one["index"]) for one in data]
        except (LookupError, TypeError, ValueError, AttributeError):
            raise self._not_a_classifier() from None
        if numbers != list(range(len(texts))) or prob_NC.ndim != 2 or not np.isfinite(prob_NC).all():
            raise self._not_a_classifier()
        if prob_NC.shape[1] != len(self.labels):
            raise WrongRequest(
                f"{self.url} gives {prob_NC.shape[1]} probabilities a post and the adapter has"
                f" {len(self.labels)} labels; name the model that serves it, by --model."
            )
        self._require_probabilities(prob_NC)
        self.called |= dict(zip(prob_NC.argmax(axis=1).tolist(), names, strict=True))
        return prob_NC

    def _require_probabilities(self, prob_NC: npt.NDArray[np.float32]) -> None:
        """Raises `WrongRequest` for numbers below 0 or above 1, and for numbers of a post that have
        to add up to 1 and do not.
        """
        outside = prob_NC[(prob_NC < -_ROUNDING) | (prob_NC > 1 + _ROUNDING)]
        sum_N = prob_NC.sum(axis=1)
        off = [] if self.targets == "several" else sum_N[np.abs(sum_N - 1) > _ROUNDING].tolist()
        if not outside.size and not off:
            return
        what = f"{outside[0]:.3g} for a probability" if outside.size else f"{off[0]:.3g} for their sum"
        raise WrongRequest(
            f"{self.url} gives {what}, so it does not answer by the adapter's rule; serve the adapter's"
            " export, whose config.json has the right problem_type (docs/guides/serve.md)."
        )

    def _first_model(self) -> str:
        answer = self._ask("/v1/models", None)
        try:
            return str(answer["data"][0]["id"])
        except (LookupError, TypeError):
            raise self._not_a_classifier() from None

    def _not_a_classifier(self) -> WrongRequest:
        return WrongRequest(
            f"{self.url} does not answer as a classifier of vLLM does; start it with --runner pooling, for an"
            " adapter also --convert classify."
        )

    def _ask(self, path: str, body: bytes | None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url + path, body, headers)
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
                return object_in(answer.read(_MAX_BYTES + 1), _MAX_BYTES)
        except urllib.error.HTTPError as error:
            raise self._refused(path, error) from None
        except Unreadable as error:
            raise NoAnswer(f"{self.url}{path} answers with something other than JSON ({error}).") from None
        except (OSError, ValueError) as error:  # the latter: an impossible address
            why = getattr(error, "reason", None) or error
            raise NoAnswer(f"{self.url} does not answer ({why}); is the server started?") from None

    def _refused(self, path: str, error: urllib.error.HTTPError) -> EmotionTrainError:
        with error:
            said = " ".join(error.read(2000).decode("utf-8", "replace").split())[:300]
        if error.code >= 500 or error.code in (408, 429):
            return NoAnswer(f"{self.url}{path} answers with {error.code}: {said}")
        remedy = {
            401: f"set {KEY} to its key",
            403: f"set {KEY} to its key",
            404: "it serves no classifier by that address or --model",
        }.get(error.code, "see what it says")
        return WrongRequest(f"{self.url}{path} refuses with {error.code}: {said}; {remedy}.")
