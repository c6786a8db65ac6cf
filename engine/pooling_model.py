"""What a pooling model is: its backbone, how its hidden states are pooled, and the head on top, if any.

Owns the reading of config.json and of sentence-transformers' files for that, and which runner a model is for. Knows no
tensors (importing it must not import torch), so a driver can check a model before any device is taken.
Invariant: a PoolingModel describes a model that `PoolingEngine` runs; everything else was refused with a ValueError.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from os.path import lexists
from pathlib import Path
from typing import Any, Literal

from raydata_llm.engine.config_fields import MOST_LABELS, bad_field, read_architectures, read_token_ids
from raydata_llm.engine.encoder_config import ENCODER_FAMILIES, EncoderConfig, linear_shapes
from raydata_llm.engine.engine_config import EngineConfig
from raydata_llm.engine.families import FAMILIES
from raydata_llm.engine.model_config import ModelConfig
from raydata_llm.engine.model_files import ModelFiles
from raydata_llm.engine.pooler_config import PoolerConfig, PoolingType
from raydata_llm.engine.pooling_params import PoolingTask
from raydata_llm.engine.regular_file import read_json_object, shown
from raydata_llm.engine.sentence_modules import SentenceLayer, SentenceModules, layer_weight_file
from raydata_llm.engine.token_head import TokenHead

Head = Literal["none", "bert", "roberta", "distilbert", "linear", "score", "reward"]
Activation = Literal["softmax", "sigmoid", "identity"]

# Reward models: labels, whether these go through an activation where nobody says, and the token that ends a step.
_REWARD_MODELS: dict[str, tuple[int, bool, int | None]] = {
    "Qwen2ForRewardModel": (1, False, None),
    "Qwen2ForProcessRewardModel": (2, True, 151651),
}
# Of checkpoints that hold more than is asked for: other heads, and buffers.
_ENCODER_EXTRAS: tuple[str, ...] = (
    "cls.",
    "lm_head.",
    "pooler.",
    "classifier.",
    "pre_classifier.",
    "qa_outputs.",
    "vocab_",
)
# A language model's head, and where it is its embedding.
LM_HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_DECODER_EXTRAS: tuple[str, ...] = ("lm_head.", "score.", "classifier.")


@dataclass(frozen=True, kw_only=True)
class PoolingModel:
    """One pooling model.

    Args:
        architecture: As config.json names it.
        backbone: What computes the hidden states.
        pooling: Which hidden state stands for the prompt.
        head: What makes class logits of it. "bert": dense, tanh, linear on [CLS]; "roberta" the same under other names;
            "distilbert": dense, ReLU, linear; "score": a linear without a bias on the pooled state; "linear": a linear
            on every token's state; "reward": linear, ReLU, linear on every token's state.
        num_labels: Of the head; 0 without one.
        activations: What classify and score put over the logits.
        normalize: Whether embeddings are scaled to length 1 where a request does not say: by the settings, else as
            sentence-transformers' files say, else yes.
        layers: What sentence-transformers' files apply to the pooled state of an embedding, in order.
        embedding_size: Values of an embedding.
        activates: Whether classes go through their activation where a request does not say.
        step_tag_id, returned_token_ids: As `PoolingParams` has them, where a request does not say.
        default_task: What is done where nobody says; None: by tokens if the model can.
        dimensions: As `PoolingParams` has it, where a request does not say.
        logit_mean, logit_sigma: Taken off class logits, and what they are divided by.
        matryoshka_dimensions: What `dimensions` may be; () for anything, None where it may not be given.
        max_seq_length: Sentence-transformers' limit of a prompt.
        token_head: What the "score" head is made of, where it is the language model's own; None if it is stored.
        joins_pairs: Whether the two texts of a pair are read as one, with nothing between.
        ties_head: Whether no language model's head is wanted but its embedding.
    """

    architecture: str
    backbone: EncoderConfig | ModelConfig
    pooling: PoolingType
    head: Head
    num_labels: int
    activations: Mapping[PoolingTask, Activation]
    normalize: bool
    layers: tuple[SentenceLayer, ...]
    embedding_size: int
    matryoshka_dimensions: tuple[int, ...] | None
    max_seq_length: int | None
    activates: bool = True
    step_tag_id: int | None = None
    returned_token_ids: tuple[int, ...] | None = None
    default_task: PoolingTask | None = None
    dimensions: int | None = None
    logit_mean: float = 0.0
    logit_sigma: float = 1.0
    token_head: TokenHead | None = None
    joins_pairs: bool = False
    ties_head: bool = True

    @classmethod
    def open(cls, files: ModelFiles, config: EngineConfig) -> PoolingModel:
        """What the files and the settings say.

        Raises:
            ValueError: for a model that the pooling engine does not run.
        """
        hf_config = files.typed_config()
        architecture = _architecture(hf_config)
        backbone = _backbone(hf_config)
        token_head = _token_head(hf_config, backbone, config.convert)
        num_labels, activates, step_tag_id = _REWARD_MODELS.get(architecture, (None, True, None))
        num_labels = num_labels if token_head is None else token_head.num_labels
        if num_labels is not None:
            hf_config = {**hf_config, "num_labels": num_labels}
        head: Head = "score" if token_head is not None else _head(architecture, backbone, config.convert)
        folder = files.path if files.kind == "folder" else None
        pooler = PoolerConfig.from_mapping(config.pooler_config)
        default: PoolingType = "cls" if isinstance(backbone, EncoderConfig) else "last"
        modules = None if folder is None else SentenceModules.read(folder, pooling=pooler.kind)
        layers = modules.layers if modules is not None and head == "none" else ()
        if modules is not None and pooler.normalizes is None:
            normalize = modules.normalizes
        else:
            normalize = pooler.normalizes is not False
        return cls(
            architecture=architecture,
            backbone=backbone,
            pooling=pooler.kind or (modules.pooling if modules is not None else None) or default,
            head=head,
            num_labels=0 if head == "none" else _num_labels(hf_config),
            activations=_activations(hf_config),
            normalize=normalize,
            layers=layers,
            embedding_size=modules.embedding_size(backbone.hidden_size) if layers and modules else backbone.hidden_size,
            activates=activates if pooler.use_activation is None else pooler.use_activation,
            step_tag_id=step_tag_id if pooler.step_tag_id is None else pooler.step_tag_id,
            returned_token_ids=None if pooler.returned_token_ids is None else tuple(pooler.returned_token_ids),
            default_task=pooler.task,
            dimensions=pooler.dimensions,
            logit_mean=pooler.logit_mean or 0.0,
            logit_sigma=pooler.logit_sigma or 1.0,
            matryoshka_dimensions=_matryoshka(hf_config),
            max_seq_length=_max_seq_length(folder),
            token_head=token_head,
            joins_pairs=token_head is not None and not hf_config.get("use_sep_token"),
            ties_head=token_head is None or _causal(hf_config).tie_word_embeddings,
        )

    @property
    def tasks(self) -> tuple[PoolingTask, ...]:
        """What may be asked of it."""
        if self.head == "none":
            return ("embed", "token_embed")
        if self.head in ("linear", "reward"):
            return ("token_classify",)
        if self.head == "score":
            return ("classify", "score", "token_classify") if self.num_labels == 1 else ("classify", "token_classify")
        return ("classify", "score") if self.num_labels == 1 else ("classify",)

    def layer_files(self, files: ModelFiles, load_format: str) -> list[tuple[SentenceLayer, ModelFiles]]:
        """The layers that have parameters, each with its own weight file.

        Args:
            files: The model's.
            load_format: `EngineConfig`'s; "dummy" needs no files.

        Raises:
            ValueError: when a weight file is not there.
        """
        found = []
        for layer in self.layers:
            if layer.parameter_shapes():
                weights = () if load_format == "dummy" else (layer_weight_file(files.path, layer, load_format),)
                own = dataclasses.replace(files, path=files.path / layer.folder, hf_config={}, weight_files=weights)
                found.append((layer, own))
        return found

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether no language model's head of its own is read."""
        return self.ties_head

    @property
    def context_length(self) -> int:
        """Tokens that a row may have; sentence-transformers' own limit only where nothing else is asked for."""
        return self.backbone.context_length

    def max_model_len(self, config: EngineConfig) -> int:
        """Tokens of a prompt at most, by the settings or sentence-transformers' files.

        Raises:
            ValueError: for more than the model was made for.
        """
        longest, wanted = self.context_length, config.max_model_len
        if wanted is None or config.fits_model_len:
            return min(self.max_seq_length or longest, longest)
        if wanted > longest:
            raise ValueError(f"max_model_len={wanted} is more than the model was made for: give {longest} or less")
        return wanted

    @property
    def initializer_range(self) -> float:
        """Standard deviation of dummy weights."""
        return self.backbone.initializer_range

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """All parameters' shapes, the head's included."""
        shapes = self.backbone.parameter_shapes()
        if self.token_head is None:
            return shapes | self.head_shapes()
        return shapes if self.ties_head else shapes | {LM_HEAD: (self.backbone.vocab_size, self.backbone.hidden_size)}

    def head_shapes(self) -> dict[str, tuple[int, ...]]:
        """The head's own parameters."""
        hidden, labels = self.backbone.hidden_size, self.num_labels
        if self.head == "none":
            return {}
        if self.head == "score":
            return {"score.weight": (labels, hidden)}
        if self.head == "reward":
            return linear_shapes("score.0", hidden, hidden) | linear_shapes("score.2", labels, hidden)
        dense = {"bert": "pooler.dense", "roberta": "classifier.dense", "distilbert": "pre_classifier"}.get(self.head)
        last = "classifier.out_proj" if self.head == "roberta" else "classifier"
        if self.head == "linear" and isinstance(self.backbone, ModelConfig):
            last = "score"
        return ({} if dense is None else linear_shapes(dense, hidden, hidden)) | linear_shapes(last, labels, hidden)

    def parameter_name(self, stored: str) -> str | None:
        """Our name of a checkpoint's tensor; None of one that is not needed here."""
        if isinstance(self.backbone, EncoderConfig):
            name, extras = self.backbone.parameter_name(stored), _ENCODER_EXTRAS
        else:
            own = stored.startswith(("model.", *_DECODER_EXTRAS))
            name, extras = stored if own else f"model.{stored}", _DECODER_EXTRAS
        if name in self.parameter_shapes():
            return name
        is_buffer = name.endswith((".position_ids", ".token_type_ids", "rotary_emb.inv_freq"))
        return None if is_buffer or name.startswith(extras) else name


