"""Which adapters a row may name: below the given folder, or in a place that the config allows, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from raydata_llm import EngineProcessorConfig, LoRARequest
from raydata_llm.adapter_names import place_of_adapter
from raydata_llm.adapter_source import on_this_node
from raydata_llm.processor import Processor
from raydata_llm.row_payload import RowRequest
from tests.raydata_llm.processor_chain import prepared

FOLDER = "/adapters"
LEADS_OUT = [
    "../evil",
    "a/../../evil",
    "..",
    ".",
    "",
    " .. /evil",
    "/etc/passwd",
    "//host/share",
    "a//b",
    "~root/x\n",
    "C:\\adapters",
    "c:evil",
    "a\\..\\evil",
    "s3://stranger/adapter",
    "file:///etc",
    "http://169.254.169.254/latest",
    "a::file:///etc",
    "one\0",
    "one?versionId=1",
    "%2e%2e/evil",
    "[ab]*",
]


@pytest.mark.parametrize("folder", [FOLDER, f"{FOLDER}/", "file:///adapters", "s3://bucket/adapters", "loras"])
@pytest.mark.parametrize("name", LEADS_OUT)
def test_a_row_names_nothing_outside_the_folder(name: str, folder: str) -> None:
    with pytest.raises(ValueError, match=r"model=.* dynamic_lora_loading_path=") as error:
        place_of_adapter(name, folder, ())
    assert "\n" not in str(error.value) and "allowed_lora_sources" in str(error.value)


@pytest.mark.parametrize("name", [*LEADS_OUT, "one", "org/adapter", "./one"])
def test_without_a_folder_a_row_names_nothing(name: str) -> None:
    with pytest.raises(ValueError, match=r"set dynamic_lora_loading_path to .*, or allowed_lora_sources"):
        place_of_adapter(name, "", ())


def test_names_below_the_folder_are_taken() -> None:
    for name in ("one", "team/one", "v1.2-b_c", "ein Name", "模型"):
        place = place_of_adapter(name, f"{FOLDER}/", ())
        assert (place.path, place.root) == (f"{FOLDER}/{name}", f"{FOLDER}/")
    # An address has no links to follow.
    place = place_of_adapter("one", "s3://bucket/loras", ())
    assert (place.path, place.root) == ("s3://bucket/loras/one", "")


@pytest.mark.parametrize(
    ("source", "inside", "outside"),
    [
        (
            "org",
            ["org/a", "org/b.c-d@main", "org/a@refs/pr/1"],
            ["organ/a", "other/org", "org/a/b", "org/../a", "org/a@../.."],
        ),
        ("org/a", ["org/a", "org/a@v1"], ["org/ab", "org", "org/b"]),
        (
            "/data/x",
            ["/data/x", "/data/x/a", "file:///data/x/a/b"],
            ["/data/xy", "/data", "/data/x/../y", "/data/x//a"],
        ),
        ("s3://b/x", ["s3://b/x/a", "s3://b/x"], ["s3://b/xy", "s3://b", "s3://b/x/../y", "s3://c/x/a", "gs://b/x/a"]),
        ("*", ["org/a", "/etc", "s3://anything/at/all", "../relative"], []),
    ],
)
def test_a_source_allows_itself_and_what_is_below_it(source: str, inside: list[str], outside: list[str]) -> None:
    for name in inside:
        assert place_of_adapter(name, "", (source,)).path == name
    for name in outside:
        with pytest.raises(ValueError, match="does not allow that place"):
            place_of_adapter(name, "", (source,))


def test_other_names_than_a_sources_are_below_the_folder() -> None:
    assert place_of_adapter("org/a", FOLDER, ("org",)).path == "org/a"
    assert place_of_adapter("other/a", FOLDER, ("org",)).path == f"{FOLDER}/other/a"


def test_a_config_refuses_sources_that_mean_nothing() -> None:
    lora: dict[str, Any] = {"engine_kwargs": {"enable_lora": True}}
    mistakes: list[Any] = ["org", ["a b"], ["./x"], ["/a/../b"], [""], ["org/a/b"], [3], ["/"]]
    for wrong in mistakes:
        with pytest.raises(ValueError, match="allowed_lora_sources=") as error:
            EngineProcessorConfig(model_source="m", allowed_lora_sources=wrong, **lora)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"allowed_lora_sources=.*needs engine_kwargs=\{'enable_lora': True\}"):
        EngineProcessorConfig(model_source="m", allowed_lora_sources=["org"])
    config = EngineProcessorConfig(
        model_source="m", allowed_lora_sources=["org/", "org/a", "/a", "file:///b", "s3://b/c/", "*"], **lora
    )
    assert Processor(config)._prepare_plan.adapter_sources == tuple(config.allowed_lora_sources)


def rows_of(names: list[Any], **plan: Any) -> list[RowRequest]:
    table = pa.table({"tokenized_prompt": [[5, 6]] * len(names), "model": names})
    return prepared(table, "m", skip_tokenizer=True, adapters_of="m", **plan)[0]


def test_such_rows_fail_alone_with_field_value_and_remedy() -> None:
    bad, good, plain = rows_of(["../evil", "one", None], keep_going=True, adapters=FOLDER)
    assert bad.lora_request is None and bad.error is not None
    assert bad.error.startswith("ValueError: model='../evil' is no name of an adapter below") and "(lora)" in bad.error
    assert good.error is None and good.lora_request == LoRARequest("one", lora_path=f"{FOLDER}/one")
    assert plain.error is None and plain.lora_request is None
    [address] = rows_of(["http://10.0.0.1/x"], keep_going=True, adapters="")
    assert address.lora_request is None and "allowed_lora_sources" in str(address.error)
    [hub] = rows_of(["org/a"], adapters="", adapter_sources=("org",))
    assert hub.lora_request == LoRARequest("org/a", lora_path="org/a") and hub.error is None


def test_links_lead_a_row_no_further_than_their_maker_chose(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "adapters", tmp_path / "elsewhere"
    for one in (folder / "real", elsewhere / "run7", elsewhere / "secret"):
        one.mkdir(parents=True)
        (one / "config.json").write_text("{}")
    (folder / "latest").symlink_to(elsewhere / "run7")
    (folder / "out").symlink_to(elsewhere)
    (folder / "alias").symlink_to(folder)

    def local(name: str) -> str:
        place = place_of_adapter(name, str(folder), ())
        return on_this_node(LoRARequest(name, lora_path=place.path), place.root).lora_path

    for name in ("real", "latest", "alias/real"):
        assert local(name) == str(folder / name)
    with pytest.raises(ValueError, match=r"leads out of .* through a link"):
        local("out/secret")
    # Neither is it looked for on the Hub.
    for name in ("org/none", "n" * 300):
        with pytest.raises(ValueError, match="there is no such folder on this node"):
            local(name)


def test_a_relative_folders_name_is_not_taken_for_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    place = place_of_adapter("adapter", "org", ())
    with pytest.raises(ValueError, match=r"lora_path='org/adapter' not found: there is no such folder on this node"):
        on_this_node(LoRARequest("adapter", lora_path=place.path), place.root)


def test_the_programs_own_adapters_are_wherever_it_says(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    path = str(tmp_path / "x" / "..")
    (tmp_path / "x").mkdir()
    assert on_this_node(LoRARequest("a", lora_path=path)).lora_path == path
