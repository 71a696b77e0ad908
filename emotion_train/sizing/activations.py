"""Bytes of a block in training: the bytes kept from its forward to its backward pass, and the bytes
that live only while it computes.

Counted tensor by tensor, from transformers' modules under autograd (stock) and from
`model/fused.py` read line by line; tests compare both with the bytes that are really kept and
allocated. The price: a change there that keeps another tensor has to be repeated here.

Letters: H hidden size, I intermediate size, Q width of the queries (heads x head size), K width of
the keys, r rank of the adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from emotion_train.bases.qwen3_5 import with_counterparts
from emotion_train.sizing.recipe import Recipe
from emotion_train.sizing.shape import STACKS, Precision, Shape

_TOKENS_PER_POST = 16  # of short posts; the bytes kept for each post are a twentieth of a block
CHUNK = 32  # tokens of a post that a delta net computes at once
_SCALE = 4  # a row in float8 has one float32 scale


@dataclass(frozen=True)
class Activations:
    """Bytes of one pack: `kept` when its forward pass ends, and `passing` beside that at the
    highest point of both passes.
    """

    kept: int
    passing: int


# --- the fused decoder ---


@dataclass(frozen=True)
class FusedBlocks:
    """All blocks of the fused decoder. `element`: bytes of an activation, 2 except in tests on a
    CPU, which compute in float32.
    """

    recipe: Recipe
    element: int = 2

    @property
    def shape(self) -> Shape:
        return self.recipe.shape

    @property
    def precision(self) -> Precision:
        return self.recipe.precision

    def kept_by_layer(self) -> dict[str, int]:
        """Bytes per token that a block keeps, by kind; 172 kB for Mistral Small 3.1 in bfloat16."""
        return {**self._before_pooling(), **self._after_pooling()}

    def kept_by_last_layer(self) -> tuple[int, int]:
        """Bytes that the last block keeps, (per token, per post): after its attention it computes
        only the posts' last tokens.
        """
        return sum(self._before_pooling().values()), sum(self._after_pooling().values())

    def _before_pooling(self) -> dict[str, int]:
        hidden, query, _, width = self._sizes()
        return {
            "input": hidden,
            "first norm": 4,
            "queries, keys, values": width,
            "attention": query + 4 * self.shape.num_attention_heads,
            "ranks of their adapters": self._ranks("q_proj", "k_proj", "v_proj"),
        }

    def _after_pooling(self) -> dict[str, int]:
        hidden, _, inner, _ = self._sizes()
        ranks = self._ranks("o_proj", "gate_proj", "up_proj", "down_proj")
        return {
            "after attention": hidden,
            "second norm": 4,
            "gate and up": 2 * inner,
            "ranks of the other adapters": ranks,
        }

    def _sizes(self) -> tuple[int, int, int, int]:
        """Bytes of a hidden state, of the queries, of the MLP's inner width, and of queries, keys
        and values together.
        """
        shape, element = self.shape, self.element
        width = shape.query_width + 2 * shape.key_width
        return (
            element * shape.hidden_size,
            element * shape.query_width,
            element * shape.intermediate_size,
            element * width,
        )

    def of_pack(self, tokens: int, recompute: bool) -> Activations:
        """Bytes of a whole pack. `recompute`: blocks keep only their input, and recompute the
        rest.
        """
        posts = -(-tokens // _TOKENS_PER_POST)
        hidden = self._sizes()[0]
        block, (last, last_of_post) = sum(self.kept_by_layer().values()), self.kept_by_last_layer()
        others = self.shape.num_hidden_layers - 1
        # ids and positions, the first and last token that each token sees, dropout's two counters,
        # cosines and sines in float32; of a post, the float32 head and its norm
        inputs = (
            tokens * (2 * 8 + 2 * 4 + 2 * 4 + 2 * 4 * self.shape.head_dim)
            + posts * 2 * 4 * self.shape.hidden_size
        )
        below = tokens * others * (hidden if recompute else block)  # all blocks but the last
        kept = inputs + below + (tokens * hidden if recompute else tokens * last + posts * last_of_post)
        again = hidden if recompute else 0  # the recomputed block's output, which its backward pass holds
        highest = (
            inputs
            + below
            + tokens * (last + max(2 * hidden, self._backward_from_attention()))
            + posts * self._last_of_post()
        )
        if others:
            # the block at work holds these beside the bytes it keeps
            here = tokens * (block - (hidden if recompute else block))
            highest = max(
                highest, inputs + below + here + tokens * max(self._forward(), again + self._backward())
            )
        return Activations(kept, max(0, highest - kept))

    def _last_of_post(self) -> int:
        """Bytes per pooled post while the last block's backward pass is in its attention."""
        hidden, query, inner, _ = self._sizes()
        return self.kept_by_last_layer()[1] + 4 * hidden + inner + 2 * query

    def _forward(self) -> int:
        """Bytes per token, beside those that the block keeps, when its last product is made: five
        hidden states (the MLP's output before it, both norms, the attention's output, its own), and
        the MLP's inner product, in float8 where nothing else reads it.
        """
        hidden, _, inner, _ = self._sizes()
        if not self._adapted("down_proj"):
            return 5 * hidden + (
                self._codes(self.shape.intermediate_size) if self.precision == "fp8" else inner
            )
        return (
            5 * hidden
            + inner
            + max(inner if self.recipe.lora_dropout else 0, self._codes(self.shape.intermediate_size))
        )

    def _backward(self) -> int:
        """Bytes per token, beside those that the block keeps, at the highest point of its backward
        pass.

        With dropout, an adapter holds a dropped copy beside its input; where the input is a norm,
        there is one copy with and without dropout.
        """
        hidden, query, inner, _ = self._sizes()
        dropped = 1 if self.recipe.lora_dropout else 0
        # the gradients of the block's output and of the MLP's inner product, held to the end
        held = hidden + inner
        points = [held + self._codes(self.shape.hidden_size)]
        if self._adapted("down_proj"):
            points.append(held + inner + dropped * inner)
        held += hidden  # the gradient of the second norm
        points.append(held + self._codes(2 * self.shape.intermediate_size))
        held += hidden  # the gradient past the norm, or before that the adapters' copy of it
        points.append(held + query + (dropped * query if self._adapted("o_proj") else 0))
        points.append(held + self._backward_from_attention() - hidden)
        return max(points)

    def _backward_from_attention(self) -> int:
        """Bytes per token of the gradients of the attention's output and input, of queries, keys
        and values, and of the block's input, beside the adapters' copy of the first norm or the
        gradient that the norm makes.
        """
        hidden, query, _, width = self._sizes()
        held = hidden + query + width
        codes = self._codes(self.shape.query_width + 2 * self.shape.key_width)
        return held + max(4 * self.shape.num_attention_heads, hidden + codes, 2 * hidden)

    def _codes(self, size: int) -> int:
        """Bytes of a row in float8, where the products take float8."""
        return size + _SCALE if self.precision == "fp8" else 0

    def _adapted(self, *names: str) -> bool:
        return self._ranks(*names) > 0

    def _ranks(self, *names: str) -> int:
        """Bytes per token of s A x of these layers' adapters."""
        return self.element * self.recipe.lora_r * len(set(names) & set(self.recipe.adapted_layers))


