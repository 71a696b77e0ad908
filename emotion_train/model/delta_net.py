"""Qwen3.5's gated delta nets over a pack: state and convolution begin anew with each post.

transformers' module holds the weights under its names and computes rows; a pack in one row would
let a post read the state of the one before it, which only kernels that need not be installed can
prevent. Here its products run over the pack as everywhere, and the recurrence over chunks: each
post is laid out in chunks of `CHUNK` tokens, all chunks are computed at once but for the state that
comes into them, and then the second chunks of all posts take the states of the first, the third
those of the second. Posts of up to `CHUNK` tokens need no state at all.

The recurrence is float32, as in transformers. The price: a post's last chunk is padded, 16 tokens
on average, in the recurrence alone; and what is between the products is computed once more in the
backward pass instead of being kept.

The rule, and its form in chunks, are those of Yang, Kautz and Hatamizadeh 2024, "Gated Delta
Networks: Improving Mamba2 with Delta Rule", arXiv:2412.06464, section 3.3.

Letters: B rows, L tokens of a row, T tokens of the pack, M chunks, I and J tokens of a chunk, G key
heads, R value heads of each key head, K and V their sizes, N value heads, C channels of the
convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from emotion_train.bases.qwen3_5 import DELTA, QWEN3_5
from emotion_train.model.attention import on_device
from emotion_train.sizing.activations import CHUNK

_EPSILON = 1e-6  # of the length of queries and keys


@dataclass(frozen=True)
class Chunks:
    """Where the tokens of posts lie that follow each other. `apart_T`: their places in a row that
    has `gap` empty places before each post but the first; `slots_T`: their places in chunks.

    Chunks are in the order of rounds: of every post the first one, then of those posts that have
    one the second. Posts with more chunks are first, so that a round's states are the first ones of
    the round before it. `rounds` counts the chunks of each.
    """

    apart_T: torch.Tensor
    slots_T: torch.Tensor
    rounds: tuple[int, ...]
    width: int  # of the row with the gaps

    @classmethod
    def of(cls, lengths: Sequence[int], gap: int, device: torch.device) -> Chunks:
        """The chunks of posts of these lengths, one after the other."""
        lengths_S = np.asarray(lengths, np.int64)
        counts_S = -(-lengths_S // CHUNK)
        rank_S = np.empty_like(counts_S)
        rank_S[np.argsort(-counts_S, kind="stable")] = np.arange(len(counts_S))
        rounds = [int((counts_S > number).sum()) for number in range(int(counts_S.max()))]
        first_of_round = np.cumsum([0, *rounds[:-1]])
        starts_S = np.cumsum(lengths_S) - lengths_S
        post_T = np.repeat(np.arange(len(lengths_S)), lengths_S)
        within_T = np.arange(len(post_T)) - starts_S[post_T]
        chunk_T = first_of_round[within_T // CHUNK] + rank_S[post_T]
        return cls(
            on_device(np.arange(len(post_T)) + gap * post_T, device),
            on_device(chunk_T * CHUNK + within_T % CHUNK, device),
            tuple(rounds),
            len(post_T) + gap * (len(lengths_S) - 1),
        )

    def laid_out(self, numbers_TX: torch.Tensor) -> torch.Tensor:
        """Numbers of each token by chunk and place in it, of shape [M, I, …], 0 where none is."""
        places = sum(self.rounds) * CHUNK
        empty = numbers_TX.new_zeros((places, *numbers_TX.shape[1:]))
        filled = empty.index_put((self.slots_T,), numbers_TX)
        return filled.view(-1, CHUNK, *numbers_TX.shape[1:])


class GatedDeltaNet(nn.Module):
    """transformers' module with its layers under the same names, for posts of a pack and for
    right-padded rows alike. It keeps no cache.
    """

    in_proj_qkv: nn.Module
    in_proj_z: nn.Module
    in_proj_b: nn.Module
    in_proj_a: nn.Module
    conv1d: nn.Module
    norm: nn.Module
    out_proj: nn.Module
    A_log: nn.Parameter
    dt_bias: nn.Parameter

    def __init__(self, stock: Any) -> None:
        super().__init__()
        for name, module in stock.named_children():
            self.add_module(name, module)
        for name, parameter in stock.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        self.key_heads, self.value_heads = stock.num_k_heads, stock.num_v_heads
        self.key_size, self.value_size = stock.head_k_dim, stock.head_v_dim
        self.gap = stock.conv_kernel_size - 1
        from transformers.activations import ACT2FN

        self.activation = ACT2FN[stock.activation]

    def forward(
        self,
        hidden_states: torch.Tensor,
        cache_params: Any = None,
        attention_mask: torch.Tensor | None = None,
        chunks: Chunks | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """The block's output for hidden states of shape BLH; `chunks` are those of the posts in
        them, by default one a row, padded on the right.
        """
        assert cache_params is None, "a cache has nothing to give: posts are read whole"
        assert attention_mask is None, "posts are told by chunks, not by a mask"
        rows, length, _size = hidden_states.shape
        chunks = chunks or Chunks.of((length,) * rows, self.gap, hidden_states.device)
        channels_TC, z_TO, strength_TN, decay_TN = (
            layer(hidden_states).flatten(0, 1)
            for layer in (self.in_proj_qkv, self.in_proj_z, self.in_proj_b, self.in_proj_a)
        )
        with torch.autocast(hidden_states.device.type, enabled=False):
            decay_TN = -self.A_log.float().exp() * nn.functional.softplus(decay_TN.float() + self.dt_bias)
            strength_TN = strength_TN.float().sigmoid()
        mixed_TO = computed_again(
            lambda *given: self._between(chunks, *given),
            self._convolved(channels_TC, chunks),
            z_TO,
            strength_TN,
            decay_TN,
        )
        output: torch.Tensor = self.out_proj(mixed_TO.view(rows, length, -1))
        return output

    def _convolved(self, channels_TC: torch.Tensor, chunks: Chunks) -> torch.Tensor:
        """The causal convolution of each post, of shape TC."""
        apart_CT = channels_TC.new_zeros((chunks.width, channels_TC.shape[1]))
        apart_CT = apart_CT.index_put((chunks.apart_T,), channels_TC).t()
        made_CT: torch.Tensor = self.conv1d(apart_CT[None])[0]
        return made_CT.t().index_select(0, chunks.apart_T)

    def _between(
        self,
        chunks: Chunks,
        convolved_TC: torch.Tensor,
        z_TO: torch.Tensor,
        strength_TN: torch.Tensor,
        decay_TN: torch.Tensor,
    ) -> torch.Tensor:
        """What comes before the last product, of shape TO: everything from the convolution on."""
        heads = (self.key_heads, self.value_heads // self.key_heads)
        width = self.key_heads * self.key_size
        query_TO, key_TO, value_TO = self.activation(convolved_TC).split(
            [width, width, convolved_TC.shape[1] - 2 * width], dim=1
        )
        with torch.autocast(convolved_TC.device.type, enabled=False):
            made_TGRV = delta_rule(
                query_TO.float().reshape(-1, self.key_heads, self.key_size),
                key_TO.float().reshape(-1, self.key_heads, self.key_size),
                value_TO.float().reshape(-1, *heads, self.value_size),
                strength_TN.reshape(-1, *heads),
                decay_TN.reshape(-1, *heads),
                chunks,
            )
            of_heads = made_TGRV.reshape(-1, self.value_size).to(convolved_TC.dtype)
            normed: torch.Tensor = self.norm(of_heads, z_TO.reshape(-1, self.value_size))
        return normed.view(z_TO.shape)


def delta_rule(
    query_TGK: torch.Tensor,
    key_TGK: torch.Tensor,
    value_TGRV: torch.Tensor,
    strength_TGR: torch.Tensor,
    decay_TGR: torch.Tensor,
    chunks: Chunks,
) -> torch.Tensor:
    """The output for each token, of shape TGRV, with a state for each post that begins at zero.

    Before each token the state is multiplied by exp(decay), from which what it holds for the key is
    taken off by `strength` and the value put there by as much. Queries and keys are brought to
    length 1.
    """
    query_MGIK = _unit(chunks.laid_out(query_TGK)).movedim(1, 2) * query_TGK.shape[-1] ** -0.5
    key_MGIK = _unit(chunks.laid_out(key_TGK)).movedim(1, 2)
    value_MGRIV = chunks.laid_out(value_TGRV).movedim(1, 3)
    strength_MGRI = chunks.laid_out(strength_TGR).movedim(1, 3)
    decay_MGRI = chunks.laid_out(decay_TGR).movedim(1, 3).cumsum(-1)
    query, key, strength = query_MGIK[:, :, None], key_MGIK[:, :, None], strength_MGRI[..., None]
    since_MGRIJ = _decayed_since(decay_MGRI)
    # what each token writes, were the state that comes in zero: a token's value less what the
    # tokens before it have left for its key
    system_MGRIJ = strength * (key @ key.mT) * since_MGRIJ
    written_MGRIV = _solved(system_MGRIJ, strength * value_MGRIV)
    attention_MGRIJ = (query @ key.mT) * since_MGRIJ
    written = written_MGRIV[: chunks.rounds[0]]
    outputs = [attention_MGRIJ[: chunks.rounds[0]] @ written]
    state: torch.Tensor | float = 0.0
    start = 0
    for here, then in pairwise(chunks.rounds):
        ended, now = slice(start, start + then), slice(start + here, start + here + then)
        state = state[:then] if isinstance(state, torch.Tensor) else state
        left = (decay_MGRI[ended, ..., -1:] - decay_MGRI[ended]).exp()[..., None]
        kept = decay_MGRI[ended, ..., -1, None, None].exp() * state
        state = kept + (key[ended] * left).mT @ written[:then]  # of shape MGRKV
        grown = decay_MGRI[now].exp()[..., None]
        known = _solved(system_MGRIJ[now], strength[now] * key[now] * grown)
        written = written_MGRIV[now] - known @ state
        outputs.append((query[now] * grown) @ state + attention_MGRIJ[now] @ written)
        start += here
    made = torch.cat(outputs).movedim(3, 1)
    return made.flatten(0, 1).index_select(0, chunks.slots_T)


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    return vectors * torch.rsqrt((vectors * vectors).sum(-1, keepdim=True) + _EPSILON)


def _decayed_since(decay_MGRI: torch.Tensor) -> torch.Tensor:
    """What is left at each token of what an earlier one of its chunk wrote, or itself: of shape
    MGRIJ, 0 where J comes later.
    """
    later_IJ = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=decay_MGRI.device).triu(1)
    difference = decay_MGRI[..., :, None] - decay_MGRI[..., None, :]
    return difference.masked_fill(later_IJ, float("-inf")).exp()


def _solved(system_MGRIJ: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """X of (1 + what is below the diagonal of the system) X = right."""
    solved: torch.Tensor = torch.linalg.solve_triangular(system_MGRIJ, right, upper=False, unitriangular=True)
    return solved


class _ComputedAgain(torch.autograd.Function):
    """A function of tensors that keeps these alone for its backward pass."""

    @staticmethod
    def forward(ctx: Any, make: Callable[..., torch.Tensor], *given: torch.Tensor) -> torch.Tensor:
        ctx.make = make
        ctx.save_for_backward(*given)
        return make(*given)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        wanted = ctx.needs_input_grad[1:]
        given = [
            tensor.detach().requires_grad_(want)
            for tensor, want in zip(ctx.saved_tensors, wanted, strict=True)
        ]
        with torch.enable_grad():
            made = ctx.make(*given)
        found = iter(torch.autograd.grad(made, [one for one in given if one.requires_grad], gradient))
        return None, *(next(found) if want else None for want in wanted)


def computed_again(make: Callable[..., torch.Tensor], *given: torch.Tensor) -> torch.Tensor:
    """`make(*given)`; where gradients are taken its insides are not kept but made anew. All that
    is trained must be among `given`.
    """
    if not torch.is_grad_enabled():
        return make(*given)
    apply: Callable[..., torch.Tensor] = _ComputedAgain.apply
    return apply(make, *given)


def has_delta_nets(config: Any) -> bool:
    """Whether transformers' configuration is of a base with such blocks."""
    return config.model_type == QWEN3_5 and DELTA in config.layer_types


def read_posts_apart(classifier: Any) -> None:
    """Put our own delta nets in the place of transformers', around the same weights."""
    for block in classifier.model.layers:
        if hasattr(block, "linear_attn"):
            block.linear_attn = GatedDeltaNet(block.linear_attn)


def chunks_of(classifier: Any, lengths: Sequence[int], posts: int, device: torch.device) -> dict[str, Any]:
    """Keyword arguments with which the model's delta nets keep segments of these lengths apart, of
    which the first ones are posts; none where it has no such block.

    What only fills a pack is cut into single chunks, so that nothing waits for its later ones.
    """
    if not has_delta_nets(classifier.config):
        return {}
    pieces = [min(CHUNK, length - at) for length in lengths[posts:] for at in range(0, length, CHUNK)]
    gap = classifier.config.linear_conv_kernel_dim - 1
    return {"chunks": Chunks.of([*lengths[:posts], *pieces], gap, device)}
