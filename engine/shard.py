"""Which part of a model a rank holds: its layers, its heads, its share of the vocabulary.

Owns the split and the refusal of sizes that cannot be split so. Knows no tensors and no processes (importing it must
not import torch). Invariant: the shards of all ranks together hold every parameter; what two ranks both hold is the
same: norms, a KV head that has more ranks than one, a tied embedding on the first and the last stage.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property

from raydata_llm.engine.model_config import ModelConfig

_BY_ROW = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_BY_COLUMN = ("o_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class RankPlace:
    """A rank's place: ranks of one stage are neighbours, so that those that talk most are on one host."""

    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1

    @classmethod
    def of(cls, rank: int, tp_size: int, pp_size: int) -> RankPlace:
        """The place of a rank among `tp_size * pp_size`."""
        return cls(tp_rank=rank % tp_size, tp_size=tp_size, pp_rank=rank // tp_size, pp_size=pp_size)

    @property
    def rank(self) -> int:
        """Its number among all."""
        return self.pp_rank * self.tp_size + self.tp_rank

    @property
    def num_ranks(self) -> int:
        """How many there are."""
        return self.tp_size * self.pp_size

    @property
    def is_first(self) -> bool:
        """Whether its stage has the embedding."""
        return self.pp_rank == 0

    @property
    def is_last(self) -> bool:
        """Whether its stage has the LM head."""
        return self.pp_rank == self.pp_size - 1


@dataclass(frozen=True)
class Cut:
    """A part of a parameter: `start` up to `stop` along `dim`."""

    dim: int
    start: int
    stop: int


@dataclass(frozen=True)
class ModelShard:
    """One rank's part.

    Args:
        model: The whole model.
        place: Whose part.

    Raises:
        ValueError: where the model cannot be split so, with the sizes that would do.
    """

    model: ModelConfig
    place: RankPlace

    def __post_init__(self) -> None:
        check_split(self.model, self.place.tp_size, self.place.pp_size)

    @cached_property
    def layers(self) -> range:
        """The layers of its stage."""
        return stage_layers(self.model, self.place.pp_size)[self.place.pp_rank]

    @cached_property
    def tokens(self) -> range:
        """Its share of the vocabulary; the last rank's may be smaller."""
        size, per_rank = self.model.vocab_size, self.tokens_per_rank
        return range(min(self.place.tp_rank * per_rank, size), min((self.place.tp_rank + 1) * per_rank, size))

    @property
    def tokens_per_rank(self) -> int:
        """Tokens of each rank but perhaps the last."""
        return -(-self.model.vocab_size // self.place.tp_size)

    @cached_property
    def config(self) -> ModelConfig:
        """The model as this rank computes it: fewer heads, fewer layers, narrower MLPs, of the same hidden size."""
        tp_size = self.place.tp_size
        return dataclasses.replace(
            self.model,
            num_layers=len(self.layers),
            sliding_windows=self.model.sliding_windows[self.layers.start : self.layers.stop],
            num_heads=self.model.num_heads // tp_size,
            num_kv_heads=max(1, self.model.num_kv_heads // tp_size),
            intermediate_size=self.model.intermediate_size // tp_size,
        )

    @cached_property
    def parameters(self) -> dict[str, Cut | None]:
        """The parameters it holds, in Hugging Face's names; None for whole ones."""
        return {name: self._cut(name) for name in self.model.parameter_shapes() if self._holds(name)}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Their shapes here."""
        whole = self.model.parameter_shapes()
        return {name: cut_shape(whole[name], cut) for name, cut in self.parameters.items()}

    def _holds(self, name: str) -> bool:
        if name.startswith("model.layers."):
            # Added after the ranks' sums: once.
            is_summed_bias = name.endswith(tuple(f"{projection}.bias" for projection in _BY_COLUMN))
            return int(name.split(".")[2]) in self.layers and (not is_summed_bias or self.place.tp_rank == 0)
        if name == "model.embed_tokens.weight":
            return self.place.is_first or (self.place.is_last and self.model.tie_word_embeddings)
        return self.place.is_last

    def _cut(self, name: str) -> Cut | None:
        projection = name.split(".")[-2]
        if self.place.tp_size == 1:
            return None
        if projection in ("embed_tokens", "lm_head"):
            return Cut(0, self.tokens.start, self.tokens.stop)
        if projection in _BY_ROW:
            return Cut(0, *self._rows(projection))
        if projection in _BY_COLUMN and name.endswith(".weight"):
            return Cut(1, *self._rows("q_proj" if projection == "o_proj" else "gate_proj"))
        return None

    def _rows(self, projection: str) -> tuple[int, int]:
        model, (rank, size) = self.model, (self.place.tp_rank, self.place.tp_size)
        if projection in ("gate_proj", "up_proj"):
            width, first = self.config.intermediate_size, rank * self.config.intermediate_size
        elif projection == "q_proj":
            width, first = self.config.num_heads * model.head_dim, rank * self.config.num_heads * model.head_dim
        else:
            width, first = self.config.num_kv_heads * model.head_dim, rank * model.num_kv_heads // size * model.head_dim
        return first, first + width


def cut_shape(shape: tuple[int, ...], cut: Cut | None) -> tuple[int, ...]:
    """A parameter's shape after the cut."""
    if cut is None:
        return shape
    return (*shape[: cut.dim], cut.stop - cut.start, *shape[cut.dim + 1 :])


def check_split(model: ModelConfig, tp_size: int, pp_size: int) -> None:
    """Refuse sizes that the model's cannot be divided by.

    Raises:
        ValueError: with the sizes that would do.
    """
    heads, kv_heads, width = model.num_heads, model.num_kv_heads, model.intermediate_size
    if not _splits(model, tp_size):
        fitting = ", ".join(str(size) for size in range(1, heads + 1) if _splits(model, size))
        raise ValueError(
            f"tensor_parallel_size={tp_size} does not divide num_attention_heads={heads}, num_key_value_heads="
            f"{kv_heads} (or is no multiple of it) and intermediate_size={width} of this {model.architecture}: "
            f"choose one of {fitting}"
        )
    if pp_size > model.num_layers:
        raise ValueError(
            f"pipeline_parallel_size={pp_size} is more than the {model.num_layers} layers of this "
            f"{model.architecture}: choose {model.num_layers} or less"
        )


def _splits(model: ModelConfig, tp_size: int) -> bool:
    kv_heads_split = model.num_kv_heads % tp_size == 0 or tp_size % model.num_kv_heads == 0
    return model.num_heads % tp_size == 0 and kv_heads_split and model.intermediate_size % tp_size == 0


def stage_layers(model: ModelConfig, pp_size: int) -> list[range]:
    """Consecutive layers for each stage so that the dearest stage is as cheap as can be.

    A layer costs its weights, the LM head its own, both read once a step; the embedding's lookup next to nothing. Of
    equal splits the one that gives the earlier stages more is taken: the last one samples too.
    """
    layer = 2 * model.hidden_size * (model.num_heads + model.num_kv_heads) * model.head_dim
    layer += 3 * model.hidden_size * model.intermediate_size
    head = model.vocab_size * model.hidden_size
    others = pp_size - 1
    # With at least one layer a stage, the last stage takes what leaves the dearest stage cheapest.
    in_last = min(
        range(1, model.num_layers - others + 1),
        key=lambda count: max(head + count * layer, -(-(model.num_layers - count) // max(1, others)) * layer),
    )
    in_last = in_last if others else model.num_layers
    sizes = [(model.num_layers - in_last + index) // others for index in reversed(range(others))] + [in_last]
    starts = [sum(sizes[:index]) for index in range(pp_size)]
    return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]