def fused_overhead(recipe: Recipe, element: int = 2) -> int:
    """Bytes that stay on the GPU beside weights, adapter and optimizer: the adapters in bfloat16 (a
    product's A stacked, its B as blocks of one matrix), and the workspace into which 4-bit weights
    are unpacked.
    """
    shape, copies = recipe.shape, 0
    for stack, (outputs, inputs) in zip(STACKS, shape.stacked_layers, strict=True):
        rank = recipe.lora_r * len(set(stack) & set(recipe.adapted_layers))
        copies += rank * (inputs + outputs)
    unpacked = 2 * shape.largest_stack if recipe.precision == "nf4" else 0
    return element * shape.num_hidden_layers * copies + unpacked


# --- transformers' modules ---


def stock_kept_by_layer(recipe: Recipe) -> dict[str, int]:
    """Bytes per token that autograd keeps of one of transformers' blocks, by kind.

    Frozen weights keep no input: only adapters do. Dropout keeps no mask.
    """
    shape, names, element = recipe.shape, recipe.adapted_layers, _stock_element(recipe)
    if shape.is_encoder:
        return _encoder_kept_by_layer(recipe, element)
    hidden, inner, query = shape.hidden_size, shape.intermediate_size, shape.query_width
    key = query if recipe.repeated_keys else shape.key_width
    gate = 0
    if shape.delta_nets is not None:  # attention's output is multiplied by a gate before o_proj
        gate = 1 if "o_proj" not in names or recipe.lora_dropout else 2
        gate += 1 if element > 2 else 0  # in float32 the queries' norm keeps what made both
    heads = (
        (query + shape.key_width, shape.num_attention_heads + shape.num_key_value_heads)
        if shape.qk_norm
        else (0, 0)
    )
    return {
        "norms": shape.block_norms * (4 * hidden + 4) + 4 * sum(heads),
        "adapter inputs": _adapter_inputs(shape, names, element, recipe.lora_dropout > 0),
        "adapter ranks": element * recipe.lora_r * len(names),
        "attention": element * ((2 + gate) * query + 2 * key) + 4 * shape.num_attention_heads,
        "mlp": 3 * element * inner,  # gate, up and the SiLU of gate
    }


