"""Looking at traces: prompts, statistics and replay against brute force; ``expertd trace record | show``."""

from __future__ import annotations

import functools
import json
import signal
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import mlx_lm
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertd.clients.traces.prompts import read_prompts
from expertd.clients.traces.replay import Events, belady, events_of, hit_rates, lru, next_uses
from expertd.clients.traces.statistics import hottest, hottest_share, jaccard, reuse, uses
from expertd.protocol.errors import TraceInvalid
from expertd.protocol.traces import DECODE, Trace, TraceFile, TraceInfo, part_of, read_trace
from tests.conftest import DEADLINE_S, StartDaemon, wait_for
from tools.factory import write_checkpoint

DEVELOPMENT_TRACE = Path(__file__).parents[1].parent / "shared" / "traces" / "gpt_oss_20b_dev.npz"

untimed = settings(deadline=None)  # the machine may be busy

# -- prompts -----------------------------------------------------------------------------------------------------------


def test_prompts_are_a_line_each_or_json(tmp_path: Path) -> None:
    text = tmp_path / "prompts.txt"
    text.write_text('\nhello\n\n  two words \n{"prompt": "as it is"}\nGrüße\n', encoding="utf-8")
    assert read_prompts(text) == ["hello", "  two words ", '{"prompt": "as it is"}', "Grüße"]
    lines = tmp_path / "prompts.jsonl"
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    written = [{"prompt": "one\ntwo", "more": 3}, {"messages": chat}]
    lines.write_text("\n\n".join(json.dumps(each) for each in written))
    assert read_prompts(lines) == ["one\ntwo", chat]


