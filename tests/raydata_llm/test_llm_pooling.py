"""LLM's pooling methods: equal to transformers, a bad prompt as one error; vLLM's examples run as they are."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import transformers

import raydata_llm
from raydata_llm import LLM, LoRARequest, PoolingParams
from raydata_llm.engine.pooling_engine import PoolingEngine
from tests.engine.tiny_pooling import save_pooling_model
from tests.raydata_llm.tiny_tokenizer import save_pair_tokenizer, save_tokenizer

TEXTS = [
    "Hello, my name is",
    "The president of the United States is",
    "The capital of France is",
    "The future of AI is",
    "a",
    "x " * 60,
]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYDATA_LLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Any]]:
    """`make_model(family, kind, **settings)`: a folder with a tokenizer, and transformers' model."""

    def make(family: str, kind: str = "AutoModel", **settings: Any) -> tuple[Path, Any]:
        folder = tmp_path_factory.mktemp(family)
        # The tokenizer's <pad> is 0; a text has none, or RoBERTa's positions would leave it out.
        model = save_pooling_model(folder, family, kind, **{"pad_token_id": 0, **settings})
        return save_pair_tokenizer(folder), model

    return make


@pytest.fixture(scope="module")
def cross_encoder(make_model: Callable[..., tuple[Path, Any]]) -> tuple[LLM, Any]:
    folder, model = make_model("bert", "AutoModelForSequenceClassification", num_labels=1)
    return LLM(str(folder)), model


@pytest.fixture(scope="module")
def tiny_embedder(make_model: Callable[..., tuple[Path, Any]]) -> LLM:
    return LLM(str(make_model("bert", is_matryoshka=True)[0]))


@pytest.mark.model
def test_minilms_embeddings_equal_transformers(embedder: Path) -> None:
    texts = [*TEXTS, "Ein Mann ißt.", "long " * 250, "two\nlines"]
    llm = LLM(model=str(embedder), dtype="float32")
    got = np.array([output.outputs.embedding for output in llm.embed(texts) if output.outputs is not None])
    auto: Any = transformers.AutoModel
    model, tokenizer = auto.from_pretrained(embedder), transformers.AutoTokenizer.from_pretrained(embedder)
    wanted = []
    for text in texts:
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        wanted.append(torch.nn.functional.normalize(states.mean(0), dim=-1).numpy())
    assert np.allclose((got**2).sum(1), 1, atol=1e-5)
    assert (got * np.array(wanted)).sum(1).min() >= 0.9999
    assert np.abs(got - np.array(wanted)).max() < 1e-5


@pytest.mark.model
def test_minilm_takes_as_many_tokens_as_sentence_transformers_says(embedder: Path) -> None:
    llm = LLM(model=str(embedder))
    whole, cut = llm.embed(["long " * 300] * 2, pooling_params=[PoolingParams(), {"truncate_prompt_tokens": -1}])
    assert whole.error is not None and "max_model_len=256" in whole.error and not whole.outputs
    assert len(cut.prompt_token_ids) == 256 and cut.prompt_token_ids[-1] == 102, "cut by the tokenizer: [SEP] stays"


def test_a_cross_encoders_scores_equal_transformers(cross_encoder: tuple[LLM, Any]) -> None:
    llm, model = cross_encoder
    tokenizer = llm.get_tokenizer()
    outputs = llm.score("the quick brown fox", TEXTS[:5])
    assert [type(output).__name__ for output in outputs] == ["ScoringRequestOutput"] * 5
    for text, output in zip(TEXTS, outputs, strict=False):
        encoded = tokenizer("the quick brown fox", text, return_tensors="pt", return_token_type_ids=True)
        with torch.no_grad():
            wanted = model(**encoded).logits.sigmoid().item()
        assert output.outputs is not None and abs(output.outputs.score - wanted) < 1e-4
        assert output.prompt_token_ids == encoded["input_ids"][0].tolist()


def test_pairs_are_one_with_several_or_each_with_its_own(cross_encoder: tuple[LLM, Any]) -> None:
    llm, _ = cross_encoder
    spread = llm.score("hello", ["world", {"prompt": "fox"}])
    paired = llm.score(["hello", "hello"], ["world", "fox"])
    assert [output.outputs for output in spread] == [output.outputs for output in paired]
    assert [output.prompt for output in spread] == [("hello", "world"), ("hello", "fox")]
    with pytest.raises(ValueError, match="2 texts and data_2 3"):
        llm.score(["a", "b"], ["a", "b", "c"])
    good, bad = llm.score("hello", ["world", 7])
    assert good.outputs is not None and spread[0].outputs is not None
    assert abs(good.outputs.score - spread[0].outputs.score) < 1e-6
    assert bad.error is not None and "data_2=7 is a int" in bad.error


