"""From hidden states to results: pooling, the head, activation, normalisation.

Owns these formulas, in float32 whatever the backbone's dtype. Knows no queue: packed rows and their parameters in,
groups of results out.

Shapes: R rows, T tokens, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from raydata_llm.engine.encoder import take_linear
from raydata_llm.engine.packed_rows import PackedRows
from raydata_llm.engine.pooler_config import PoolingType
from raydata_llm.engine.pooling_model import Activation, PoolingModel
from raydata_llm.engine.pooling_params import EMBED_TASKS, TOKEN_TASKS, PoolingParams
from raydata_llm.engine.sentence_modules import LayerActivation, SentenceLayer

_ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "identity": lambda logits: logits,
}
_LAYER_ACTIVATIONS: dict[LayerActivation, Callable[[torch.Tensor], torch.Tensor]] = {
    "identity": lambda x: x,
    "tanh": torch.tanh,
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
}


@dataclass(frozen=True)
class PooledGroup:
    """Results of the rows that asked alike.

    Args:
        rows: Which rows of the batch.
        values: float32 [rows, values], or the rows' tokens one after the other, [tokens, values].
        lens: Tokens of each row that have a result, where there is one a token.
    """

    rows: list[int]
    values: torch.Tensor
    lens: list[int] | None


class Pooler:
    """A model's pooling and head.

    Args:
        model: What it is.
        parameters: The head's, of `model.head_shapes()`.
        layers: The parameters of each of `model.layers`.
    """

    def __init__(
        self,
        model: PoolingModel,
        parameters: Mapping[str, torch.Tensor],
        layers: Mapping[SentenceLayer, Mapping[str, torch.Tensor]],
    ) -> None:
        self._model = model
        self._layers = layers
        self._parameters = {name: parameters[name].float() for name in model.head_shapes()}

    def pool(self, hidden: torch.Tensor, rows: PackedRows, params: Sequence[PoolingParams]) -> list[PooledGroup]:
        """Results of all rows.

        Args:
            hidden: [T, hidden] of the backbone.
            rows: Whose they are.
            params: Of each row, complete with a task.
        """
        asked: dict[PoolingParams, list[int]] = {}
        for row, one in enumerate(params):
            asked.setdefault(one, []).append(row)
        return [self._pool_alike(hidden, rows, indexes, one) for one, indexes in asked.items()]

    def _pool_alike(
        self, hidden: torch.Tensor, rows: PackedRows, indexes: list[int], params: PoolingParams
    ) -> PooledGroup:
        assert params.task is not None, "the engine fills it in"
        by_token = params.task in TOKEN_TASKS
        lens: list[int] | None = None
        if by_token:
            states, lens = self._token_states(hidden, rows, indexes, params.step_tag_id)
        else:
            states = self._pooled(hidden, rows, indexes)
        if params.task == "embed":
            for layer in self._model.layers:
                states = _apply_layer(layer, self._layers.get(layer, {}), states)
        if params.task in EMBED_TASKS:
            values = _embedding(states, params)
        else:
            values = (self._logits(states) - self._model.logit_mean) / self._model.logit_sigma
            if params.returned_token_ids is not None:
                values = values[..., list(params.returned_token_ids)]
            if params.activates:
                values = _ACTIVATIONS[self._model.activations[params.task]](values)
        return PooledGroup(indexes, values, lens)

    def _pooled(self, hidden: torch.Tensor, rows: PackedRows, indexes: list[int]) -> torch.Tensor:
        pooled = pooled_states(hidden, rows, self._model.pooling)
        return pooled if len(indexes) == rows.num_rows else pooled[indexes]

    def _token_states(
        self, hidden: torch.Tensor, rows: PackedRows, indexes: list[int], step_tag_id: int | None
    ) -> tuple[torch.Tensor, list[int]]:
        """The states of these rows' tokens, or of those alone that end a step, and how many each row has."""
        lens = rows.lens
        if step_tag_id is None and len(indexes) == rows.num_rows:
            return hidden.float(), lens
        if step_tag_id is None:
            chosen = [hidden[rows.starts[row] : rows.starts[row + 1]] for row in indexes]
            return torch.cat(chosen).float(), [lens[row] for row in indexes]
        ends = [np.flatnonzero(rows.ids[rows.starts[row] : rows.starts[row + 1]] == step_tag_id) for row in indexes]
        places = np.concatenate([rows.starts[row] + one for row, one in zip(indexes, ends, strict=True)])
        return hidden[torch.from_numpy(places).to(hidden.device)].float(), [len(one) for one in ends]

    def _logits(self, states: torch.Tensor) -> torch.Tensor:
        head = self._model.head
        if head == "bert":
            states = torch.tanh(take_linear(self._parameters, "pooler.dense")(states))
        elif head == "roberta":
            states = torch.tanh(take_linear(self._parameters, "classifier.dense")(states))
        elif head == "distilbert":
            states = F.relu(take_linear(self._parameters, "pre_classifier")(states))
        elif head == "reward":
            states = F.relu(take_linear(self._parameters, "score.0")(states))
        last = next(name for name in reversed(self._parameters) if name.endswith(".weight"))
        return take_linear(self._parameters, last.removesuffix(".weight"))(states)


def pooled_states(hidden: torch.Tensor, rows: PackedRows, pooling: PoolingType) -> torch.Tensor:
    """One state a row, float32 [R, hidden]: the first token's, the last's, or the mean of all."""
    if pooling == "mean":
        lens = torch.tensor(rows.lens, device=hidden.device, dtype=torch.float32)
        sums = torch.zeros(rows.num_rows, hidden.shape[1], device=hidden.device)
        return sums.index_add_(0, rows.row_of, hidden.float()) / lens[:, None]
    places = rows.starts[:-1] if pooling == "cls" else [end - 1 for end in rows.starts[1:]]
    return hidden[torch.tensor(places, device=hidden.device)].float()


def _apply_layer(layer: SentenceLayer, parameters: Mapping[str, torch.Tensor], states: torch.Tensor) -> torch.Tensor:
    """One of sentence-transformers' modules; float32 [R, in_features] to [R, out_features]."""
    if layer.kind == "normalize":
        return F.normalize(states, dim=-1)
    if layer.kind == "layer_norm":
        return F.layer_norm(states, (layer.in_features,), parameters["norm.weight"], parameters["norm.bias"])
    linear = F.linear(states, parameters["linear.weight"], parameters.get("linear.bias"))
    values = _LAYER_ACTIVATIONS[layer.activation](linear)
    if not layer.residual:
        return values
    projection = parameters.get("residual.weight")
    return values + (states if projection is None else F.linear(states, projection))


def _embedding(states: torch.Tensor, params: PoolingParams) -> torch.Tensor:
    # A matryoshka embedding is cut before it is scaled: what is left has length 1.
    states = states if params.dimensions is None else states[..., : params.dimensions]
    return F.normalize(states, dim=-1) if params.normalizes else states
