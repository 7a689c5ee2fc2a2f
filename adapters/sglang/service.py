"""How each layer of a model is served, settled before SGLang serves: what it asks of our kernels, and who answers.

A layer that cannot be served is refused here, with every reason.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from taut.adapters.sglang import bridge, selection
from taut.common_kernels.problem import Problem
from taut.common_kernels.providers import registry
from taut.common_kernels.step import Mask
from taut.common_kernels.targets import target_of

if TYPE_CHECKING:
    from taut.common_kernels.kernels import Kernels
    from taut.common_kernels.providers import KernelProvider

ENCODER = "encoder_only"
BIDIRECTIONAL = "decoder_bidirectional"


@dataclass(frozen=True)
class Surroundings:
    """What the layers of one model share.

    Args:
        device: where it runs.
        dtype: of queries and outputs.
        cache_dtype: of the pool.
        pool: SGLang's pool of keys and values.
        mla: whether the pool holds latent vectors.
        whole_prompts: whether prompts are never cut into chunks.
        kernels: the provider that was asked for, or "auto".
    """

    device: torch.device
    dtype: torch.dtype
    cache_dtype: torch.dtype
    pool: Any
    mla: bool
    whole_prompts: bool
    kernels: str


@dataclass(frozen=True)
class Service:
    """How one layer is served.

    Args:
        problem: what its attention asks for, sinks not counted, which only a call tells of.
        provider: who serves it.
        kernels: that provider's operations.
        mask: of a batch that is causal, or of an encoder's.
        scale: of the scores.
        key_scale: of quantised keys, [1] float32; None for 1.
        value_scale: of quantised values.
        windowed_pool: whether its keys lie in the windowed part of a hybrid pool.
    """

    problem: Problem
    provider: KernelProvider
    kernels: Kernels
    mask: Mask
    scale: float
    key_scale: torch.Tensor | None
    value_scale: torch.Tensor | None
    windowed_pool: bool

    @property
    def kind(self) -> str:
        """ "dense" or "MLA", for the log."""
        return "MLA" if self.absorbed or self.ragged else "dense"

    @property
    def encoder(self) -> bool:
        """Whether the layer sees both ways."""
        return not self.mask.causal

    @property
    def absorbed(self) -> bool:
        """Whether the layer is MLA in its absorbed form, over the latent cache."""
        return self.problem.operation == "mla_decode"

    @property
    def ragged(self) -> bool:
        """Whether the layer's keys are handed over and not read from the cache: MLA in its unabsorbed form."""
        return self.problem.operation == "ragged_attention" and not self.encoder


class Services(dict[tuple[Any, int], Service]):
    """The services of a model's layers, by layer and by queries of a row, 0 for any number.

    A layer that is not among them is judged when it is asked for.

    Args:
        layers: of the model.
        around: what they share.
        queries: numbers of queries of a row that kernels are made for.

    Raises:
        ValueError: not all can be served; the message holds every reason once.

    Attributes:
        first_windowed: the first layer whose keys lie in the windowed part of a hybrid pool; None while there is none.
    """

    def __init__(self, layers: list[Any], around: Surroundings, queries: list[int]) -> None:
        super().__init__()
        self.around = around
        self.first_windowed: Any = None
        reasons = dict.fromkeys(reason for layer in layers for reason in self._judge(layer, queries))
        if reasons:
            raise ValueError(selection.refusal(list(reasons)))

    def __missing__(self, asked: tuple[Any, int]) -> Service:
        layer, queries = asked
        service = self._add(layer, queries, self.get((layer, 0)) or service_of(layer, self.around))
        selection.announce(service.kind, service.provider.name)
        return service

    def widest_window(self, default: int) -> int:
        """How far back a layer of the windowed part of a hybrid pool sees at most; `default` where there is none."""
        return max((service.mask.left for service in self.values() if service.windowed_pool), default=default)

    def announce(self) -> None:
        """Log who serves, once for each kind of layer and provider."""
        for service in self.values():
            selection.announce(service.kind, service.provider.name)

    def _judge(self, layer: Any, queries: list[int]) -> list[str]:
        """Why a layer cannot be served; nothing where it can."""
        try:
            service = service_of(layer, self.around)
            for count in queries:
                self._add(layer, count, service)
        except ValueError as error:
            return [str(error)]
        return []

    def _add(self, layer: Any, queries: int, service: Service) -> Service:
        self[layer, queries] = service = bounded(service, queries, self.around.kernels)
        if self.first_windowed is None and service.windowed_pool:
            self.first_windowed = layer
        return service


