"""The decoder for GPUs: each block one autograd function with its backward pass written by hand,
between the same weights.

transformers' modules and PEFT's adapters stay what holds, saves and names the parameters; this page
only computes with them. What it gains over compiling them: attention as cheap as short posts are,
weights of layers with one input stacked into one product, adapters brought to bfloat16 once a
forward pass, only what the backward pass needs kept (172 kB a token and block of Mistral Small 3.1,
of which the MLP's products are 131), the last block's MLP on pooled tokens only, and no tracing:
the first step comes seconds after the weights. What it costs: biases, norms of queries and keys,
and head sizes other than powers of two go the stock way (`fits`).

Letters: T tokens, N posts, H hidden size, I inputs and O outputs of a product, R ranks of its
adapters, W = (Q + 2 K) D as in kernels.py; of `members`, K adapters that compute together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import torch
from torch import nn

from emotion_train.model.attention import has_bfloat16
from emotion_train.model.dropout import Counters, PostDropout, required
from emotion_train.model.gathered import GatheredBlocks
from emotion_train.sizing.shape import Shape

if TYPE_CHECKING:
    from emotion_train.model.kernels import Fp8

ADAPTER = "default"  # PEFT's name for the only adapter of a model

# an RMS norm's weight, and the reciprocal root mean squares of its rows
Norm = tuple[torch.Tensor, torch.Tensor]


class Product(Protocol):
    """x W^T with a frozen W, and its gradient by x; `in_fp8` when both may come as
    `kernels.Fp8`.
    """

    in_fp8: bool

    def forward(self, x_TI: torch.Tensor | Fp8) -> torch.Tensor: ...

    def backward(self, dy_TO: torch.Tensor | Fp8) -> torch.Tensor: ...

    def frozen(self) -> list[torch.Tensor]:
        """The tensors that W is made of, those of its size."""
        ...

    def put(self, frozen: Sequence[torch.Tensor]) -> None:
        """Compute with these in the place of `frozen()` from now on."""
        ...


class DenseProduct:
    """W in bfloat16: the layers' weights stacked by outputs. The layers keep views of it, so that
    nothing is held twice.
    """

    in_fp8 = False

    def __init__(self, layers: Sequence[Any]) -> None:
        self._layers = layers
        self._weight_OI: torch.Tensor = layers[0].weight if len(layers) == 1 else stacked(layers)
        if len(layers) > 1:
            leave_rows(layers, self._weight_OI)

    def forward(self, x_TI: Any) -> torch.Tensor:
        return cast(torch.Tensor, x_TI @ self._weight_OI.t())

    def backward(self, dy_TO: Any) -> torch.Tensor:
        return cast(torch.Tensor, dy_TO @ self._weight_OI)

    def frozen(self) -> list[torch.Tensor]:
        return [self._weight_OI]

    def put(self, frozen: Sequence[torch.Tensor]) -> None:
        (self._weight_OI,) = frozen
        leave_rows(self._layers, self._weight_OI)


def stacked(layers: Sequence[Any]) -> torch.Tensor:
    """The layers' weights, one below the other."""
    with torch.no_grad():
        return torch.cat([layer.weight for layer in layers])


def leave_rows(layers: Sequence[Any], whole_OI: torch.Tensor) -> None:
    """Let each layer's weight be its rows of the stack."""
    for layer, rows_OI in zip(
        layers, torch.split(whole_OI, [layer.out_features for layer in layers]), strict=True
    ):
        layer.weight = nn.Parameter(rows_OI, requires_grad=False)


class Workspace:
    """One buffer that all 4-bit products unpack their weights into, one after the other in the
    order of the stream.
    """

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.bfloat16)

    def take(self, rows: int, columns: int, device: torch.device) -> torch.Tensor:
        if self._buffer.numel() < rows * columns or self._buffer.device != device:
            self._buffer = torch.empty(rows * columns, dtype=torch.bfloat16, device=device)
        return self._buffer[: rows * columns].view(rows, columns)


