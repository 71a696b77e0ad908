"""The classifier: hidden state of each post's last token, through a float32 linear head, to one row
of logits per post; of an encoder, the pooling of its family (encoder.py).

Posts are found by position, never by token id: padding or a post that quotes `<pad>` cannot move
the pooling. The wrapped model is transformers' own XForSequenceClassification (with or without a
PEFT adapter), so what is trained here reloads there.

Letters: T tokens of a pack, N posts, L tokens of a padded row, C classes, H hidden size.
"""

from __future__ import annotations

import hashlib
from typing import Any, cast

import torch
from torch import nn

from emotion_train.bases.encoders import head_of
from emotion_train.errors import WrongRequest
from emotion_train.model.attention import Segments, is_fused, on_device, sight
from emotion_train.model.delta_net import chunks_of
from emotion_train.model.dropout import Counters, current_of
from emotion_train.model.encoder import blocks, is_encoder, logits_of_posts, packed, positions_of
from emotion_train.model.fused import FusedDecoder, FusedInputs, fits, linear_layers
from emotion_train.model.gathered import GatheredBlocks
from emotion_train.model.precision import Precision, formats


def require_float8(device: torch.device, fused: bool) -> None:
    """Raises `WrongRequest` where fp8 cannot be computed: on a GPU without float8, or for a base
    that is not `fused`.
    """
    if not (fused and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)):
        raise WrongRequest(
            "model.precision is fp8, which needs a GPU with float8 units (L4, L40S, H100, H200 and newer) and"
            " a Llama or Mistral base; type model.precision=bf16 (--precision bf16 to predict or evaluate),"
            " or nf4 for a quarter of its memory."
        )