def choose_runner(config: EngineConfig, files: ModelFiles) -> Literal["generate", "pooling"]:
    """What a model is for: what the settings say, else what its files are made for."""
    if config.runner != "auto":
        return "pooling" if config.runner == "pooling" else "generate"
    if config.convert in ("embed", "classify") or _is_encoder(files.hf_config):
        return "pooling"
    if TokenHead.from_hf(files.hf_config) is not None:
        return "pooling"
    if files.kind == "folder" and lexists(files.path / "modules.json"):
        return "pooling"
    is_pooling = any(_is_pooling(name) for name in read_architectures(files.hf_config))
    return "pooling" if is_pooling else "generate"


def _is_encoder(hf_config: Mapping[str, Any]) -> bool:
    model_type = hf_config.get("model_type")
    return isinstance(model_type, str) and model_type in ENCODER_FAMILIES


def _is_pooling(architecture: str) -> bool:
    return architecture.endswith(("ForSequenceClassification", "ForTokenClassification", "Model"))


def _architecture(hf_config: Mapping[str, Any]) -> str:
    architectures = read_architectures(hf_config)
    return architectures[0] if architectures else shown(hf_config.get("model_type"))


def _backbone(hf_config: Mapping[str, Any]) -> EncoderConfig | ModelConfig:
    model_type = hf_config.get("model_type")
    if _is_encoder(hf_config):
        return EncoderConfig.from_hf(hf_config)
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(sorted((*FAMILIES, *ENCODER_FAMILIES)))
        raise ValueError(
            f"model_type={shown(model_type)} in the model's config is not supported for pooling: choose {known}"
        )
    if hf_config.get("is_causal") is False or hf_config.get("use_bidirectional_attention"):
        name = "is_causal" if hf_config.get("is_causal") is False else "use_bidirectional_attention"
        raise bad_field(name, hf_config[name], "decoders that attend both ways are not run; choose another model")
    return dataclasses.replace(_causal(hf_config), tie_word_embeddings=True)