class Nf4Product:
    """W in 4 bits, unpacked for each product into the shared workspace, or once for all of them."""

    in_fp8 = False

    def __init__(self, layers: Sequence[Any], workspace: Workspace) -> None:
        self._layers = layers
        self._rows = [int(layer.out_features) for layer in layers]
        self._columns = int(layers[0].in_features)
        self._workspace = workspace
        self._kept_OI: torch.Tensor | None = None

    def keep_unpacked(self, device: torch.device) -> None:
        """Hold W in bfloat16, too, from now on."""
        if self._kept_OI is None:
            own = Workspace().take(sum(self._rows), self._columns, device)
            self._kept_OI = self._unpacked_into(own)

    def _unpacked(self, device: torch.device) -> torch.Tensor:
        if self._kept_OI is not None:
            return self._kept_OI
        return self._unpacked_into(self._workspace.take(sum(self._rows), self._columns, device))

    def _unpacked_into(self, weight_OI: torch.Tensor) -> torch.Tensor:
        from emotion_train.model import kernels

        for layer, rows_OI in zip(self._layers, torch.split(weight_OI, self._rows), strict=True):
            kernels.unpack_4bit_(rows_OI, layer.weight.data, layer.weight.quant_state)
        return weight_OI

    def forward(self, x_TI: Any) -> torch.Tensor:
        return cast(torch.Tensor, x_TI @ self._unpacked(x_TI.device).t())

    def backward(self, dy_TO: Any) -> torch.Tensor:
        return cast(torch.Tensor, dy_TO @ self._unpacked(dy_TO.device))

    def frozen(self) -> list[torch.Tensor]:
        """Codes and first scales of each layer; the scales of scales are a 64th of those."""
        return [
            tensor
            for layer in self._layers
            for tensor in (layer.weight.data.view(torch.uint8), layer.weight.quant_state.absmax)
        ]

    def put(self, frozen: Sequence[torch.Tensor]) -> None:
        for layer, codes, scales in zip(self._layers, frozen[::2], frozen[1::2], strict=True):
            layer.weight.data = codes
            layer.weight.quant_state.absmax = scales


class Fp8Product:
    """W in float8 (e4m3) with a scale for each row, twice: as it is, and transposed for the
    gradient, since the units read rows only.

    What it multiplies is brought to float8 row by row, too. The layers are left with the first copy
    in place of their bfloat16 weights.
    """

    in_fp8 = True

    def __init__(self, layers: Sequence[Any]) -> None:
        from emotion_train.model import kernels

        self._layers = layers
        weight_OI = stacked(layers)
        self._by_output, self._by_input = (
            kernels.quantize_rows(weight_OI),
            kernels.quantize_rows(weight_OI.t().contiguous()),
        )
        leave_rows(layers, self._by_output.codes_TI)

    def forward(self, x_TI: torch.Tensor | Fp8) -> torch.Tensor:
        return _fp8_product(x_TI, self._by_output)

    def backward(self, dy_TO: torch.Tensor | Fp8) -> torch.Tensor:
        return _fp8_product(dy_TO, self._by_input)

    def frozen(self) -> list[torch.Tensor]:
        return [*self._by_output, *self._by_input]

    def put(self, frozen: Sequence[torch.Tensor]) -> None:
        self._by_output, self._by_input = (
            type(self._by_output)(*frozen[:2]),
            type(self._by_input)(*frozen[2:]),
        )
        leave_rows(self._layers, self._by_output.codes_TI)


def _fp8_product(a_MK: torch.Tensor | Fp8, b_NK: Fp8) -> torch.Tensor:
    """a b^T in bfloat16."""
    from emotion_train.model import kernels

    a = kernels.quantize_rows(a_MK) if isinstance(a_MK, torch.Tensor) else a_MK
    return torch._scaled_mm(
        a.codes_TI,
        b_NK.codes_TI.t(),
        scale_a=a.scales_T1,
        scale_b=b_NK.scales_T1.t(),
        out_dtype=torch.bfloat16,
        # 10 to 25 % faster on an H100; what it rounds is small against the rounding of the factors
        use_fast_accum=True,
    )


