"""What, beside the rows, decides a job's answers: worked out from the processor's config and the model's files.

Two jobs with the same of it continue each other. Settings that only change the speed are left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raydata_llm.model_fingerprint import model_fingerprint
from raydata_llm.resume import ResumePlan

if TYPE_CHECKING:
    from raydata_llm.config import EngineProcessorConfig

_ANSWER_SETTINGS = ("dtype", "max_model_len", "seed", "load_format", "generation_config", "hf_overrides")


def resume_plan(config: EngineProcessorConfig) -> ResumePlan | None:
    """The plan of a processor that can be resumed; None for one that cannot.

    Raises:
        ValueError: when the model's files cannot be read.
    """
    if config.resume is None:
        return None
    engine = config.engine_config()
    about: dict[str, Any] = {
        "model": model_fingerprint(config.model_source, load_format=engine.load_format),
        "version": config.resume.version,
        "engine": {name: _plain(getattr(engine, name)) for name in _ANSWER_SETTINGS},
    }
    if config.task_type != "generate":
        about["pooling"] = [config.task_type, engine.convert, repr(engine.pooler_config)]
    return ResumePlan(config=config.resume, about=about)


def _plain(value: Any) -> Any:
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(sorted(dict(value).items()))