def _causal(hf_config: Mapping[str, Any]) -> ModelConfig:
    """The decoder as the language model that it was."""
    return ModelConfig.from_hf({**hf_config, "architectures": [FAMILIES[hf_config["model_type"]].architecture]})


def _token_head(hf_config: Mapping[str, Any], backbone: EncoderConfig | ModelConfig, convert: str) -> TokenHead | None:
    head = None if convert == "embed" else TokenHead.from_hf(hf_config)
    if head is not None and isinstance(backbone, EncoderConfig):
        raise bad_field("classifier_from_token", list(head.tokens), "an encoder has no next token; leave it out")
    return head


def _head(architecture: str, backbone: EncoderConfig | ModelConfig, convert: str) -> Head:
    if convert == "embed":
        return "none"
    if architecture in _REWARD_MODELS and isinstance(backbone, ModelConfig):
        return "reward"
    if architecture.endswith("ForTokenClassification"):
        return "linear"
    if architecture.endswith("ForSequenceClassification") or convert == "classify":
        if isinstance(backbone, ModelConfig):
            return "score"
        heads: dict[str, Head] = {"bert": "bert", "distilbert": "distilbert"}
        return heads.get(backbone.family.model_type, "roberta")
    return "none"


def _num_labels(hf_config: Mapping[str, Any]) -> int:
    named = hf_config.get("id2label")
    labels = hf_config.get("num_labels") or (len(named) if isinstance(named, Mapping | list) else 0) or 2
    if isinstance(labels, bool) or not isinstance(labels, int) or not 1 <= labels <= MOST_LABELS:
        raise bad_field("num_labels", labels, f"it must be a whole number from 1 to {MOST_LABELS}")
    return labels


