"""The ranks' shards hold every parameter, in parts that fit together, and stages are as even as they can be."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from raydata_llm.engine.model_config import ModelConfig
from raydata_llm.engine.model_files import ModelFiles
from raydata_llm.engine.shard import ModelShard, RankPlace, check_split, cut_shape, stage_layers
from tests.engine.tiny_shape import write_tiny_shape


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    folder: Path = write_tiny_shape(tmp_path_factory.mktemp("shape"))
    return ModelFiles.open(str(folder), load_format="dummy").model_config()


def shape(plain: ModelConfig, **sizes: Any) -> ModelConfig:
    changed = dict(sizes)
    if "heads" in changed:
        changed["num_heads"], changed["num_kv_heads"] = changed.pop("heads")
    windows = (None,) * changed.get("num_layers", plain.num_layers)
    return dataclasses.replace(plain, sliding_windows=windows, **changed)


SHAPES = st.fixed_dictionaries(
    {
        "num_layers": st.integers(1, 9),
        "heads": st.sampled_from([(1, 1), (2, 2), (4, 1), (6, 2), (6, 3), (8, 2), (9, 3), (12, 4), (12, 6)]),
        "head_dim": st.sampled_from([2, 8]),
        "intermediate_size": st.sampled_from([12, 24, 60]),
        "vocab_size": st.integers(16, 70),
        "tie_word_embeddings": st.booleans(),
        "qkv_bias": st.booleans(),
        "o_bias": st.booleans(),
        "mlp_bias": st.booleans(),
    }
)


def splits(model: ModelConfig, tp_size: int, pp_size: int) -> bool:
    try:
        check_split(model, tp_size, pp_size)
    except ValueError:
        return False
    return True


def num_holders(model: ModelConfig, tp_size: int, pp_size: int) -> dict[str, np.ndarray[Any, np.dtype[np.int64]]]:
    """Of each parameter's elements: how many ranks hold them."""
    held = {name: np.zeros(whole, dtype=np.int64) for name, whole in model.parameter_shapes().items()}
    for rank in range(tp_size * pp_size):
        shard = ModelShard(model, RankPlace.of(rank, tp_size, pp_size))
        for name, cut in shard.parameters.items():
            part = held[name]
            if cut is not None:
                part = part[cut.start : cut.stop] if cut.dim == 0 else part[:, cut.start : cut.stop]
            assert part.shape == shard.shapes[name] == cut_shape(held[name].shape, cut)
            part += 1
    return held


@settings(deadline=None, max_examples=40)
@given(sizes=SHAPES, tp_size=st.sampled_from([1, 2, 3, 4, 6]), pp_size=st.integers(1, 4))
def test_all_ranks_together_hold_every_parameter(
    plain: ModelConfig, sizes: dict[str, Any], tp_size: int, pp_size: int
) -> None:
    model = shape(plain, **sizes)
    assume(splits(model, tp_size, pp_size))
    for name, count in num_holders(model, tp_size, pp_size).items():
        assert count.min() > 0, f"no rank holds all of {name}"
        per_stage = 2 if name == "model.embed_tokens.weight" and model.tie_word_embeddings and pp_size > 1 else 1
        if "norm" in name:
            assert (count == tp_size).all()
        elif ".k_proj." in name or ".v_proj." in name:
            assert (count == max(1, tp_size // model.num_kv_heads)).all()
        else:
            # A bias after a sum included: it is added once.
            assert (count == per_stage).all(), name


@settings(deadline=None, max_examples=40)
@given(sizes=SHAPES, tp_size=st.sampled_from([2, 3, 4, 6]))
def test_a_ranks_query_heads_find_their_kv_heads_on_it(plain: ModelConfig, sizes: dict[str, Any], tp_size: int) -> None:
    model = shape(plain, **sizes)
    assume(splits(model, tp_size, 1))
    group = model.num_heads // model.num_kv_heads
    for rank in range(tp_size):
        shard = ModelShard(model, RankPlace.of(rank, tp_size, 1))
        query, keys = (shard.parameters[f"model.layers.0.self_attn.{one}_proj.weight"] for one in "qk")
        assert query is not None and keys is not None
        first_query, first_key = query.start // model.head_dim, keys.start // model.head_dim
        own_group = shard.config.num_heads // shard.config.num_kv_heads
        for head in range(shard.config.num_heads):
            assert (first_query + head) // group == first_key + head // own_group


@settings(deadline=None, max_examples=40)
@given(sizes=SHAPES, pp_size=st.integers(1, 9))
def test_no_other_split_of_the_layers_has_a_cheaper_dearest_stage(
    plain: ModelConfig, sizes: dict[str, Any], pp_size: int
) -> None:
    model = shape(plain, num_layers=sizes["num_layers"], vocab_size=sizes["vocab_size"] * 400)
    assume(pp_size <= model.num_layers)
    stages = stage_layers(model, pp_size)
    assert [layer for stage in stages for layer in stage] == list(range(model.num_layers))
    assert all(len(stage) >= 1 for stage in stages)
    layer = 2 * model.hidden_size * (model.num_heads + model.num_kv_heads) * model.head_dim
    layer += 3 * model.hidden_size * model.intermediate_size

    def dearest(counts: tuple[int, ...]) -> int:
        return max(
            [*(count * layer for count in counts[:-1]), counts[-1] * layer + model.vocab_size * model.hidden_size]
        )

    cuts = itertools.combinations(range(1, model.num_layers), pp_size - 1)
    every = (tuple(np.diff([0, *cut, model.num_layers]).tolist()) for cut in cuts)
    assert dearest(tuple(map(len, stages))) == min(map(dearest, every))


@given(tp_size=st.integers(1, 5), pp_size=st.integers(1, 5))
def test_ranks_have_one_place_each_and_stages_are_neighbours(tp_size: int, pp_size: int) -> None:
    places = [RankPlace.of(rank, tp_size, pp_size) for rank in range(tp_size * pp_size)]
    assert [place.rank for place in places] == list(range(places[0].num_ranks))
    assert [place.pp_rank for place in places] == sorted(place.pp_rank for place in places)
    assert sum(place.is_first for place in places) == sum(place.is_last for place in places) == tp_size


@pytest.mark.parametrize(
    ("sizes", "split", "error"),
    [
        (
            {"num_heads": 9, "num_kv_heads": 3, "intermediate_size": 1536},
            (2, 1),
            "tensor_parallel_size=2 does not divide num_attention_heads=9, num_key_value_heads=3 .*one of 1, 3$",
        ),
        ({"num_heads": 8, "num_kv_heads": 2}, (3, 1), "tensor_parallel_size=3 .*=8.*one of 1, 2, 4, 8$"),
        ({"num_heads": 12, "num_kv_heads": 3}, (2, 1), "num_key_value_heads=3"),
        ({"num_heads": 8, "intermediate_size": 12}, (8, 1), "intermediate_size=12 .*one of 1, 2, 4$"),
        ({"num_layers": 2}, (1, 3), "pipeline_parallel_size=3 is more than the 2 layers .*choose 2 or less"),
    ],
)
def test_sizes_that_do_not_divide_are_refused_with_those_that_do(
    plain: ModelConfig, sizes: dict[str, int], split: tuple[int, int], error: str
) -> None:
    with pytest.raises(ValueError, match=error):
        check_split(shape(plain, **sizes), *split)