def delta_kept_by_layer(recipe: Recipe) -> dict[str, int]:
    """Bytes per token that autograd keeps of a gated delta net's block, by kind. The steps between
    its products are recomputed in the backward pass.
    """
    shape, element = recipe.shape, _stock_element(recipe)
    nets = shape.delta_nets
    assert nets is not None
    names = tuple(name for name in with_counterparts(recipe.adapted_layers) if name in shape.delta_layers)
    return {
        "norms": 2 * (4 * shape.hidden_size + 4),
        "adapter inputs": _adapter_inputs(shape, names, element, recipe.lora_dropout > 0),
        "adapter ranks": element * recipe.lora_r * len(names),
        # the convolution's input and output, and z; decay and strength in float32
        "delta net": element * (2 * nets.channels + nets.values_width) + 3 * 4 * nets.value_heads,
        "mlp": 3 * element * shape.intermediate_size,
    }


def _encoder_kept_by_layer(recipe: Recipe, element: int) -> dict[str, int]:
    """Bytes per token that autograd keeps of an encoder's block, whose dropout keeps no mask.

    Norms give float32, which each product under autocast converts to bfloat16 for itself: BERT's
    queries, keys and values have an input each. ModernBERT's are one product; the values keep it
    whole beside the rotated queries and keys, and the MLP's gate does so too.
    """
    shape = recipe.shape
    hidden, inner, is_bert = shape.hidden_size, shape.intermediate_size, shape.positions > 0
    first, after_norm, last, modules = _products_that_keep_inputs(recipe)
    if element > 2 and not recipe.lora_dropout:
        first = min(1, first)
    own = 1 if recipe.lora_dropout and "o_proj" in recipe.adapted_layers else 0
    return {
        "norms": 2 * (4 * hidden + 8),
        "inputs of products": element * (hidden * (first + own + after_norm) + inner * last),
        "adapter ranks": element * recipe.lora_r * modules,
        "attention": element * (4 if is_bert else 6) * hidden + 4 * shape.num_attention_heads,
        "mlp": element * (1 if is_bert else 3) * inner,
    }