class FusedInputs(NamedTuple):
    """A pack on the GPU. `sees_from_T` and `seen_until_T` are int32, see kernels.py; training with
    dropout needs `counters`.
    """

    input_ids_T: torch.Tensor
    position_ids_T: torch.Tensor
    sees_from_T: torch.Tensor
    seen_until_T: torch.Tensor
    last_tokens_N: torch.Tensor
    counters: Counters | None

    def repeated(self, times: int) -> FusedInputs:
        """The pack so many times, one after the other, for scoring."""
        tokens = len(self.input_ids_T)

        def moved(places: torch.Tensor) -> torch.Tensor:
            by_K1 = torch.arange(times, device=places.device, dtype=places.dtype)[:, None] * tokens
            return (places[None] + by_K1).reshape(-1)

        return FusedInputs(
            self.input_ids_T.repeat(times),
            self.position_ids_T.repeat(times),
            moved(self.sees_from_T),
            moved(self.seen_until_T),
            moved(self.last_tokens_N),
            None,
        )


@dataclass(frozen=True)
class SharedInputs:
    """What every block needs of a pack; without dropout there are no counters, neither of all
    tokens nor of the posts' last ones.
    """

    cos_TD: torch.Tensor
    sin_TD: torch.Tensor
    sees_from_T: torch.Tensor
    seen_until_T: torch.Tensor
    last_tokens_N: torch.Tensor
    counters: Counters | None
    counters_of_last: Counters | None


