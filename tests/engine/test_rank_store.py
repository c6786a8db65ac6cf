"""The ranks' meeting place: it does what torch asks of a store, for those who know the key, and for nobody else."""

from __future__ import annotations

import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import AuthenticationError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.distributed import DistStoreError
from torch.distributed.distributed_c10d import PrefixStore

from raydata_llm.engine import rank_line
from raydata_llm.engine.engine import Engine
from raydata_llm.engine.engine_config import EngineConfig
from raydata_llm.engine.local_ranks import LocalRanks
from raydata_llm.engine.rank_line import LineAddress, LineListener
from raydata_llm.engine.rank_store import RankStore
from raydata_llm.engine.rank_store_keeper import StoreKeeper
from raydata_llm.engine.request import Request
from raydata_llm.engine.sampling_params import SamplingParams

HOSTS = pytest.mark.parametrize("host", [None, "127.0.0.1"], ids=["one host", "over TCP"])


@contextmanager
def stores(host: str | None, count: int = 2, timeout_s: float = 20.0) -> Iterator[list[RankStore]]:
    listener = LineListener(host)
    keeper = StoreKeeper(listener)
    lines = [listener.address.dial(rank) for rank in range(count)]
    try:
        yield [RankStore(line, timeout_s) for line in lines]
    finally:
        for line in lines:
            line.connection.close()
        keeper.close()


@HOSTS
def test_ranks_see_each_others_keys_under_torchs_prefixes(host: str | None) -> None:
    with stores(host) as (one, two):
        # PrefixStore is C++, and calls the methods by the names that torch's C++ knows.
        mine, yours = PrefixStore("group/0", one), PrefixStore("group/0", two)
        value = bytes(range(256))
        mine.set("address", value)  # type: ignore[arg-type]  # bytes are taken, the stub says text
        assert yours.get("address") == value and two.get("group/0/address") == value
        assert mine.add("joined", 1) == 1 and yours.add("joined", 2) == 3
        assert yours.check(["address", "joined"]) and not yours.check(["address", "missing"])
        assert mine.compare_set("owner", "", "me") == b"me" and yours.compare_set("owner", "you", "two") == b"me"
        assert mine.num_keys() == 3 and yours.delete_key("owner") and not mine.delete_key("owner")
        yours.wait(["address"])


def test_a_key_is_waited_for_and_nobody_else_waits_meanwhile() -> None:
    with stores(None, 1) as (store,):
        found: list[bytes] = []
        waiter = threading.Thread(target=lambda: found.append(store.get("late")))
        waiter.start()
        began = time.monotonic()
        store.set("other", "x")
        assert store.check(["other"]) and time.monotonic() - began < 5
        store.set("late", b"\x00\xff")
        waiter.join(20)
        assert found == [b"\x00\xff"]


def test_a_key_that_never_comes_is_an_error_that_names_it() -> None:
    with stores(None, 1, timeout_s=0.2) as (store,):
        with pytest.raises(DistStoreError, match=r"did not set rank 1's address within 0\.2 s"):
            store.get("rank 1's address")
        with pytest.raises(DistStoreError):
            store.wait(["nothing"], timedelta(seconds=0.1))


@HOSTS
def test_a_stranger_reads_and_sets_nothing(host: str | None) -> None:
    listener = LineListener(host)
    keeper = StoreKeeper(listener)
    mine = RankStore(listener.address.dial(0), 20.0)
    mine.set("address", "10.0.0.1")
    with pytest.raises(AuthenticationError):
        LineAddress(listener.address.address, "00" * 24).dial(1)
    where = listener.address.address
    with socket.socket(socket.AF_UNIX if isinstance(where, str) else socket.AF_INET) as stranger:
        stranger.settimeout(20)
        stranger.connect(where)
        challenge = stranger.recv(200)
        assert b"CHALLENGE" in challenge and b"10.0.0.1" not in challenge
        stranger.sendall((24).to_bytes(4, "big") + b'?["set", "address", "x"]')
        # Told that it failed, and hung up on.
        rest = b""
        while data := stranger.recv(200):
            rest += data
        assert b"10.0.0.1" not in rest
    assert mine.get("address") == b"10.0.0.1" and mine.num_keys() == 1
    keeper.close()