@pytest.mark.parametrize("limit", [1, 3, 1000])
def test_documents_of_pairs_are_cut_before_they_are_scored(cross_encoder: tuple[LLM, Any], limit: int) -> None:
    llm, _ = cross_encoder
    query, document = "the quick brown fox", TEXTS[1] * 2
    tokenizer = llm.get_tokenizer()
    ends = tokenizer(document, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    kept = document[: ends[limit - 1][1]] if limit <= len(ends) else document
    params = PoolingParams(extra_kwargs={"max_tokens_per_doc": limit})
    (cut,) = llm.score(query, document, pooling_params=params)
    (wanted,) = llm.score(query, kept)
    assert cut.prompt == (query, kept) and cut.prompt_token_ids == wanted.prompt_token_ids
    assert cut.outputs is not None and wanted.outputs is not None and cut.outputs.score == wanted.outputs.score
    (short,) = llm.score(query, kept, pooling_params={"extra_kwargs": {"max_tokens_per_query": 1}})
    assert short.prompt is not None and len(short.prompt[0]) < len(query)


def test_an_embedder_cuts_documents_too(tiny_embedder: LLM) -> None:
    (cut,) = tiny_embedder.score(TEXTS[0], TEXTS[1] * 9, pooling_params={"extra_kwargs": {"max_tokens_per_doc": 2}})
    (whole,) = tiny_embedder.score(TEXTS[0], TEXTS[1] * 9)
    assert len(cut.prompt_token_ids) < len(whole.prompt_token_ids) and cut.outputs != whole.outputs
    with pytest.raises(ValueError, match="data_2 has a list, which extra_kwargs of pooling_params cannot cut"):
        tiny_embedder.score(TEXTS[0], [[5, 6]], pooling_params={"extra_kwargs": {"max_tokens_per_doc": 2}})
    with pytest.raises(ValueError, match=r"extra_kwargs\['max_tokens_per_doc'\] does not fit task='embed'"):
        tiny_embedder.embed(TEXTS[0], pooling_params={"extra_kwargs": {"max_tokens_per_doc": 2}})


def test_an_embedders_scores_are_cosines(tiny_embedder: LLM) -> None:
    first, *others = (output.outputs.embedding for output in tiny_embedder.embed(TEXTS[:4]) if output.outputs)
    scores = [output.outputs.score for output in tiny_embedder.score(TEXTS[0], TEXTS[1:4]) if output.outputs]
    np.testing.assert_allclose(scores, [np.dot(first, other) for other in others], atol=1e-6)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_class_probabilities_equal_transformers(family: str, make_model: Callable[..., tuple[Path, Any]]) -> None:
    folder, model = make_model(family, "AutoModelForSequenceClassification", num_labels=3)
    llm = LLM(str(folder), task="classify")
    for text, output in zip(TEXTS[:5], llm.classify(TEXTS[:5]), strict=True):
        with torch.no_grad():
            wanted = model(torch.tensor([llm.get_tokenizer()(text)["input_ids"]])).logits[0].softmax(-1)
        assert output.outputs is not None and output.outputs.num_classes == 3
        np.testing.assert_allclose(output.outputs.probs, wanted.numpy(), atol=1e-4)
    with pytest.raises(ValueError, match="convert='embed'"):
        llm.embed("hello")
    assert LLM(str(folder), convert="embed").embed("hello")[0].outputs is not None


def test_encode_gives_each_tokens_hidden_state(make_model: Callable[..., tuple[Path, Any]]) -> None:
    folder, model = make_model("roberta")
    llm = LLM(str(folder))
    outputs = llm.encode(TEXTS[:5], PoolingParams(normalize=False), pooling_task="token_embed")
    for output in outputs:
        with torch.no_grad():
            states = model(torch.tensor([output.prompt_token_ids])).last_hidden_state[0]
        assert output.outputs is not None
        torch.testing.assert_close(output.outputs.data, states, atol=1e-4, rtol=0)


def test_every_form_of_prompt_gives_the_same_embedding(tiny_embedder: LLM) -> None:
    ids = tiny_embedder.get_tokenizer()("hello world")["input_ids"]
    forms: list[Any] = ["hello world", {"prompt": "hello world"}, {"prompt_token_ids": ids}, ids, np.array(ids)]
    outputs = tiny_embedder.embed(forms)
    assert [output.prompt_token_ids for output in outputs] == [ids] * 5
    assert [output.outputs for output in outputs] == [outputs[0].outputs] * 5
    assert [output.prompt for output in outputs] == ["hello world"] * 2 + [None] * 3


def test_a_bad_prompt_is_one_error_and_the_others_finish(tiny_embedder: LLM) -> None:
    bad: list[Any] = [5, "x " * 500, {"text": "x"}, "\ud800", [], [7, 100_000]]
    outputs = tiny_embedder.embed([TEXTS[0], *bad, TEXTS[1]], use_tqdm=False)
    assert [output.error is None for output in outputs] == [True, *[False] * len(bad), True]
    assert outputs[2].error is not None and "truncate_prompt_tokens" in outputs[2].error
    mixed = tiny_embedder.embed(TEXTS[:2], pooling_params=[{"dimension": 3}, {"dimensions": 3}])
    assert mixed[0].error is not None and "dimension" in mixed[0].error
    assert mixed[1].outputs is not None and mixed[1].outputs.hidden_size == 3


def test_arguments_that_are_wrong_for_all_prompts_raise(tiny_embedder: LLM, tiny_model: Callable[..., Path]) -> None:
    wrong: list[tuple[Callable[[], object], str]] = [
        (lambda: tiny_embedder.embed(TEXTS, pooling_params=[{}]), "1 entries for 6 prompts"),
        (lambda: tiny_embedder.embed(TEXTS, pooling_params={"task": "classify"}), "task='classify'"),
        (lambda: tiny_embedder.embed(TEXTS, tokenization_kwargs={"padding": True}), "padding"),
        (lambda: tiny_embedder.generate(TEXTS), "pooling model"),
        (lambda: tiny_embedder.encode(TEXTS, pooling_task=cast(Any, "plugin")), "pooling_task='plugin'"),
        (lambda: LLM("/nowhere", task="guess"), "task='guess'"),
    ]
    for call, message in wrong:
        with pytest.raises(ValueError, match=message):
            call()
    folder = tiny_model("llama")
    generating = LLM(str(folder), skip_tokenizer_init=True, max_model_len=64)
    with pytest.raises(ValueError, match="runner='pooling'"):
        generating.embed([[5, 6]])


def test_adapters_of_pooling_models_are_refused_by_name(tiny_embedder: LLM) -> None:
    assert tiny_embedder.embed("hello", lora_request=None)[0].error is None
    for pool in (tiny_embedder.embed, tiny_embedder.encode, tiny_embedder.classify):
        with pytest.raises(ValueError, match="lora_request is not supported, as pooling models take no adapters"):
            pool("hello", lora_request=LoRARequest("a", 1, "/a"))
    with pytest.raises(ValueError, match="lora_request is not supported"):
        tiny_embedder.score("a", "b", lora_request=LoRARequest("a", 1, "/a"))


def test_texts_are_cut_as_tokenization_kwargs_say(tiny_embedder: LLM) -> None:
    (output,) = tiny_embedder.embed("x " * 500, tokenization_kwargs={"truncation": True, "max_length": 7})
    assert len(output.prompt_token_ids) == 7 and output.prompt_token_ids[-1] == 2
    (output,) = tiny_embedder.embed("x " * 500, tokenization_kwargs={"truncation": True})
    assert len(output.prompt_token_ids) == 90


def test_an_interrupted_call_returns_what_is_done(tiny_embedder: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    import signal

    assert threading.current_thread() is threading.main_thread()
    step = PoolingEngine.step

    def step_and_interrupt(engine: PoolingEngine) -> Any:
        outputs = step(engine)
        signal.raise_signal(signal.SIGINT)
        return outputs

    monkeypatch.setattr(PoolingEngine, "step", step_and_interrupt)
    # 4096 tokens of the first batch are done, the others are not.
    outputs = tiny_embedder.embed([[7] * 80] * 100)
    done = [output for output in outputs if output.error is None]
    assert len(done) == 51 and all(output.outputs for output in done)
    assert all("interrupted" in output.error for output in outputs if output.error)
    monkeypatch.undo()
    assert tiny_embedder.embed("hello")[0].error is None, "nothing was left in the engine"


def test_a_decoder_is_an_embedder_when_asked(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(tiny_model("qwen3"), folder)
    save_tokenizer(folder)
    llm = LLM(str(folder), runner="pooling", max_model_len=256)
    auto: Any = transformers.AutoModel
    model = auto.from_pretrained(folder, dtype=torch.float32)
    for output in llm.embed(TEXTS):
        with torch.no_grad():
            state = model(torch.tensor([output.prompt_token_ids])).last_hidden_state[0, -1]
        wanted = torch.nn.functional.normalize(state, dim=-1)
        assert output.outputs is not None
        np.testing.assert_allclose(output.outputs.embedding, wanted.numpy(), atol=1e-5)


# The examples of vLLM's page on pooling models, with the model's name as a placeholder; only the import is changed.
EXAMPLES = {
    "encode": """
from vllm import LLM
llm = LLM(model=MODEL, runner="pooling")
(output,) = llm.encode("Hello, my name is", pooling_task="token_embed")
data = output.outputs.data
print(f"Data: {data!r}")
""",
    "embed": """
from vllm import LLM
llm = LLM(model=MODEL, runner="pooling")
(output,) = llm.embed("Hello, my name is")
embeds = output.outputs.embedding
print(f"Embeddings: {embeds!r} (size={len(embeds)})")
""",
    "classify": """
from vllm import LLM
llm = LLM(model=MODEL, runner="pooling")
(output,) = llm.classify("Hello, my name is")
probs = output.outputs.probs
print(f"Class Probabilities: {probs!r} (size={len(probs)})")
""",
    "score": """
from vllm import LLM
llm = LLM(model=MODEL, runner="pooling")
(output,) = llm.score(
    "What is the capital of France?",
    "The capital of Brazil is Brasilia.",
)
score = output.outputs.score
print(f"Score: {score}")
""",
    "matryoshka": """
from vllm import LLM, PoolingParams
llm = LLM(
    model=MODEL,
    runner="pooling",
    trust_remote_code=True,
)
outputs = llm.embed(
    ["Follow the white rabbit."],
    pooling_params=PoolingParams(dimensions=32),
)
print(outputs[0].outputs)
""",
    "overrides": """
from vllm import LLM, PoolerConfig, PoolingParams
llm = LLM(
    model=MODEL,
    runner="pooling",
    convert="embed",
    pooler_config=PoolerConfig(seq_pooling_type="MEAN", use_activation=False),
    hf_overrides={"is_matryoshka": True, "matryoshka_dimensions": [32]},
)
(output,) = llm.embed(["x"], pooling_params=PoolingParams(dimensions=32))
print(output.outputs.hidden_size)
""",
    "older task names": """
from vllm import LLM
llm = LLM(model=MODEL, task="embed", override_pooler_config={"pooling_type": "MEAN", "normalize": True})
(output,) = llm.embed("Hello, my name is")
print(f"Embeddings: {output.outputs.embedding!r}")
""",
}
PRINTS = {
    "encode": "Data: tensor",
    "embed": "(size=48)",
    "classify": "(size=1)",
    "score": "Score: 0.",
    "matryoshka": "EmbeddingOutput(hidden_size=32)",
    "overrides": "32",
    "older task names": "Embeddings: [",
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_vllms_examples_run_with_only_the_import_changed(
    name: str, make_model: Callable[..., tuple[Path, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    has_head = name in ("classify", "score")
    settings: dict[str, Any] = {"num_labels": 1} if has_head else {"is_matryoshka": True}
    kind = "AutoModelForSequenceClassification" if has_head else "AutoModel"
    folder, _ = make_model("bert", kind, **settings)
    code = EXAMPLES[name].replace("from vllm", "from raydata_llm")
    exec(compile(code, name, "exec"), {"MODEL": str(folder)})
    assert PRINTS[name] in capsys.readouterr().out


def test_the_names_are_vllms() -> None:
    names = ["PoolingOutput", "PoolingRequestOutput", "EmbeddingOutput", "EmbeddingRequestOutput"]
    names += ["ClassificationOutput", "ClassificationRequestOutput", "ScoringOutput", "ScoringRequestOutput"]
    assert [getattr(raydata_llm, name).__name__ for name in names] == names
