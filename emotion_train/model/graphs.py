"""The passes of a small model as one CUDA graph a shape: a 135M model's kernels take 13 ms a step,
starting them one by one 145.

The fused decoder is recorded, and so are encoders where the varlen kernel computes their attention.
The graph of a shape (tokens of the pack, posts rounded up, for an encoder also the longest post
rounded up) is recorded when that shape comes for the second time. What it costs: all graphs share
one set of gradients, which stays between two steps, and one pool of activations, which grows with a
larger shape. So a shape is recorded only where the largest pack still finds room outside of the
pool; with as little memory as that the packs are so large that starting kernels costs nothing. A
graph serves one process, not DDP's hooks. Where a recording fails, as by a version of transformers
that asks the GPU for a number, training continues without.

Letters: T tokens, N posts, C classes, S segments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from emotion_train.data.packing import Pack
from emotion_train.data.targets import TargetKind
from emotion_train.model.attention import Segments, on_device, sight
from emotion_train.model.dropout import Counters
from emotion_train.model.fused import FusedInputs
from emotion_train.model.head import EmotionClassifier
from emotion_train.model.loss import weighted_loss_sum
from emotion_train.sizing.memory import RECORDED_BELOW, usable_bytes

_POSTS_BUCKET = 64
_LONGEST_BUCKET = 128  # tokens that a block of the varlen kernel computes
_MOST_GRAPHS = 32


class _Shape(NamedTuple):
    """What the packs of one graph have in common: their tokens; the most posts, and the most tokens
    of a segment, that one may have. The fused decoder needs no bound on these, which is then 0.
    """

    tokens: int
    posts: int
    longest: int


class _Given(NamedTuple):
    """What a graph reads of a pack: tensors of the device, whose sizes its shape says.

    `reach`, int32, is what keeps posts apart: for the fused decoder `sight`, of shape 2T; for an
    encoder the boundaries of the segments, of which empty ones fill up the posts.
    """

    input_ids_T: torch.Tensor
    position_ids_T: torch.Tensor
    reach: torch.Tensor
    last_tokens_N: torch.Tensor
    key: torch.Tensor
    places_T2: torch.Tensor
    targets_NC: torch.Tensor
    weights_NC: torch.Tensor


@dataclass(frozen=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    given: _Given
    scale: torch.Tensor
    loss: torch.Tensor


def pays(model: EmotionClassifier, world_size: int) -> bool:
    """Whether starting the kernels is what a step of this model waits for, and a graph can help."""
    return (
        world_size == 1
        and _can_record(model)
        and sum(parameter.numel() for parameter in model.parameters()) < RECORDED_BELOW
    )


def _can_record(model: EmotionClassifier) -> bool:
    """Whether nothing in a pass asks the GPU for a number, which no recording allows.

    Rotary positions that change with a pack's longest post (rope_type dynamic, longrope) do, and
    so does PyTorch's checkpointing, for the state of random numbers that we do not draw.
    """
    if model.decoder is not None:
        able = not model.decoder.is_gathered
    else:
        recomputed = any(getattr(layer, "gradient_checkpointing", False) for layer in model.layers)
        able = model.is_encoder and model.is_fused and not recomputed
    rotary = getattr(model.classifier.base_model, "rotary_emb", None)
    ropes = getattr(rotary, "rope_type", "default")  # a word, or one for each kind of layer
    return able and not {"dynamic", "longrope"} & set(ropes.values() if isinstance(ropes, dict) else [ropes])


class GraphedPasses:
    """Adds the gradients of one pack's loss to those of `parameters`, as `(scale *
    loss).backward()` would.

    `passing_bytes`: what both passes over so many tokens take beside weights and optimizer.
    `most_tokens`: that a pack may have. `targets`: what its posts are labelled with. `masked` as in
    `weighted_loss_sum`. `say` is told, once, of a recording that fails.
    """

    def __init__(
        self,
        model: EmotionClassifier,
        parameters: Sequence[torch.nn.Parameter],
        passing_bytes: Callable[[int], int],
        most_tokens: int,
        targets: TargetKind,
        masked: bool = False,
        say: Callable[[str], None] = lambda words: None,
    ) -> None:
        self._model = model
        self._say = say
        self._fails = False
        self._targets: TargetKind = targets
        self._masked = masked
        self._parameters = list(parameters)
        self._passing_bytes = passing_bytes
        self._most_tokens = most_tokens
        self._largest = 0  # tokens of a pack, so far
        self._recorded: dict[_Shape, _Recorded | None] = {}  # None: there was no room for it
        self._seen: set[_Shape] = set()
        self._pool: Any = None
        self._sums: list[torch.Tensor] = []  # the gradients of a step, to which all graphs add

    def __call__(self, pack: Pack, scale: float, dropout_key: int) -> torch.Tensor | None:
        """The loss sum of the pack; None when this shape has no graph yet and the caller must run
        the passes itself.
        """
        if self._sums:  # to the caller's passes, too, which then need no gradients of their own
            self._lend_sums()
        shape = self._shape(pack)
        self._largest = max(self._largest, shape.tokens)
        if shape not in self._recorded:
            if shape not in self._seen or len(self._recorded) >= _MOST_GRAPHS or self._fails:
                self._seen.add(shape)
                return None
            has_room = self._has_room(shape.tokens)
            self._recorded[shape] = self._record_if_able(pack, shape, dropout_key) if has_room else None
        found = self._recorded[shape]
        if found is None:
            return None
        for place, value in zip(found.given, self._given(pack, shape, dropout_key), strict=True):
            place.copy_(value)
        found.scale.fill_(scale)
        found.graph.replay()
        return found.loss

    def _shape(self, pack: Pack) -> _Shape:
        """Rounded up, so that packs have few shapes: a filled-up pack has posts that weigh 0, and
        the varlen kernel's blocks beyond a post's end do nothing.
        """
        posts = -(-len(pack.last_tokens_N) // _POSTS_BUCKET) * _POSTS_BUCKET
        longest = max(_LONGEST_BUCKET, int(np.diff(pack.boundaries_S).max()))
        power = 1 << (longest - 1).bit_length()
        return _Shape(len(pack.tokens_T), posts, 0 if self._model.decoder is not None else power)

    def _has_room(self, tokens: int) -> bool:
        """Whether a recording of so many tokens leaves room for the passes of a pack twice as large
        as any before.

        Beside them for its own gradients, for the sums to which it adds them and, since it may be
        recorded in the very first step, for AdamW's two moments; at r=1024, and for an encoder that
        is trained whole, these are more than the weights.
        """
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self._model.device)
        trained = sum(parameter.nbytes for parameter in self._parameters)
        largest = min(self._most_tokens, 2 * self._largest)
        return usable_bytes(free) >= 4 * trained + self._passing_bytes(tokens) + self._passing_bytes(largest)

    def _given(self, pack: Pack, shape: _Shape, dropout_key: int) -> _Given:
        """The pack on the device with its targets and weights; posts that fill it up weigh 0."""
        decoder, device = self._model.decoder, self._model.device
        filling = shape.posts - len(pack.last_tokens_N)
        if decoder is not None:
            reach = sight(np.diff(pack.boundaries_S), decoder.window)
        else:  # one segment more than posts, for filling tokens
            missing = shape.posts + 2 - len(pack.boundaries_S)
            reach = np.pad(pack.boundaries_S, (0, missing), "edge").astype(np.int32)
        last_N = on_device(np.pad(pack.last_tokens_N, (0, filling)), device)
        targets_NC, weights_NC = (
            on_device(np.pad(x_NC, ((0, filling), (0, 0))), device)
            for x_NC in (pack.targets_NC, pack.weights_NC)
        )
        arrays = pack.tokens_T, pack.positions_T, reach
        tokens_T, positions_T, seen = (on_device(x, device) for x in arrays)
        counters = Counters.of(pack, dropout_key, device)
        return _Given(
            tokens_T, positions_T, seen, last_N, counters.key, counters.places, targets_NC, weights_NC
        )

    def _logits(self, given: _Given, shape: _Shape) -> torch.Tensor:
        """Logits of shape NC of the pack's posts and of those that fill it up."""
        counters = Counters(given.key, given.places_T2)
        tokens_T, positions_T, last_N = given.input_ids_T, given.position_ids_T, given.last_tokens_N
        if self._model.decoder is not None:
            sees_from_T, seen_until_T = given.reach
            return self._model.forward_fused(
                FusedInputs(tokens_T, positions_T, sees_from_T, seen_until_T, last_N, counters)
            )
        segments = Segments.recorded(given.reach, shape.longest)
        logits_NC: torch.Tensor = self._model(tokens_T[None], positions_T[None], segments, last_N, counters)
        return logits_NC

    def _gradients(
        self, given: _Given, shape: _Shape, scale: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The loss sum, and the gradients of `scale` times it: the passes that are recorded."""
        loss = weighted_loss_sum(
            self._logits(given, shape), given.targets_NC, given.weights_NC, self._targets, self._masked
        )
        return loss.detach(), list(torch.autograd.grad(loss * scale, self._parameters))

    def _record_if_able(self, pack: Pack, shape: _Shape, dropout_key: int) -> _Recorded | None:
        """None, and no further recording, where it fails; nothing was added to gradients then."""
        device = self._model.device
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        try:
            return self._record(pack, shape, dropout_key)
        except RuntimeError as error:
            if stream is not None:
                torch.cuda.set_stream(stream)  # a recording that cannot end leaves its own
            self._fails = True
            self._say(
                "passes are not recorded as CUDA graphs, which makes small models slower:"
                f" {str(error).partition(chr(10))[0]}"
            )
            return None

    def _record(self, pack: Pack, shape: _Shape, dropout_key: int) -> _Recorded:
        device = self._model.device
        given, scale = self._given(pack, shape, dropout_key), torch.ones((), device=device)
        self._lend_sums()
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(device))
        # libraries allocate their workspaces on first use, which a recording forbids
        with torch.cuda.stream(side):
            self._gradients(given, shape, scale)
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            loss, gradients = self._gradients(given, shape, scale)
            torch._foreach_add_(self._sums, gradients)
        self._pool = self._pool or graph.pool()
        return _Recorded(graph, given, scale, loss)

    def _lend_sums(self) -> None:
        """Let the sums be the parameters' gradients, with what these hold so far."""
        held = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        self._sums = self._sums or [torch.empty_like(parameter) for parameter in self._parameters]
        if not held:
            torch._foreach_zero_(self._sums)
        elif held[0] is not self._sums[0]:
            torch._foreach_copy_(self._sums, held)
        for parameter, total in zip(self._parameters, self._sums, strict=True):
            parameter.grad = total