def test_one_that_calls_and_says_nothing_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_line, "_PROOF_SECONDS", 1.0)
    listener = LineListener("127.0.0.1")
    assert not isinstance(listener.address.address, str)
    silent = [socket.create_connection(listener.address.address) for _ in range(20)]
    began = time.monotonic()
    line = listener.address.dial(3)
    assert listener.accept()[0] == 3 and time.monotonic() - began < 1.0
    # A line that was proved stays open, however long nobody speaks; those that say nothing are hung up on.
    for end in silent:
        end.settimeout(20)
        while end.recv(200):
            pass
        end.close()
    time.sleep(1.2)
    line.send(b"A")
    line.connection.close()
    listener.close()


def test_sockets_are_for_their_user_alone() -> None:
    listener = LineListener(None)
    folder = Path(str(listener.address.address)).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    listener.close()
    assert not folder.exists()


def listening_addresses(pids: set[int]) -> list[str]:
    """Local addresses, in hex, of the TCP sockets on which these processes listen."""
    inodes = set()
    for pid in pids:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            try:
                inodes.add(os.readlink(entry))
            except FileNotFoundError:
                continue
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                found.append(fields[1].partition(":")[0])
    return found


def descendants(pid: int) -> set[int]:
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


@pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="reads Linux's /proc")
def test_ranks_of_this_host_listen_on_loopback_alone(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = descendants(os.getpid())
    # What is set for jobs of many nodes does not open the ranks of one.
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    config = EngineConfig(model=str(tiny_model("llama")), device="cpu", tensor_parallel_size=2, max_model_len=64)
    others = len(listening_addresses({os.getpid()}))
    engine = Engine(config)
    try:
        ranks = descendants(os.getpid()) - before
        assert len(ranks) >= 2
        assert len(listening_addresses({os.getpid()})) == others, "the engine opens no port for ranks of its host"
        addresses = listening_addresses(ranks)
        assert addresses, "gloo listens"
        loopback = ("0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F")
        assert set(addresses) <= set(loopback), addresses
    finally:
        engine.shutdown()


@pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="reads Linux's /proc")
def test_ranks_of_other_hosts_are_heard_at_this_hosts_own_address_alone() -> None:
    before = listening_addresses({os.getpid()})
    listener = LineListener("127.0.0.1")
    opened = listening_addresses({os.getpid()})
    listener.close()
    assert len(opened) == len(before) + 1 and opened.count("0100007F") == before.count("0100007F") + 1
    # An address that this host is reached by and does not have itself, as behind NAT.
    away = LineListener("203.0.113.7")
    assert away.address.address[0] == "203.0.113.7"
    away.close()


class HostedRanks(LocalRanks):
    """Ranks that call over TCP, as those of other nodes do."""

    host = "127.0.0.1"


def test_ranks_that_call_over_tcp_write_what_one_rank_writes(tiny_model: Callable[..., Path]) -> None:
    folder = str(tiny_model("llama"))
    answers = []
    for size in (1, 2):
        config = EngineConfig(model=folder, device="cpu", tensor_parallel_size=size, max_model_len=64)
        engine = Engine(config, None, HostedRanks)
        try:
            params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
            prompt = np.asarray([5, 6, 7], dtype=np.int32)
            request = Request(request_id="0", prompt_token_ids=prompt, sampling_params=params, key=0)
            engine.add_request(request)
            outputs: list[Any] = []
            while not outputs:
                outputs += engine.step()
            answers.append(outputs[0].outputs[0].token_ids)
        finally:
            engine.shutdown()
    assert answers[0] == answers[1]
