"""Arguments and results of vLLM's offline API, as its own tests and its users' scripts use them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raydata_llm import LLM, BeamSearchParams, LoRARequest, PoolerConfig, PoolingParams, SamplingParams
from raydata_llm.engine.engine_config import EngineConfig
from raydata_llm.llm_metrics import Counter, Gauge, Histogram, Vector
from tests.engine.tiny_pooling import save_pooling_model
from tests.raydata_llm.tiny_tokenizer import save_pair_tokenizer, save_tokenizer

GREEDY = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
SETTINGS: dict[str, Any] = {"dtype": "float32", "device": "cpu", "max_num_seqs": 4}
TEMPLATE = "{% for message in messages %}<{{ message.content }}>{% endfor %}"
CHAT = [{"role": "user", "content": "hello world"}]


@pytest.fixture(scope="module")
def model_folder(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    shutil.copytree(tiny_model("llama"), folder)
    return str(save_tokenizer(folder))


@pytest.fixture(scope="module")
def llm(model_folder: str) -> Iterator[LLM]:
    with LLM(model_folder, max_model_len=96, **SETTINGS) as made:
        yield made


def test_logprobs_are_lists(llm: LLM) -> None:
    params = SamplingParams(max_tokens=3, ignore_eos=True, logprobs=2, prompt_logprobs=1)
    result = llm.generate("hello world", params)[0]
    outputs, prompt = result.outputs[0].logprobs, result.prompt_logprobs
    assert isinstance(outputs, list) and isinstance(prompt, list) and prompt[0] is None
    nothing: list[Any] = [None]
    assert len(outputs + nothing) == 4 and len(nothing + prompt) == len(prompt) + 1 and outputs[:1] == [outputs[0]]
    assert len(json.dumps([list(position) for position in outputs])) > 10
    assert result.outputs[0].logprobs is outputs  # what is changed in it stays changed
    assert outputs[0][result.outputs[0].token_ids[0]].decoded_token is not None
    assert llm.generate("hello", GREEDY)[0].outputs[0].logprobs is None


@pytest.mark.parametrize("priority", [None, 0, 3, [0, 1], np.array([2, 1])])
def test_a_priority_is_taken(llm: LLM, priority: Any) -> None:
    assert len(llm.generate(["hello", "world"], GREEDY, priority=priority)) == 2
    assert len(llm.chat([CHAT, CHAT], GREEDY, priority=priority)) == 2
    assert len(llm.beam_search(["hello", "world"], BeamSearchParams(2, 2), priority=priority)) == 2
    llm.enqueue(["hello", "world"], GREEDY, None, priority)
    assert len(llm.wait_for_completion()) == 2


@pytest.mark.parametrize("priority", [[0], [0, 1, 2], "high", [0.5, 1], [None, 1]])
def test_a_priority_that_is_not_one_a_prompt_is_refused(llm: LLM, priority: Any) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: llm.generate(["hello", "world"], GREEDY, priority=priority),
        lambda: llm.chat([CHAT, CHAT], GREEDY, priority=priority),
        lambda: llm.enqueue(["hello", "world"], GREEDY, priority=priority),
        lambda: llm.enqueue_chat([CHAT, CHAT], GREEDY, priority=priority),
        lambda: llm.beam_search(["hello", "world"], BeamSearchParams(2, 2), priority=priority),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="priority"):
            call()


def test_several_greedy_outputs_are_an_error_that_says_why() -> None:
    with pytest.raises(ValueError, match=r"n=2 is not valid: n must be 1 when using greedy sampling \(temperature=0\)"):
        SamplingParams(n=2, temperature=0)
    assert SamplingParams(n=2, temperature=0.1).n == 2


def test_stops_and_bad_words_are_lists_of_the_parameters_own(llm: LLM) -> None:
    given = ["</s>"]
    # Scripts treat them as the lists that they are in vLLM; here they may be given as any sequence.
    params: Any = SamplingParams(stop=given, stop_token_ids=(5, 5, 7), bad_words="x", temperature=0)
    assert params.stop == ["</s>"] and params.stop_token_ids == [5, 7] and params.bad_words == ["x"]
    plain: Any = SamplingParams()
    assert plain.stop == plain.stop_token_ids == plain.bad_words == []
    text = llm.generate("hello", params)[0].outputs[0]
    params.stop_token_ids.append(text.token_ids[2])
    copied = params.clone()
    params.stop.append("never")
    assert given == copied.stop == ["</s>"]
    again = llm.generate("hello", params)[0].outputs[0]
    assert again.token_ids == text.token_ids[: len(again.token_ids)] and len(again.token_ids) <= 3
    assert SamplingParams.from_mapping(params.to_mapping()) == params


def test_the_prefix_cache_is_reset_with_vllms_arguments(llm: LLM) -> None:
    assert llm.reset_prefix_cache() is True
    assert llm.reset_prefix_cache(reset_running_requests=True, reset_connector=True) is True
    assert llm.reset_mm_cache() is None  # type: ignore[func-returns-value]


def test_what_becomes_of_enqueued_prompts_in_sleep(llm: LLM) -> None:
    llm.enqueue(["hello", "world"], GREEDY, use_tqdm=False)
    next(llm.as_completed())
    llm.sleep(level=1, mode="wait")
    assert llm.wake_up(tags=["weights"]) is False and llm.wake_up() is True
    assert len(llm.wait_for_completion()) == 1
    llm.enqueue(["hello", "world"], GREEDY)
    llm.sleep(0, mode="keep")
    assert llm.wake_up(tags=["scheduling"]) is True and len(llm.wait_for_completion()) == 2
    llm.enqueue(["hello", "world"], GREEDY)
    llm.sleep(level=1, mode="abort")
    llm.wake_up()
    assert llm.wait_for_completion() == []
    with pytest.raises(ValueError, match="mode='drop' is not valid: choose 'abort', 'wait' or 'keep'"):
        llm.sleep(mode="drop")  # type: ignore[arg-type]


def test_a_chat_template_of_the_llm_is_used_unless_the_call_has_one(model_folder: str, tmp_path: Path) -> None:
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    for given in (TEMPLATE, tmp_path / "template.jinja", str(tmp_path / "template.jinja")):
        with LLM(model_folder, chat_template=given, max_model_len=96, **SETTINGS) as made:
            assert made.chat(CHAT, GREEDY)[0].prompt == "<hello world>"
            assert made.chat(CHAT, GREEDY, chat_template="{{ messages[0].role }}")[0].prompt == "user"
            made.enqueue_chat([CHAT], GREEDY)
            assert made.wait_for_completion()[0].prompt == "<hello world>"
    with pytest.raises(ValueError, match="is neither a Jinja template nor a file that can be read"):
        LLM(model_folder, chat_template=tmp_path / "absent.jinja", **SETTINGS)


def test_conversations_are_tokenised_as_asked(llm: LLM) -> None:
    whole = llm.chat(CHAT, GREEDY)[0]

    def asked(**tokenization: Any) -> list[int]:
        made = llm.chat(CHAT, GREEDY, tokenization_kwargs=tokenization)[0]
        assert made.prompt == whole.prompt
        return made.prompt_token_ids

    assert asked(add_special_tokens=False) == whole.prompt_token_ids
    assert asked(add_special_tokens=True) == [1, *whole.prompt_token_ids]
    assert asked(truncation=True, max_length=3) == whole.prompt_token_ids[:3]
    llm.enqueue_chat([CHAT], GREEDY, tokenization_kwargs={"truncation": True, "max_length": 2})
    assert llm.wait_for_completion()[0].prompt_token_ids == whole.prompt_token_ids[:2]


def test_beams_may_be_more_than_sequences_run_at_once(model_folder: str, llm: LLM) -> None:
    params = BeamSearchParams(beam_width=9, max_tokens=4)
    with LLM(model_folder, max_model_len=96, **{**SETTINGS, "max_num_seqs": 1}) as narrow:
        found = narrow.beam_search(["hello world", "the quick"], params)
        assert [[one.tokens for one in output.sequences] for output in found] == [
            [one.tokens for one in output.sequences] for output in llm.beam_search(["hello world", "the quick"], params)
        ]
        assert len(found[0].sequences) == 9
        # No more than one sequence runs at once for that.
        assert len(narrow.generate(["hello"] * 5, GREEDY)) == 5
        assert narrow._live_engine().max_num_seqs == 1  # type: ignore[union-attr]
    refused = pytest.raises(ValueError, match="beam_width=9 is more than max_num_batched_tokens=4")
    with LLM(model_folder, max_model_len=64, max_num_batched_tokens=4, **SETTINGS) as narrow, refused:
        narrow.beam_search("hello", params)


@pytest.mark.parametrize(
    ("given", "made"),
    [("96", 96), ("0.1k", 100), ("1k", 1000), ("1K", 1024), (64, 64), (None, 1024), (-1, 1024), ("auto", 1024)],
)
def test_a_length_may_be_written_as_on_vllms_command_line(
    tiny_model: Callable[..., Path], given: Any, made: int
) -> None:
    settings = {**SETTINGS, "load_format": "dummy", "skip_tokenizer_init": True}
    with LLM(str(tiny_model("llama")), max_model_len=given, **settings) as llm:
        assert llm.model_config.max_model_len == made


@pytest.mark.parametrize("given", [0, -2, "0", "8 k", "8T5", "many", 1.5, True, "0.5"])
def test_a_length_that_is_none_is_refused(given: Any) -> None:
    with pytest.raises(ValueError, match=r"max_model_len=.* is not valid: give a number of tokens"):
        EngineConfig(model="m", max_model_len=given)


def test_a_length_that_fits_is_found(tiny_model: Callable[..., Path]) -> None:
    model, room = str(tiny_model("llama")), {"num_gpu_blocks_override": 5, "block_size": 16}
    settings = {**SETTINGS, "load_format": "dummy", "skip_tokenizer_init": True, **room}
    with pytest.raises(ValueError, match="max_model_len=1024 needs"):
        LLM(model, **settings)
    with LLM(model, max_model_len=-1, **settings) as llm:
        assert llm.model_config.max_model_len == 80
        fits, long = llm.generate([[5] * 70, [5] * 80], SamplingParams(max_tokens=None, ignore_eos=True))
        assert len(fits.outputs[0].token_ids) == 10 and "max_model_len=80" in str(long.error)


def output_tokens(llm: LLM) -> Histogram:
    name = "raydata_llm:request_output_tokens"
    return next(one for one in llm.get_metrics() if isinstance(one, Histogram) and one.name == name)


def test_metrics_are_of_vllms_kinds(llm: LLM) -> None:
    llm.generate(["hello world", "hello"], GREEDY)
    metrics = llm.get_metrics()
    assert {type(metric) for metric in metrics} == {Counter, Gauge, Histogram}
    before = output_tokens(llm).count
    llm.generate(["hello world", "hello", "x " * 400], GREEDY)
    tokens = output_tokens(llm)
    assert tokens.count == before + 2 == tokens.buckets["+Inf"] and tokens.sum >= 8
    assert list(tokens.buckets)[:3] == ["1", "2", "5"] and tokens.buckets["1"] <= tokens.buckets["5"] <= tokens.count
    assert Vector("name", [1, 2]).values == [1, 2]


def test_an_adapters_request_has_vllms_fields() -> None:
    request = LoRARequest("one", 3, "/adapter", base_model_name="base", load_inplace=True)
    assert (request.name, request.adapter_id, request.path) == ("one", 3, "/adapter")
    assert request == LoRARequest("one", 3, "/adapter")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("classifier")
    save_pooling_model(folder, "bert", "AutoModelForSequenceClassification", pad_token_id=0, num_labels=3)
    return str(save_pair_tokenizer(folder))


def values_of(results: list[Any]) -> Any:
    return results[0].outputs


def test_a_pooler_has_vllms_settings(classifier: str, tmp_path: Path) -> None:
    raw = PoolingParams(use_activation=False)
    plain = values_of(LLM(classifier).classify("hello", pooling_params=raw)).probs
    config = PoolerConfig(task="classify", logit_mean=0.5, logit_sigma=2.0, enable_chunked_processing=False)
    moved = values_of(LLM(classifier, pooler_config=config).classify("hello", pooling_params=raw)).probs
    assert moved == pytest.approx([(value - 0.5) / 2 for value in plain], abs=1e-6)
    save_pooling_model(tmp_path, "bert", "AutoModel", pad_token_id=0)
    settings = {"task": "embed", "dimensions": 8}
    llm = LLM(str(save_pair_tokenizer(tmp_path)), pooler_config=settings, hf_overrides={"is_matryoshka": True})
    assert values_of(llm.embed("hello")).hidden_size == 8
    assert values_of(llm.encode("hello")).data.shape == (8,)
    assert values_of(llm.embed("hello", pooling_params=PoolingParams(dimensions=4))).hidden_size == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "write"}, "task='write' is not valid"),
        ({"dimensions": 0}, "dimensions=0 is not valid"),
        ({"logit_sigma": 0}, "logit_sigma=0 is not valid: give a number other than 0"),
        ({"enable_chunked_processing": True}, "enable_chunked_processing=True is not supported"),
    ],
)
def test_a_poolers_setting_that_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"pooler_config: {message}"):
        PoolerConfig(**settings)
