"""A processor's operators, to be looked at: what each does, what it reads, what Ray Data LLM calls its parts.

Owns names and descriptions alone; how the operators run is the processor's matter.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One operator of a processor.

    Args:
        name: "prepare", "replica" or "finish".
        does: What happens in it.
        reads: The columns that it looks for in a row.
        peers: Ray Data LLM's names of the stages that lie in it.
    """

    name: str
    does: str
    reads: Mapping[str, str] = field(default_factory=dict)
    peers: tuple[str, ...] = ()


_STAGES = (
    Stage(
        name="prepare",
        does="preprocess, chat template and tokeniser, as tasks",
        reads={
            "messages": "a conversation, for the chat template",
            "prompt": "text, where there are no messages or the chat template stage is off",
            "tokenized_prompt": "token ids, where there is neither or the tokenise stage is off",
            "prompt_embeds": "a matrix, [tokens, hidden_size]; with engine_kwargs={'enable_prompt_embeds': True}",
            "sampling_params": "optional: a dict of sampling parameters",
            "tools, chat_template_kwargs": "optional: function schemas, and a dict of the chat template's variables",
            "data_1, data_2": "the two texts of a pair, for task_type='score'",
            "pooling_params, tokenization_kwargs": "optional: dicts, for pooling models",
        },
        peers=("PrepareMultimodalStage", "PrepareImageStage", "ChatTemplateStage", "TokenizeStage"),
    ),
    Stage(
        name="replica",
        does="a dispatcher, and the engines that it feeds, each in an actor",
        peers=("vLLMEngineStage", "SGLangEngineStage"),
    ),
    Stage(name="finish", does="detokeniser and postprocess, as tasks", peers=("DetokenizeStage",)),
)


def all_stages() -> OrderedDict[str, Stage]:
    """The operators by name, in order."""
    return OrderedDict((stage.name, stage) for stage in _STAGES)


def find_stage(name: str) -> Stage:
    """One operator, by its name or by that of a stage of Ray Data LLM that lies in it.

    Raises:
        ValueError: for an unknown name.
    """
    for stage in _STAGES:
        if name == stage.name or name in stage.peers:
            return stage
    raise ValueError(f"name={name!r} is not a stage: choose one of {', '.join(all_stages())}")


def input_columns() -> str:
    """The columns that a row may have for the first operator, a line each."""
    lines = "".join(f"\n  {name}: {meaning}" for name, meaning in _STAGES[0].reads.items())
    return f"Columns that preprocess returns, or the dataset has:{lines}"