def _products_that_keep_inputs(recipe: Recipe) -> tuple[int, int, int, int]:
    """How many products keep their input: among the block's first ones, the MLP's first and its
    last; and how many have an adapter.
    """
    is_bert = recipe.shape.positions > 0
    if recipe.lora is None:
        return 3 if is_bert else 1, 1, 1, 0
    adapted = set(recipe.adapted_layers)
    counts = [len(adapted & set(stack)) for stack in STACKS]
    if not is_bert:  # a stack is one product
        counts = [min(1, count) for count in counts]
    return counts[0], counts[2], counts[3], sum(counts)


def _adapter_inputs(shape: Shape, names: Sequence[str], element: int, drops: bool) -> int:
    """Bytes per token that adapters keep of their inputs. With dropout each adapter has an input of
    its own. Without it q, k and v share one, gate and up another, and o reads the attention's
    output, which is kept in any case.
    """
    layers = shape.linear_layers | shape.delta_layers
    if drops:
        return sum(element * layers[name][1] for name in names)
    groups = [(*stack, *with_counterparts(stack)) for stack in STACKS if stack != ("o_proj",)]
    groups.append(("out_proj",))  # made once more, and kept for its adapter alone
    return sum(element * layers[group[0]][1] for group in groups if set(group) & set(names))


def _stock_element(recipe: Recipe) -> int:
    """Bytes of an activation: bfloat16 under autocast, except with a float32 base."""
    return 4 if recipe.precision == "fp32" else 2


def stock_of_pack(recipe: Recipe, tokens: int, recompute: bool) -> Activations:
    """Bytes of a whole pack by transformers' modules, with the largest matrix unpacked from nf4 to
    bfloat16.
    """
    shape, element = recipe.shape, _stock_element(recipe)
    all_layers = _kept_by_all_layers(recipe)
    norm, rotary = 4 * shape.hidden_size + 4, 2 * element * shape.head_dim
    if recompute:
        kept = shape.num_hidden_layers * element * shape.hidden_size + norm + rotary + max(all_layers)
    else:
        # the first block keeps no norm of its input, which makes up for the last norm
        kept = sum(all_layers) + rotary
    down = 0 if "down_proj" not in recipe.adapted_layers else element * shape.intermediate_size
    backward = tokens * _stock_backward(shape, element, norm + down)
    largest = (
        2 * max(outputs * inputs for _, layers in shape.blocks for outputs, inputs in layers.values())
        if recipe.precision == "nf4"
        else 0
    )
    forward = largest + tokens * element * shape.intermediate_size
    return Activations(tokens * kept, max(backward, forward, tokens * _delta_backward(shape)))


def _kept_by_all_layers(recipe: Recipe) -> list[int]:
    """Bytes per token that autograd keeps of each block, attending blocks first."""
    nets = 0 if recipe.shape.delta_nets is None else recipe.shape.delta_nets.blocks
    attending = [sum(stock_kept_by_layer(recipe).values())] * (recipe.shape.num_hidden_layers - nets)
    return attending + ([sum(delta_kept_by_layer(recipe).values())] * nets if nets else [])


def _delta_backward(shape: Shape) -> int:
    """Bytes per token while a delta net recomputes the steps between its products and takes their
    backward pass, as if it were the last block. Measured on a CPU, and an upper bound for posts of
    17 tokens and more: everything is float32, a post's last chunk is padded, and long posts have a
    state for each chunk.
    """
    if (nets := shape.delta_nets) is None or not nets.blocks:
        return 0
    state = nets.values_width * nets.key_size // CHUNK
    return 4 * (5 * nets.channels + 6 * nets.values_width + 5 * CHUNK * nets.value_heads + 3 * state // 2)


def _stock_backward(shape: Shape, element: int, let_go: int) -> int:
    """Bytes per token of the last block's backward pass on top of all kept bytes: the gradients of
    the MLP's three inner tensors, less the bytes `let_go` by then (the last norm's input and the
    input of the adapter on down_proj); or the first of these gradients alone.
    """
    return max(
        3 * element * shape.intermediate_size - let_go,
        element * (shape.intermediate_size + 2 * shape.hidden_size),
    )
