"""Language models as scorers of pairs, from their own head's rows for some tokens: equal to transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from raydata_llm import LLM, build_llm_processor, vLLMEngineProcessorConfig
from tests.raydata_llm.processor_fakes import ray_session
from tests.raydata_llm.tiny_tokenizer import save_tokenizer

# As vLLM's page on Qwen3-Reranker has it; the tiny tokenizer has letters alone.
OVERRIDES: dict[str, Any] = {
    "architectures": ["Qwen3ForSequenceClassification"],
    "classifier_from_token": ["n", "y"],
    "is_original_qwen3_reranker": True,
}
QUERY, DOCUMENTS = "the quick fox", ["jumps over", "the lazy dog", "hello"]
TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}?"


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model_folder(
    request: pytest.FixtureRequest, tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("models") / "reranker"
    shutil.copytree(tiny_model("qwen3", tie_word_embeddings=request.param), folder)
    return save_tokenizer(folder)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYDATA_LLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def next_tokens(model_folder: Path) -> Callable[[str, list[str]], torch.Tensor]:
    """transformers' logits of some tokens after a text."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(model_folder)

    def of(text: str, tokens: list[str]) -> torch.Tensor:
        with torch.inference_mode():
            logits: torch.Tensor = model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1]
        return logits[tokenizer.convert_tokens_to_ids(tokens)]

    return of


def scores_of(outputs: list[Any]) -> list[float]:
    assert [output.error for output in outputs] == [None] * len(outputs)
    return [output.outputs.score for output in outputs]


def test_a_score_is_how_likely_the_model_says_yes(
    model_folder: Path, next_tokens: Callable[[str, list[str]], torch.Tensor]
) -> None:
    llm = LLM(str(model_folder), runner="pooling", hf_overrides=OVERRIDES)
    expected = [next_tokens(QUERY + text, ["n", "y"]).softmax(-1)[1].item() for text in DOCUMENTS]
    assert scores_of(llm.score(QUERY, DOCUMENTS)) == pytest.approx(expected, abs=1e-4)
    assert max(expected) - min(expected) > 1e-2
    templated = [f"<query>{QUERY}<document>{text}?" for text in DOCUMENTS]
    outputs = llm.score([QUERY] * 3, DOCUMENTS, chat_template=TEMPLATE)
    expected = [next_tokens(text, ["n", "y"]).softmax(-1)[1].item() for text in templated]
    assert scores_of(outputs) == pytest.approx(expected, abs=1e-4)
    assert [output.prompt for output in outputs] == templated
    assert [output.error is None for output in llm.score(QUERY, ["x", 5], chat_template=TEMPLATE)] == [True, False]


def test_the_rows_of_tokens_are_a_classifier(
    model_folder: Path, next_tokens: Callable[[str, list[str]], torch.Tensor]
) -> None:
    overrides = {"classifier_from_token": ["a", "b", "c"]}
    llm = LLM(str(model_folder), hf_overrides=overrides)
    for text, output in zip(DOCUMENTS, llm.classify(DOCUMENTS), strict=True):
        expected = next_tokens(text, ["a", "b", "c"]).softmax(-1).tolist()
        assert output.outputs is not None and output.outputs.probs == pytest.approx(expected, abs=1e-4)
    by_id = llm.get_tokenizer().convert_tokens_to_ids(["n", "y"])
    one, other = (
        LLM(str(model_folder), hf_overrides={"classifier_from_token": tokens, "method": "from_2_way_softmax"})
        for tokens in (by_id, ["n", "y"])
    )
    assert scores_of(one.score(QUERY, DOCUMENTS)) == scores_of(other.score(QUERY, DOCUMENTS))


def test_rewards_are_what_a_classifier_of_tokens_says(
    model_folder: Path, next_tokens: Callable[[str, list[str]], torch.Tensor]
) -> None:
    """`encode(pooling_task="token_classify")`, as vLLM replaced `LLM.reward`: the last token's is the prompt's."""
    llm = LLM(str(model_folder), hf_overrides=OVERRIDES)
    (output,) = llm.encode(QUERY, pooling_task="token_classify", pooling_params={"use_activation": False})
    no, yes = next_tokens(QUERY, ["n", "y"]).tolist()
    assert output.outputs is not None and output.outputs.data.shape == (len(output.prompt_token_ids), 1)
    assert output.outputs.data[-1].item() == pytest.approx(yes - no, abs=1e-3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"classifier_from_token": "yes"}, "classifier_from_token='yes'"),
        ({"classifier_from_token": ["n", "nowhere"]}, "'nowhere' is no token"),
        ({"classifier_from_token": [5, 99999]}, "token ids are from 0 to 1030"),
        ({"classifier_from_token": ["n"], "method": "from_2_way_softmax"}, "two tokens"),
        ({"classifier_from_token": ["n", "y"], "method": "guess"}, "method='guess'"),
    ],
)
def test_wrong_conversions_name_the_field(overrides: dict[str, Any], message: str, model_folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        LLM(str(model_folder), runner="pooling", hf_overrides=overrides)


def test_rows_of_a_processor_are_scored_alike(model_folder: Path) -> None:
    if not json.loads((model_folder / "config.json").read_text())["tie_word_embeddings"]:
        pytest.skip("the same for both")
    import ray

    rows = [{"data_1": QUERY, "data_2": text} for text in DOCUMENTS]
    llm = LLM(str(model_folder), hf_overrides=OVERRIDES)
    with ray_session():
        for template in (None, TEMPLATE):
            config = vLLMEngineProcessorConfig(
                model_source=str(model_folder),
                task_type="score",
                preserve_order=True,
                chat_template=template,
                engine_kwargs={"hf_overrides": OVERRIDES},
            )
            found = build_llm_processor(config)(ray.data.from_items(rows)).take_all()
            expected = scores_of(llm.score(QUERY, DOCUMENTS, chat_template=template))
            assert [row["score"] for row in found] == pytest.approx(expected, abs=1e-5)