class EmotionClassifier(nn.Module):
    """`forward` takes a pack, so that DDP and DeepSpeed can wrap it; `forward_padded` takes
    right-padded rows.

    The arithmetic of the base runs under autocast to the precision's compute format whatever the
    caller set; the logits are float32.
    """

    def __init__(self, network: nn.Module, precision: Precision):
        super().__init__()
        self.network = network  # XForSequenceClassification, or PEFT's wrapper of it
        self.compute = formats(precision).compute
        self.precision = precision
        self.decoder: FusedDecoder | None = None
        self._current = current_of(network)

    def fuse(self) -> None:
        """From now on compute packs by the fused decoder where it fits the model and its device.

        Call it once the weights lie where they stay, and not when an engine shards them. Raises
        `WrongRequest` for fp8 without it.
        """
        if self._fusable(self.device):
            self.decoder = FusedDecoder(self.classifier, fp8=self.precision == "fp8")

    def fuse_cut(self, device: torch.device) -> bool:
        """Like `fuse`, for weights on the host that are to be sharded over the processes; every
        process calls it. Returns whether it was done, else nothing has changed. Raises as `fuse`
        does.
        """
        if not self._fusable(device):
            return False
        self.cut(device)
        return True

    def _fusable(self, device: torch.device) -> bool:
        """Whether the fused decoder computes this model there; raises `WrongRequest` for fp8 where
        it does not.
        """
        fitting = not self.is_encoder and fits(self.classifier, device)
        if self.precision == "fp8":
            require_float8(device, fitting)
        return self.compute == torch.bfloat16 and fitting

    def cut(self, device: torch.device) -> None:
        """Move the unsharded weights, and this process's shard of the blocks' weights, to
        `device`.
        """
        blocks = {id(linear.weight) for layer in self.layers for linear in linear_layers(layer)}
        for parameter in self.parameters():
            if id(parameter) not in blocks:
                parameter.data = parameter.data.to(device)
        self.decoder = FusedDecoder(self.classifier, self.precision == "fp8", GatheredBlocks(device))

    @property
    def classifier(self) -> Any:
        """The stock model inside PEFT's wrapper; its layers and its head carry the adapter."""
        get_base_model: Any = getattr(self.network, "get_base_model", None)
        return self.network if get_base_model is None else get_base_model()

    @property
    def device(self) -> torch.device:
        device: torch.device = self.classifier.get_input_embeddings().weight.device
        return device

    @property
    def is_encoder(self) -> bool:
        """Whether each token sees the whole post."""
        return is_encoder(self.classifier.config)

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks, for example to shard each of them."""
        if self.is_encoder:
            return blocks(self.classifier)
        layers: nn.ModuleList = self.classifier.model.layers
        return layers

    @property
    def is_fused(self) -> bool:
        """Whether the stock blocks' attention runs through the CUDA kernel."""
        return is_fused(self.device, self.compute)

    def forward(
        self,
        input_ids_1T: torch.Tensor,
        position_ids_1T: torch.Tensor,
        segments: Segments,
        last_token_idx_N: torch.Tensor,
        counters: Counters | None = None,
    ) -> torch.Tensor:
        """Logits of shape NC, float32. `position_ids_1T` restart at each segment, of which the
        first N are the posts. Where there is none (N = 0) gradients are zero, not absent. Training
        with dropout needs `counters`, else raises `ValueError`.
        """
        if self.decoder is not None:
            return self.forward_fused(
                self.fused_inputs(input_ids_1T, position_ids_1T, segments, last_token_idx_N, counters)
            )
        apart = segments.as_kwargs(self.is_fused) | chunks_of(
            self.classifier, segments.lengths, len(last_token_idx_N), self.device
        )
        with self._current.of(counters):
            hidden_1TH = self._hidden(input_ids_1T, position_ids_1T, apart)
        if self.is_encoder:
            posts = len(last_token_idx_N)
            hidden_TH = hidden_1TH[0]
            return logits_of_posts(self.classifier, hidden_TH, segments, posts, counters, self._current)
        return self._logits(hidden_1TH[0].index_select(0, last_token_idx_N))

    def fused_inputs(
        self,
        input_ids_1T: torch.Tensor,
        position_ids_1T: torch.Tensor,
        segments: Segments,
        last_token_idx_N: torch.Tensor,
        counters: Counters | None = None,
    ) -> FusedInputs:
        """A pack as the fused decoder takes it."""
        assert self.decoder is not None
        sees_from_T, seen_until_T = on_device(sight(segments.lengths, self.decoder.window), self.device)
        return FusedInputs(
            input_ids_1T[0], position_ids_1T[0], sees_from_T, seen_until_T, last_token_idx_N, counters
        )

    def forward_fused(self, inputs: FusedInputs) -> torch.Tensor:
        """Logits of shape NC, float32, by the fused decoder."""
        assert self.decoder is not None
        return self._logits(self.decoder(inputs, self.training))

    def forward_padded(
        self, input_ids_NL: torch.Tensor, lengths_N: torch.Tensor, counters: Counters | None = None
    ) -> torch.Tensor:
        """Logits of shape NC, float32, of right-padded rows; the content of the padding does not
        matter. `counters` as in `forward`.
        """
        if self.is_encoder:
            return self.forward(*packed(input_ids_NL, lengths_N, counters))
        position_ids_NL = torch.arange(input_ids_NL.shape[1], device=input_ids_NL.device).expand_as(
            input_ids_NL
        )
        rows, length = input_ids_NL.shape
        apart = chunks_of(self.classifier, (length,) * rows, rows, self.device)
        with self._current.of(counters):
            hidden_NLH = self._hidden(input_ids_NL, position_ids_NL, apart)
        rows_N = torch.arange(len(lengths_N), device=hidden_NLH.device)
        return self._logits(hidden_NLH[rows_N, lengths_N.to(hidden_NLH.device) - 1])

    def enable_gradient_checkpointing(self) -> None:
        """Recompute each block in the backward pass: less memory, about a third slower."""
        if self.decoder is not None:
            self.decoder.recompute = True
        stock = self.classifier
        # the latter before 5.2x
        enable = (
            getattr(stock, "activation_checkpointing_enable", None) or stock.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False, "context_fn": self._current.around_checkpoints})

    def _hidden(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, attention: dict[str, Any]
    ) -> torch.Tensor:
        # no cache: a pass casts each weight once anyway, and a recorded graph must cast what the
        # last update left
        with torch.autocast(
            self.device.type,
            dtype=torch.bfloat16,
            enabled=self.compute == torch.bfloat16,
            cache_enabled=False,
        ):
            output = self.classifier.base_model(
                input_ids=input_ids,
                attention_mask=None,
                position_ids=positions_of(self.classifier.config, position_ids),
                use_cache=False,
                **attention,
            )
        hidden: torch.Tensor = output.last_hidden_state
        return hidden

    def _logits(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device.type, enabled=False):
            logits_NC: torch.Tensor = self.classifier.score(hidden_NH.float())
        return logits_NC


class TrainedRows(nn.Linear):
    """A head with rows for `main` labels and, after them, for auxiliary ones. All have logits in
    training; outside of it only the main labels have, as in the published head.
    """

    def __init__(self, whole: nn.Linear, main: int) -> None:
        super().__init__(whole.in_features, whole.out_features, whole.bias is not None, device="meta")
        self.weight, self.bias = whole.weight, whole.bias
        self.main = main

    def forward(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        if self.training:
            return super().forward(hidden_NH)
        bias = None if self.bias is None else self.bias[: self.main]
        return nn.functional.linear(hidden_NH, self.weight[: self.main], bias)


def init_head(classifier: nn.Module, seed: int) -> None:
    """Fill the head with N(0, 0.02), the same for one seed on every device and rank, whatever else
    drew random numbers; of an encoder also the layers before it that its checkpoint has not.
    """
    head = head_of(cast(Any, classifier.config).model_type)
    score = classifier.get_submodule(head)
    assert isinstance(score, nn.Linear), "the head must be a plain layer, not a quantised or adapted one"
    assert score.weight.dtype == torch.float32, f"the head must be float32, not {score.weight.dtype}"
    with torch.no_grad():
        for name in (f"{head}.weight", *getattr(classifier, "not_stored", ())):
            parameter = classifier.get_parameter(name)
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith(".weight"):
                parameter.copy_(
                    torch.empty(parameter.shape).normal_(0.0, 0.02, generator=generator(seed, name))
                )


def generator(seed: int, name: str) -> torch.Generator:
    """A random stream of its own for each parameter name."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