def _activations(hf_config: Mapping[str, Any]) -> dict[PoolingTask, Activation]:
    """By vLLM's rules: classes follow `problem_type`, pairs follow sentence-transformers' word for cross-encoders."""
    default: Activation = "sigmoid" if _num_labels(hf_config) == 1 else "softmax"
    by_problem: dict[Any, Activation] = {"regression": "identity", "multi_label_classification": "sigmoid"}
    problem = hf_config.get("problem_type")
    classes = by_problem.get(problem, default) if isinstance(problem, str) else default
    nested = hf_config.get("sentence_transformers")
    named = nested.get("activation_fn") if isinstance(nested, Mapping) else None
    named = named or hf_config.get("sbert_ce_default_activation_function")
    return {"classify": classes, "token_classify": classes, "score": _named_activation(named, default)}


def _named_activation(name: Any, default: Activation) -> Activation:
    if name is None:
        return default
    known: dict[str, Activation] = {"Identity": "identity", "Sigmoid": "sigmoid", "Softmax": "softmax"}
    activation = known.get(str(name).rpartition(".")[2])
    if activation is None:
        raise bad_field("activation_fn", name, f"the engine runs torch's {', '.join(known)}")
    return activation


def _matryoshka(hf_config: Mapping[str, Any]) -> tuple[int, ...] | None:
    dimensions = hf_config.get("matryoshka_dimensions")
    if dimensions:
        return read_token_ids({"matryoshka_dimensions": dimensions}, "matryoshka_dimensions")
    return () if hf_config.get("is_matryoshka") else None


def _max_seq_length(folder: Path | None) -> int | None:
    path = None if folder is None else folder / "sentence_bert_config.json"
    if path is None or not lexists(path):
        return None
    length = read_json_object(path).get("max_seq_length")
    return length if isinstance(length, int) and length > 0 else None