class Adapters:
    """LoRA of the layers of one product. Each forward pass of the decoder begins by bringing them
    to bfloat16.

    R is the sum of the ranks: down_RI holds s A of each layer, one below the other; up_OR their B
    as blocks, zero elsewhere.
    """

    def __init__(self, layers: Sequence[Any], compute: torch.dtype) -> None:
        self._adapted = [index for index, layer in enumerate(layers) if hasattr(layer, "lora_A")]
        chosen: list[Any] = [layers[index] for index in self._adapted]
        self.parameters: list[nn.Parameter] = [
            p for one in chosen for p in (one.lora_A[ADAPTER].weight, one.lora_B[ADAPTER].weight)
        ]
        # layers with one input have one mask, and their modules one number
        drop = chosen[0].lora_dropout[ADAPTER] if chosen else None
        self.dropout, self.number = (drop.p, drop.number) if isinstance(drop, PostDropout) else (0.0, 0)
        self.scale = float(chosen[0].scaling[ADAPTER]) if chosen else 1.0
        outputs = [int(layer.out_features) for layer in layers]
        rank = len(self.parameters[0]) if chosen else 0
        starts = [sum(outputs[:index]) for index in self._adapted]
        self._rows = [
            slice(start, start + outputs[index]) for start, index in zip(starts, self._adapted, strict=True)
        ]
        self._ranks = [slice(place * rank, (place + 1) * rank) for place in range(len(chosen))]
        if chosen:
            a = self.parameters[0]
            self.down_RI = torch.zeros(rank * len(chosen), a.shape[1], dtype=compute, device=a.device)
            self.up_OR = torch.zeros(sum(outputs), rank * len(chosen), dtype=compute, device=a.device)
        # of several models that compute together, for scoring alone: K of each
        self.members: tuple[torch.Tensor, torch.Tensor] | None = None

    def __bool__(self) -> bool:
        return bool(self._adapted)

    def copies(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(place in bfloat16, parameter) of every adapter."""
        pairs = [
            (self.down_RI[ranks], self.up_OR[rows, ranks])
            for ranks, rows in zip(self._ranks, self._rows, strict=True)
        ]
        return list(zip((place for pair in pairs for place in pair), self.parameters, strict=True))

    def add_to(self, y_TO: torch.Tensor, x_TI: torch.Tensor, counters: Counters | None) -> torch.Tensor:
        """y += B s A x, in place. Returns s A x, which `backward` needs. Each of K members computes
        its own part of the rows.
        """
        if self.members is not None:
            down_KRI, up_KOR = self.members
            u_KTR = x_TI.view(len(down_KRI), -1, x_TI.shape[1]) @ down_KRI.mT
            y_TO.view(len(up_KOR), -1, y_TO.shape[1]).baddbmm_(u_KTR, up_KOR.mT)
            return u_KTR.flatten(0, 1)
        u_TR = self._dropped(x_TI, counters) @ self.down_RI.t()
        y_TO.addmm_(u_TR, self.up_OR.t())
        return u_TR

    def backward(
        self,
        dx_TI: torch.Tensor | None,
        dy_TO: torch.Tensor,
        x_TI: torch.Tensor,
        u_TR: torch.Tensor,
        counters: Counters | None,
        norm: Norm | None = None,
    ) -> list[torch.Tensor]:
        """The gradients of `parameters` in float32; adds the adapters' part to dx in place. Where
        `norm` is given the input was that norm of x.
        """
        from emotion_train.model import kernels

        du_TR = dy_TO @ self.up_OR
        d_down_RI = product_in_float32(du_TR.t(), self._dropped(x_TI, counters, norm)).mul_(self.scale)
        d_up_OR = product_in_float32(dy_TO.t(), u_TR)
        if dx_TI is not None:
            if self.dropout > 0 and counters is not None:
                kernels.add_dropped_product_(dx_TI, du_TR, self.down_RI, self.dropout, counters, self.number)
            else:
                dx_TI.addmm_(du_TR, self.down_RI)
        gradients = []
        for ranks, rows in zip(self._ranks, self._rows, strict=True):
            # without its gaps: a recorded graph adds it to others, which PyTorch does with many
            # tensors in one kernel only where none has any
            gradients += [d_down_RI[ranks], d_up_OR[rows, ranks].contiguous()]
        return gradients

    def _dropped(
        self, x_TI: torch.Tensor, counters: Counters | None, norm: Norm | None = None
    ) -> torch.Tensor:
        from emotion_train.model import kernels

        if self.dropout > 0 and counters is not None:
            return kernels.dropout(x_TI, self.dropout, counters, self.number, norm)
        return x_TI if norm is None else kernels.rms_norm_again(x_TI, *norm)


def product_in_float32(a_MK: torch.Tensor, b_KN: torch.Tensor) -> torch.Tensor:
    """a b of bfloat16 matrices, with the sums left in float32."""
    if a_MK.is_cuda:
        return torch.mm(a_MK, b_KN, out_dtype=torch.float32)
    return a_MK.float() @ b_KN.float()


@dataclass(frozen=True)
class Projection:
    """A product and the adapters beside it."""

    product: Product
    adapters: Adapters

    @property
    def in_fp8(self) -> bool:
        """Whether nothing but the product reads what is multiplied, and reads it in float8."""
        return self.product.in_fp8 and not self.adapters

    def forward(
        self, x_TI: torch.Tensor | Fp8, counters: Counters | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(the output, what the adapters' backward pass needs)."""
        y_TO = self.product.forward(x_TI)
        if not self.adapters:
            return y_TO, None
        assert isinstance(x_TI, torch.Tensor)
        return y_TO, self.adapters.add_to(y_TO, x_TI, counters)


@dataclass(frozen=True)
class Block:
    """One decoder block: norm, attention, norm, MLP. `pooled` makes it the last one, whose MLP
    computes the posts' last tokens only.
    """

    norm_1_H: torch.Tensor
    qkv: Projection
    out: Projection
    norm_2_H: torch.Tensor
    gate_up: Projection
    down: Projection
    heads: int
    kv_heads: int
    scale: float  # of the attention scores
    eps: float
    pooled: bool
    number: int
    gathered: GatheredBlocks | None = None

    def gather(self, ahead: int) -> None:
        """Have the weights whole, where they are cut, and the next block's on their way; `ahead` is
        1 in a forward pass and -1 in a backward pass.
        """
        if self.gathered is not None:
            self.gathered.need(self.number, self.number + ahead)

    @property
    def projections(self) -> tuple[Projection, ...]:
        return self.qkv, self.out, self.gate_up, self.down

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for one in self.projections for p in one.adapters.parameters]

    def forward(
        self, h_TH: torch.Tensor, m_TH: torch.Tensor | None, pack: SharedInputs
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor | None, ...]]:
        """((h, m) whose sum is the block's output, what `backward` needs). The input is the sum of
        h and m, too.
        """
        from emotion_train.model import kernels

        h_TH, x_TH, rstd_1_T = kernels.add_rms_norm(h_TH, m_TH, self.norm_1_H, self.eps)
        qkv_TW, u_qkv = self.qkv.forward(x_TH, pack.counters)
        kernels.rotate_(qkv_TW, pack.cos_TD, pack.sin_TD, self.heads + self.kv_heads)
        mixed, lse_QT = kernels.attention(qkv_TW, pack.sees_from_T, self.heads, self.kv_heads, self.scale)
        at_h, at_mixed = (
            (h_TH[pack.last_tokens_N], mixed[pack.last_tokens_N]) if self.pooled else (h_TH, mixed)
        )
        counters = self._counters_after_attention(pack)
        o, u_out = self.out.forward(at_mixed, counters)
        add_rms_norm = kernels.add_rms_norm_fp8 if self.gate_up.in_fp8 else kernels.add_rms_norm
        h_mid, y, rstd_2 = add_rms_norm(at_h, o, self.norm_2_H, self.eps)
        gate_up, u_gate_up = self.gate_up.forward(y, counters)
        m, u_down = self.down.forward(
            kernels.swiglu_fp8(gate_up) if self.down.in_fp8 else kernels.swiglu(gate_up), counters
        )
        return (h_mid, m), (
            h_TH,
            rstd_1_T,
            qkv_TW,
            mixed,
            lse_QT,
            h_mid,
            rstd_2,
            gate_up,
            u_qkv,
            u_out,
            u_gate_up,
            u_down,
        )

    def backward(
        self, saved: Sequence[Any], dh: torch.Tensor, dm: torch.Tensor, pack: SharedInputs, needs_dx: bool
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """Gradient by the input (None unless needed), and those of `parameters` in their order.
        Overwrites the saved gate and up.
        """
        from emotion_train.model import kernels

        h_TH, rstd_1_T, qkv_TW, mixed, lse_QT, h_mid, rstd_2, gate_up, u_qkv, u_out, u_gate_up, u_down = saved
        counters = self._counters_after_attention(pack)
        d_product = self.down.product.backward(dm)
        d_down: list[torch.Tensor] = []
        if self.down.adapters:
            d_down = self.down.adapters.backward(d_product, dm, kernels.swiglu(gate_up), u_down, counters)
        d_gate_up_adapters: list[torch.Tensor] = []
        if self.gate_up.in_fp8:
            dy = self.gate_up.product.backward(kernels.swiglu_backward_fp8(gate_up, d_product))
        else:
            d_gate_up = kernels.swiglu_backward_(gate_up, d_product)
            dy = self.gate_up.product.backward(d_gate_up)
            if self.gate_up.adapters:
                d_gate_up_adapters = self.gate_up.adapters.backward(
                    dy, d_gate_up, h_mid, u_gate_up, counters, norm=(self.norm_2_H, rstd_2)
                )
        dh_mid = kernels.rms_norm_backward(dy, h_mid, self.norm_2_H, rstd_2, dh)

        d_mixed = self.out.product.backward(dh_mid)
        d_out: list[torch.Tensor] = []
        if self.out.adapters:
            at_mixed = mixed[pack.last_tokens_N] if self.pooled else mixed
            d_out = self.out.adapters.backward(d_mixed, dh_mid, at_mixed, u_out, counters)
        if self.pooled:
            d_mixed = torch.zeros_like(mixed).index_add_(0, pack.last_tokens_N, d_mixed)
            dh_mid = torch.zeros_like(h_TH).index_add_(0, pack.last_tokens_N, dh_mid)
        d_qkv = kernels.attention_backward(
            d_mixed,
            qkv_TW,
            mixed,
            lse_QT,
            pack.sees_from_T,
            pack.seen_until_T,
            self.heads,
            self.kv_heads,
            self.scale,
        )
        kernels.rotate_(d_qkv, pack.cos_TD, pack.sin_TD, self.heads + self.kv_heads, back=True)
        dx = self.qkv.product.backward(d_qkv) if needs_dx else None
        d_qkv_adapters: list[torch.Tensor] = []
        if self.qkv.adapters:
            d_qkv_adapters = self.qkv.adapters.backward(
                dx, d_qkv, h_TH, u_qkv, pack.counters, norm=(self.norm_1_H, rstd_1_T)
            )
        if dx is not None:
            dx = kernels.rms_norm_backward(dx, h_TH, self.norm_1_H, rstd_1_T, dh_mid)
        return dx, [*d_qkv_adapters, *d_out, *d_gate_up_adapters, *d_down]

    def _counters_after_attention(self, pack: SharedInputs) -> Counters | None:
        return pack.counters_of_last if self.pooled else pack.counters


class _Run(torch.autograd.Function):
    """A block in the graph; its adapters are inputs, so that DDP hears of their gradients. The
    backward pass can be run once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h_TH: torch.Tensor,
        m_TH: torch.Tensor | None,
        block: Block,
        pack: SharedInputs,
        recompute: bool,
        *parameters: nn.Parameter,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        block.gather(ahead=1)
        output, saved = block.forward(h_TH, m_TH, pack)
        ctx.block, ctx.pack, ctx.recompute, ctx.has_m = block, pack, recompute, m_TH is not None
        ctx.save_for_backward(*(saved[:1] if recompute else saved))
        return output

    @staticmethod
    def backward(ctx: Any, dh: torch.Tensor, dm: torch.Tensor) -> tuple[Any, ...]:
        block: Block = ctx.block
        saved = ctx.saved_tensors
        block.gather(ahead=-1)
        if ctx.recompute:
            _, saved = block.forward(saved[0], None, ctx.pack)
        needs_dx = ctx.needs_input_grad[0]
        dx, gradients = block.backward(saved, dh.contiguous(), dm.contiguous(), ctx.pack, needs_dx)
        return (dx, dx if ctx.has_m else None, None, None, None, *gradients)


class FusedDecoder:
    """Computes with the blocks of a stock classifier with PEFT's adapters; see the head of the
    page.

    Make it once the adapters are attached and the weights lie where they stay: it stacks weights
    and leaves views in their place. It computes in the format of the embedding.

    Where `gathered` is given the blocks' weights are still on the host and are cut over the
    processes, block by block, so that no GPU has to hold the base; all else has to be on the
    device.
    """

    def __init__(self, classifier: Any, fp8: bool = False, gathered: GatheredBlocks | None = None) -> None:
        model, config = classifier.model, classifier.config
        self._embed, self._norm, self._rotary = model.embed_tokens, model.norm, model.rotary_emb
        # tokens that a token sees, itself included
        self.window: int | None = getattr(config, "sliding_window", None)
        workspace = Workspace()

        def projection(*layers: Any) -> Projection:
            bases = [getattr(layer, "base_layer", layer) for layer in layers]
            product: Product
            if type(bases[0]).__name__ == "Linear4bit":
                product = Nf4Product(bases, workspace)
            else:
                product = Fp8Product(bases) if fp8 else DenseProduct(bases)
            return Projection(product, Adapters(layers, model.embed_tokens.weight.dtype))

        def block(number: int, layer: Any) -> Block:
            if gathered is not None:
                for linear in linear_layers(layer):
                    linear.weight.data = linear.weight.data.to(model.embed_tokens.weight.device)
            qkv, out, gate_up, down = (projection(*layers) for layers in _projected(layer))
            made = Block(
                norm_1_H=layer.input_layernorm.weight,
                qkv=qkv,
                out=out,
                norm_2_H=layer.post_attention_layernorm.weight,
                gate_up=gate_up,
                down=down,
                heads=config.num_attention_heads,
                kv_heads=config.num_key_value_heads,
                scale=layer.self_attn.scaling,
                eps=config.rms_norm_eps,
                pooled=layer is model.layers[-1],
                number=number,
                gathered=gathered,
            )
            if gathered is not None:
                _cut(made, gathered)
            return made

        self._blocks = [block(number, layer) for number, layer in enumerate(model.layers)]
        self.is_gathered = gathered is not None
        projections = [one for block in self._blocks for one in block.projections]
        copies = [pair for one in projections if one.adapters for pair in one.adapters.copies()]
        # PyTorch copies many tensors in one kernel where none has gaps, as the blocks of several
        # layers' B have
        dense, gappy = (
            [pair for pair in copies if pair[0].is_contiguous() == whole] for whole in (True, False)
        )
        self._copies = [
            ([place for place, _ in pairs], [one for _, one in pairs]) for pairs in (dense, gappy) if pairs
        ]
        self._downs = [one.adapters for one in projections if one.adapters]
        self._drops = any(one.dropout > 0 for one in self._downs)
        self._members = 0
        self.recompute = False

    @torch.no_grad()
    def keep_unpacked(self, blocks: int) -> int:
        """Hold the 4-bit weights of the first so many blocks in bfloat16, too: the same numbers,
        without the time to unpack them for each pass. Returns how many blocks have such weights.
        """
        count = 0
        for block in self._blocks[:blocks] if not self.is_gathered else ():
            products = [one.product for one in block.projections if isinstance(one.product, Nf4Product)]
            for product in products:
                product.keep_unpacked(self._embed.weight.device)
            count += bool(products)
        return count

    @torch.no_grad()
    def hold(self, members: int, put: Callable[[int], None]) -> None:
        """From now on compute so many adapters in one pass over the base's weights, for scoring
        alone: inputs are those of `FusedInputs.repeated`, and each repetition is computed with one
        of them. `put` brings the adapter of a number into the classifier's parameters.
        """
        kept: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in self._downs]
        for member in range(members):
            put(member)
            self._refresh()
            for of_one, one in zip(kept, self._downs, strict=True):
                of_one.append((one.down_RI.clone(), one.up_OR.clone()))
        for of_one, one in zip(kept, self._downs, strict=True):
            one.members = (
                torch.stack([down_RI for down_RI, _ in of_one]),
                torch.stack([up_OR for _, up_OR in of_one]),
            )
        self._members = members

    def __call__(self, inputs: FusedInputs, training: bool) -> torch.Tensor:
        """Normalised hidden states of the posts' last tokens, of shape NH. Raises `ValueError` in
        training with dropout but without counters.
        """
        assert not (self._members and training), "several adapters are for scoring"
        if not self._members:
            self._refresh()
        positions_1T = inputs.position_ids_T[None]
        cos_1TD, sin_1TD = self._rotary(
            torch.empty(0, dtype=torch.float32, device=positions_1T.device), positions_1T
        )
        counters = required(inputs.counters) if training and self._drops else None
        of_last = counters.at(inputs.last_tokens_N) if counters is not None else None
        pack = SharedInputs(cos_1TD[0], sin_1TD[0], *inputs[2:5], counters, of_last)
        h: torch.Tensor = self._embed(inputs.input_ids_T)
        m: torch.Tensor | None = None
        for block in self._blocks:
            if torch.is_grad_enabled():
                h, m = _Run.apply(h, m, block, pack, self.recompute, *block.parameters)  # type: ignore[no-untyped-call]
            else:
                block.gather(ahead=1)
                (h, m), _ = block.forward(h, m, pack)
        assert m is not None
        hidden_NH: torch.Tensor = self._norm(h + m)
        return hidden_NH

    @torch.no_grad()
    def _refresh(self) -> None:
        """Bring the adapters to bfloat16, where the products read them."""
        for places, parameters in self._copies:
            torch._foreach_copy_(places, parameters)
        if self._downs:
            torch._foreach_mul_([one.down_RI for one in self._downs], [one.scale for one in self._downs])


def _cut(block: Block, gathered: GatheredBlocks) -> None:
    """Leave this process its part of the block's weights."""
    products = [one.product for one in block.projections]
    frozen = [product.frozen() for product in products]
    views = iter(gathered.cut([tensor for tensors in frozen for tensor in tensors]))
    for product, tensors in zip(products, frozen, strict=True):
        product.put(list(islice(views, len(tensors))))


def linear_layers(layer: Any) -> list[Any]:
    """The frozen linear layers of one of the model's blocks, inside their adapters."""
    return [getattr(one, "base_layer", one) for together in _projected(layer) for one in together]


def _projected(layer: Any) -> tuple[tuple[Any, ...], ...]:
    """The linear layers of a block, in the order in which they are computed; those of one tuple
    have one input and are one product.
    """
    attention, mlp = layer.self_attn, layer.mlp
    return (
        (attention.q_proj, attention.k_proj, attention.v_proj),
        (attention.o_proj,),
        (mlp.gate_proj, mlp.up_proj),
        (mlp.down_proj,),
    )


def fits(classifier: Any, device: torch.device) -> bool:
    """Whether this page can compute the model on `device`: fusable blocks, on a GPU that has
    bfloat16.
    """
    return has_bfloat16(device) and Shape.of(classifier.config.to_dict()).fusable