@untimed
@given(text=st.text(min_size=1))
def test_any_text_can_be_a_prompt_in_json(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """As programs write it that leave text as it is; a line of a .jsonl file ends with a line feed and nothing else."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    lines = [json.dumps({"prompt": text}, ensure_ascii=not text.isprintable()), json.dumps({"prompt": "next"})]
    path.write_bytes("\n".join(lines).encode("utf-8"))
    assert read_prompts(path) == [text, "next"]


def test_separators_of_unicode_do_not_end_a_line_of_json(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    for separator in ("\u2028", "\u2029", "\x85"):
        path.write_text(json.dumps({"prompt": f"one{separator}two"}, ensure_ascii=False), encoding="utf-8")
        assert read_prompts(path) == [f"one{separator}two"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"", "has no prompts: write one on each line"),
        ("a.txt", b"\n  \n", "has no prompts"),
        ("a.txt", b"\xff\xfe", "could not be read"),
        ("a.jsonl", b'{"prompt": "a"}\nhello\n', r"a\.jsonl, line 2 is no JSON"),
        ("a.jsonl", b'\n{"prompt": ""}\n', r"a\.jsonl, line 2 is neither"),
        ("a.jsonl", b'{"prompt": 3}\n', "line 1 is neither"),
        ("a.jsonl", b'{"messages": []}\n', "line 1 is neither"),
        ("a.jsonl", b'{"messages": ["hi"]}\n', "line 1 is neither"),
        ("a.jsonl", b'["prompt"]\n', "line 1 is neither"),
        ("a.jsonl", b"[" * 100_000, "line 1 is no JSON"),
    ],
    ids=["empty", "blank", "not utf-8", "no json", "empty text", "number", "no messages", "text", "list", "deep"],
)
def test_bad_prompts_are_refused_by_line(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TraceInvalid, match=words):
        read_prompts(tmp_path / name)


def test_prompts_that_are_not_there_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.txt"):
        with pytest.raises(TraceInvalid, match="could not be read"):
            read_prompts(path)


# -- statistics --------------------------------------------------------------------------------------------------------


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    """Some tokens of a few sequences, in any order; the tokens of one forward are neighbours."""
    layers, experts = draw(st.integers(1, 3)), draw(st.integers(2, 9))
    top_k = draw(st.integers(1, min(3, experts)))
    count = draw(st.integers(1, 30))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    chosen = rng.permuted(np.tile(np.arange(experts, dtype=np.uint8), (count, layers, 1)), axis=-1)[..., :top_k]
    places = [(seq, pos) for seq in range(draw(st.integers(1, 3))) for pos in range(count)]
    order = rng.permutation(len(places)) if draw(st.booleans()) else np.arange(len(places))
    seq_id, pos = np.array([places[place] for place in order[:count]], np.uint32).T
    forward = np.cumsum(rng.random(count) < 0.6).astype(np.uint32)
    info = TraceInfo(layers=layers, experts=experts, top_k=top_k, tokens=count)
    return Trace(info, chosen, None, None, seq_id, pos, forward, (rng.random(count) < 0.7).astype(np.uint8))


@untimed
@given(trace=traces())
def test_uses_are_counted(trace: Trace) -> None:
    counts = uses(trace)
    assert counts.shape == (trace.info.layers, trace.info.experts)
    for layer in range(trace.info.layers):
        for expert in range(trace.info.experts):
            assert counts[layer, expert] == sum(expert in row[layer] for row in trace.experts.tolist())


@untimed
@given(trace=traces())
def test_reuse_is_that_of_neighbours_in_a_sequence(trace: Trace) -> None:
    rows = {(int(s), int(p)): n for n, (s, p) in enumerate(zip(trace.seq_id, trace.pos, strict=True))}
    found = reuse(trace)
    assert found.shape == (trace.info.layers,)
    for layer in range(trace.info.layers):
        shares = []
        for (seq, pos), row in rows.items():
            before = rows.get((seq, pos - 1))
            if before is not None and trace.phase[row] == DECODE:
                mine, theirs = (set(trace.experts[n, layer].tolist()) for n in (row, before))
                shares.append(len(mine & theirs) / len(mine))
        if shares:
            assert found[layer] == pytest.approx(np.mean(shares))
        else:
            assert np.isnan(found[layer])


@untimed
@given(one=traces(), other=traces())
def test_hottest_quarters_are_the_most_used(one: Trace, other: Trace) -> None:
    counts = uses(one)
    quarters = hottest(counts)
    for layer, (quarter, share) in enumerate(zip(quarters, hottest_share(counts), strict=True)):
        assert len(quarter) == max(1, one.info.experts // 4)
        rest = [int(n) for expert, n in enumerate(counts[layer]) if expert not in quarter]
        assert min(int(counts[layer, expert]) for expert in quarter) >= max(rest)
        assert share == pytest.approx(sum(int(counts[layer, expert]) for expert in quarter) / counts[layer].sum())
    assert jaccard(counts, counts) == [1.0] * one.info.layers
    if other.info.layers == one.info.layers and other.info.experts == one.info.experts:
        for share, mine, theirs in zip(jaccard(counts, uses(other)), quarters, hottest(uses(other)), strict=True):
            assert share == len(mine & theirs) / len(mine | theirs)


# -- replay ------------------------------------------------------------------------------------------------------------

event_lists = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True), min_size=1, max_size=40)


def slow_lru(events: Events, capacity: int) -> int:
    """Hits, with a clock: each block has the time of its last use, and in an event the first choice is the latest."""
    last: dict[int, int] = {}
    now = hits = 0
    for event in events:
        hits += sum(block in last for block in event)
        while last.keys() - set(event) and len(last.keys() | set(event)) > capacity:
            del last[min(last.keys() - set(event), key=last.__getitem__)]
        for block in reversed(event):
            now += 1
            last[block] = now
    return hits


def slow_belady(events: Events, capacity: int) -> int:
    """Hits: evicts what is used farthest from now, never a block of the same event, and admits every miss."""
    cache: set[int] = set()
    hits = 0
    for now, event in enumerate(events):
        hits += len(cache & set(event))

        def due(block: int, now: int = now) -> int:
            return next((n for n in range(now + 1, len(events)) if block in events[n]), len(events))

        while cache - set(event) and len(cache | set(event)) > capacity:
            cache.remove(max(sorted(cache - set(event)), key=due))
        cache |= set(event)
    return hits


def best_possible(events: Events, capacity: int) -> int:
    """Hits of the best of all ways to evict: all of them are tried."""
    @functools.cache
    def best(now: int, cache: frozenset[int]) -> int:
        if now == len(events):
            return 0
        event = frozenset(events[now])
        others = cache - event
        kept = min(len(others), capacity - len(event))
        return len(cache & event) + max(
            best(now + 1, event | frozenset(chosen)) for chosen in combinations(sorted(others), kept)
        )

    return best(0, frozenset())


@untimed
@given(events=event_lists, capacity=st.integers(4, 12))
def test_lru_is_that_of_a_clock(events: Events, capacity: int) -> None:
    assert lru(events, capacity) == slow_lru(events, capacity)


@untimed
@given(events=event_lists, capacity=st.integers(4, 12))
def test_belady_evicts_what_is_used_again_last(events: Events, capacity: int) -> None:
    assert belady(events, capacity) == slow_belady(events, capacity)


@untimed
@given(
    events=st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=3, unique=True), min_size=1, max_size=12),
    capacity=st.integers(3, 5),
)
def test_nothing_is_better_than_belady(events: Events, capacity: int) -> None:
    assert belady(events, capacity) == best_possible(events, capacity) >= lru(events, capacity)


@untimed
@given(events=event_lists, capacity=st.integers(1, 3))
def test_events_that_do_not_fit_hit_no_more_than_a_pool_holds(events: Events, capacity: int) -> None:
    known = len({block for event in events for block in event})
    looked = sum(map(len, events))
    for hits in (lru(events, capacity), belady(events, capacity)):
        assert 0 <= hits <= looked - known  # each block misses once at least
        assert hits <= sum(min(len(event), capacity) for event in events)


@untimed
@given(events=event_lists)
def test_next_uses_are_the_next(events: Events) -> None:
    for now, (event, following) in enumerate(zip(events, next_uses(events), strict=True)):
        for block, due in zip(event, following, strict=True):
            later = [n for n in range(now + 1, len(events)) if block in events[n]]
            assert due == later[0] if later else due > len(events)


@untimed
@given(trace=traces(), tokens=st.one_of(st.none(), st.integers(1, 30)))
def test_events_are_layers_of_forwards(trace: Trace, tokens: int | None) -> None:
    expected: dict[tuple[int, int], set[int]] = {}
    for row in range(min(len(trace.pos), tokens or len(trace.pos))):
        for layer in range(trace.info.layers):
            blocks = {layer * trace.info.experts + int(expert) for expert in trace.experts[row, layer]}
            expected.setdefault((int(trace.forward[row]), layer), set()).update(blocks)
    events = events_of(trace, tokens)
    assert [set(event) for event in events] == [expected[key] for key in sorted(expected)]
    assert all(len(event) == len(set(event)) for event in events)
    looked = sum(map(len, events))
    for rate in hit_rates(trace, (0.25, 1.0), tokens):
        total = trace.info.layers * trace.info.experts
        assert rate["blocks"] == max(1, round(rate["fraction"] * total))
        assert rate["lru"] == lru(events, int(rate["blocks"])) / looked
        assert rate["belady"] == belady(events, int(rate["blocks"])) / looked


@pytest.mark.skipif(not DEVELOPMENT_TRACE.exists(), reason="the traces for development are not in ../shared/traces")
def test_the_figures_that_are_known_are_reproduced() -> None:
    """Those of the README beside the file."""
    rates = hit_rates(read_trace(DEVELOPMENT_TRACE), (0.15, 0.25), 20_000)
    found = [(rate["blocks"], round(100 * rate["lru"], 1), round(100 * rate["belady"], 1)) for rate in rates]
    assert found == [(115, 43.7, 67.9), (192, 60.6, 82.4)]


# -- the command line --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("views") / "small", "qwen3_moe")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("hello\nhow are you\n")
    return path


def expertd(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "expertd.clients.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def refused(done: subprocess.CompletedProcess[str], status: int, code: str, words: str) -> None:
    """One sentence, with the code, and the exit status."""
    assert done.returncode == status, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "started a daemon" not in line]
    assert line.startswith("expertd: ")
    assert line.endswith(f" [{code}]")
    assert words in line


def test_record_and_show(model_path: Path, prompts: Path, tmp_path: Path, start_daemon: StartDaemon) -> None:
    start_daemon()
    raw, chat = tmp_path / "raw.npz", tmp_path / "chat.npz"
    options: list[str | Path] = ["--prompts", prompts, "--max-tokens", "16"]
    done = expertd("trace", "record", model_path, "-o", raw, "--raw", *options)
    assert (done.returncode, done.stderr) == (0, "prompts\n"), "how far it is, where that is no terminal"
    done_too = expertd("trace", "record", model_path, "-o", chat, "--parallel", "2", "--no-scores", *options)
    assert (done_too.returncode, done_too.stderr) == (0, "prompts\n")
    _, tokenizer = mlx_lm.load(str(model_path))[:2]
    texts = prompts.read_text().splitlines()
    as_chat = [[{"role": "user", "content": text}] for text in texts]
    lengths = [len(tokenizer.encode(text)) for text in texts]
    in_template = [len(tokenizer.apply_chat_template(each, add_generation_prompt=True)) for each in as_chat]
    for path, expected in ((raw, lengths), (chat, in_template)):
        found = read_trace(path)
        assert found.finished
        # The last token of an answer is computed or not, as mlx-lm pleases; in a batch that looks ahead it is.
        computed = np.bincount(found.seq_id).tolist()
        assert all(0 <= count - length - 15 <= 1 for count, length in zip(computed, expected, strict=True))
    assert read_trace(chat).scores is None
    assert f"{raw}: {read_trace(raw).info.tokens} tokens (" in done.stdout

    shown = json.loads(expertd("trace", "show", raw, "--json", "--against", chat).stdout)
    found = read_trace(raw)
    assert (shown["model"], shown["layers"], shown["experts"], shown["top_k"]) == ("small", 3, 16, 4)
    assert (shown["tokens"], shown["sequences"], shown["finished"]) == (found.info.tokens, 2, True)
    assert shown["agreement"] == [1.0, 1.0, 1.0]
    counts, other = uses(found), uses(read_trace(chat))
    for layer, row in enumerate(shown["by_layer"]):
        assert row["layer"] == layer
        assert row["reuse"] == pytest.approx(reuse(found)[layer], abs=1e-4)
        assert row["hottest_quarter"] == pytest.approx(hottest_share(counts)[layer], abs=1e-4)
        assert row["unused"] == int((counts[layer] == 0).sum())
        assert row["jaccard"] == pytest.approx(jaccard(counts, other)[layer], abs=1e-4)
    expected_rates = hit_rates(found, [rate["fraction"] for rate in shown["hits"]])
    for one, two in zip(shown["hits"], expected_rates, strict=True):
        assert one == pytest.approx(two, abs=1e-4)

    picture = tmp_path / "picture.png"
    told = expertd("trace", "show", raw, "--against", chat, "--picture", picture)
    assert (told.returncode, told.stderr) == (0, "")
    assert "small: 3 layers x 16 experts, 4 a token" in told.stdout
    assert told.stdout.count(" %") >= 2 * 3 + 3 * len(expected_rates)
    assert told.stdout.endswith(f"picture: {picture}\n")
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert "not finished" not in told.stdout
    assert json.loads(expertd("trace", "show", raw, "--json", "--replay", "0").stdout)["hits"] == []


def test_what_is_recorded_can_be_repeated(
    model_path: Path, prompts: Path, tmp_path: Path, start_daemon: StartDaemon
) -> None:
    start_daemon()
    made = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        done = expertd(
            "trace", "record", model_path, "--prompts", prompts, "-o", tmp_path / f"{name}.npz", "--max-tokens", "8",
            "--temperature", "2.0", "--seed", str(seed),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        made.append(read_trace(tmp_path / f"{name}.npz").experts)
    assert np.array_equal(made[0], made[1])
    assert not np.array_equal(made[0], made[2])


def test_an_interrupted_recording_is_a_finished_trace(
    model_path: Path, prompts: Path, tmp_path: Path, start_daemon: StartDaemon
) -> None:
    start_daemon()
    out = tmp_path / "out.npz"
    command = [sys.executable, "-m", "expertd.clients.cli", "trace", "record", str(model_path), "--prompts",
               str(prompts), "-o", str(out), "--max-tokens", "100000"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:

        def some() -> bool:
            try:
                return read_trace(out).info.tokens > 300
            except TraceInvalid:
                return False

        wait_for(some)
        so_far = expertd("trace", "show", out, "--replay", "10")
        assert "(not finished: what its recorder has written so far)" in so_far.stdout
        process.send_signal(signal.SIGINT)
        told, said = process.communicate(timeout=DEADLINE_S)
    found = read_trace(out)
    assert process.returncode == 130
    assert told.startswith(f"{out}: {found.info.tokens:,} tokens (")
    assert said.splitlines()[-1] == "expertd: interrupted; the trace has what was computed until then"
    assert "Traceback" not in said
    assert found.finished
    assert found.info.tokens > 300
    assert found.pos.tolist() == list(range(found.info.tokens))
    assert not part_of(out).exists()


def test_record_refuses_what_cannot_be(
    model_path: Path, prompts: Path, tmp_path: Path, start_daemon: StartDaemon
) -> None:
    start_daemon()
    out = tmp_path / "out.npz"
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    done = expertd("trace", "record", model_path, "--prompts", bad, "-o", out)
    refused(done, 2, "trace_invalid", f"{bad}, line 2 is neither")
    done = expertd("trace", "record", model_path, "--prompts", tmp_path / "none", "-o", out)
    refused(done, 2, "trace_invalid", "could not be read")
    done = expertd("trace", "record", model_path, "--prompts", prompts, "-o", tmp_path / "out.txt")
    refused(done, 1, "trace_write_failed", "ends in .npz")
    done = expertd("trace", "record", model_path, "--prompts", prompts, "-o", tmp_path / "nowhere" / "out.npz")
    refused(done, 1, "trace_write_failed", f"no folder {tmp_path / 'nowhere'}")
    out.write_bytes(b"mine")
    done = expertd("trace", "record", model_path, "--prompts", prompts, "-o", out)
    refused(done, 1, "trace_write_failed", f"{out} is there already")
    assert out.read_bytes() == b"mine"
    assert not part_of(out).exists()


def saved(path: Path, layers: int = 2, experts: int = 8) -> Path:
    """A small finished trace."""
    rng = np.random.default_rng(layers)
    chosen = rng.permuted(np.tile(np.arange(experts, dtype=np.uint8), (20, layers, 1)), axis=-1)[..., :2]
    file = TraceFile(path, TraceInfo(layers=layers, experts=experts, top_k=2))
    count = np.arange(20, dtype=np.uint32)
    file.append(
        {"experts": chosen, "seq_id": count // 10, "pos": count % 10, "forward": count, "phase": np.ones(20, np.uint8)}
    )
    file.finish()
    return path


@pytest.mark.parametrize(
    ("arguments", "status", "code", "words"),
    [
        (["none.npz"], 2, "trace_invalid", "could not be read"),
        (["text.npz"], 2, "trace_invalid", "is no routing trace"),
        (["good.npz", "--against", "text.npz"], 2, "trace_invalid", "is no routing trace"),
        (["good.npz", "--against", "other.npz"], 2, "trace_invalid", "do not compare"),
        (["good.npz", "--picture", "a.gift"], 1, "trace_write_failed", "could not be written"),
        (["good.npz", "--picture", "nowhere/a.png"], 1, "trace_write_failed", "could not be written"),
    ],
    ids=["none", "text", "against text", "against another model", "kind of picture", "folder of the picture"],
)
def test_show_refuses_what_cannot_be(
    arguments: list[str], status: int, code: str, words: str, tmp_path: Path
) -> None:
    saved(tmp_path / "good.npz")
    saved(tmp_path / "other.npz", layers=3)
    (tmp_path / "text.npz").write_text("hello\n")
    given_paths = [each if each.startswith("--") else tmp_path / each for each in arguments]
    refused(expertd("trace", "show", *given_paths), status, code, words)


def test_one_token_can_be_shown(tmp_path: Path) -> None:
    """Nothing comes again in it, and old files tell no model."""
    path, picture = tmp_path / "old.npz", tmp_path / "old.svg"
    one: dict[str, Any] = {"seq_id": np.zeros(1, np.uint32), "pos": np.zeros(1, np.uint32)}
    np.savez(path, experts=np.array([[[1, 2]], [[0, 3]]], np.uint8)[:1], **one)
    done = expertd("trace", "show", path, "--picture", picture)
    assert (done.returncode, done.stderr) == (0, "")
    assert "model     not named: 1 layers x 3 experts, 2 a token" in done.stdout
    assert picture.read_text().startswith("<?xml")
    shown = json.loads(expertd("trace", "show", path, "--json").stdout)
    assert shown["by_layer"][0]["reuse"] is None
    assert [rate["lru"] for rate in shown["hits"]] == [0.0] * len(shown["hits"])


def test_recover_says_what_there_is(tmp_path: Path) -> None:
    path = tmp_path / "rest.npz"
    refused(expertd("trace", "recover", path), 2, "trace_invalid", "could not be read")
    part_of(path).write_text("hello\n" * 9)
    refused(expertd("trace", "recover", path), 2, "trace_invalid", "not the rest of a recording")


def test_every_command_of_trace_explains_itself() -> None:
    listed = expertd("trace", "--help").stdout
    for command in ("record", "start", "stop", "show", "recover"):
        assert f"\n  {command} " in listed
        done = expertd("trace", command, "--help")
        assert done.returncode == 0
        assert done.stdout.startswith("Usage: expertd trace ")