def service_of(layer: Any, around: Surroundings) -> Service:
    """How a layer is served.

    Raises:
        ValueError: it cannot be; every reason is in the message.
    """
    reasons = refusals(layer, around)
    if reasons:
        raise ValueError("; ".join(reasons))
    problem = problem_of_layer(layer, around)
    provider = registry().choose(problem, around.kernels).provider
    left = window(layer)
    causal = "causal" in problem.features
    return Service(
        problem=problem,
        provider=provider,
        kernels=provider.kernels,
        # As far after the query as before it where the layer sees both ways.
        mask=Mask(causal, left, -1 if causal else left, float(layer.logit_cap or 0.0)),
        scale=float(layer.scaling),
        key_scale=_scale(layer.k_scale, around) if not around.mla else None,
        value_scale=_scale(layer.v_scale, around) if not around.mla else None,
        windowed_pool=bridge.has_slots_of_its_own(around.pool, layer.layer_id),
    )


def bounded(service: Service, queries: int, kernels: str) -> Service:
    """The same layer in steps whose rows have at most so many queries, which kernels are made for.

    Args:
        service: in steps whose rows may have any number.
        queries: 1 for decode; 0 for any number.
        kernels: the provider that was asked for, or "auto".
    """
    if service.problem.operation == "ragged_attention" or not queries:
        return service
    problem = replace(service.problem, max_query=queries)
    provider = registry().choose(problem, kernels).provider
    return replace(service, problem=problem, provider=provider, kernels=provider.kernels)


def refusals(layer: Any, around: Surroundings) -> list[str]:
    """Why a layer cannot be served whoever provides the kernels, as sentences that name what it asks for."""
    reasons = []
    if layer.is_cross_attention:
        reasons.append("cross attention (is_cross_attention) is not supported")
    if getattr(layer, "xai_temperature_len", -1) > 0:
        reasons.append(f"xai_temperature_len={layer.xai_temperature_len} (temperature by position) is not supported")
    if layer.logit_cap and getattr(layer, "logit_capping_method", "tanh") != "tanh":
        reasons.append(f"logit_capping_method={layer.logit_capping_method} is not supported, only tanh")
    if bridge.attention_type(layer) == BIDIRECTIONAL and around.whole_prompts:
        reasons.append("attn_type=DECODER_BIDIRECTIONAL with --chunked-prefill-size -1 (prompts seen both ways)")
    if getattr(layer, "pos_encoding_mode", "NONE") not in ("NONE", None):
        reasons.append(f"pos_encoding_mode={layer.pos_encoding_mode} is not supported")
    wrong_cache = bridge.cache_refusal(around.pool, layer.layer_id)
    return reasons + ([wrong_cache] if wrong_cache else [])


def window(layer: Any) -> int:
    """How many keys before its own a query sees, SGLang's measure of a window; -1 for all."""
    size = layer.sliding_window_size
    return int(size) if size and size > 0 else -1


def problem_of_layer(layer: Any, around: Surroundings) -> Problem:
    """What a layer asks of our kernels.

    A model with MLA has two layers in one place: an absorbed one, whose single key head is as wide as the cache, and an
    unabsorbed one, to which keys and values are handed.
    """
    encoder = bridge.attention_type(layer) == ENCODER
    features = {
        "non_causal" if encoder else "causal": True,
        "window": window(layer) >= 0,
        "soft_cap": bool(layer.logit_cap),
    }
    dtype, cache_dtype = _name(around.dtype), _name(around.cache_dtype)
    problem = Problem(
        operation="paged_attention",
        target=target_of(around.device),
        dtype=dtype,
        cache_dtype=cache_dtype,
        q_heads=layer.tp_q_head_num,
        kv_heads=layer.tp_k_head_num,
        head_size=layer.qk_head_dim,
        value_size=layer.v_head_dim,
        page_size=1,
        features=frozenset(feature for feature, needed in features.items() if needed),
        left=window(layer),
    )
    contiguous = replace(problem, operation="ragged_attention", cache_dtype=dtype, page_size=0)
    if encoder:
        return contiguous
    if not around.mla:
        return problem
    width = bridge.mla_cache(around.pool, layer.layer_id).shape[-1]
    if layer.tp_k_head_num != 1 or layer.qk_head_dim != width:
        return replace(contiguous, features=contiguous.features | {"lse"})
    # Without a rope part the latent vector is key and value alike: attention with one key head, as any other.
    return problem if layer.qk_head_dim == layer.v_head_dim else replace(problem, operation="mla_decode")


def _scale(scale: Any, around: Surroundings) -> torch.Tensor | None:
    """A scale of a quantised cache on the device; a cache of any other dtype has none."""
    if scale is None or around.cache_dtype.itemsize > 1:
        return None
    if isinstance(scale, torch.Tensor):
        return scale
    return torch.tensor([float(scale)], dtype=torch.float32, device=around.device)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
