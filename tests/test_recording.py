"""Recorded routing against plain mlx-lm, with real daemons: whose routers chose what, for which token.

What is expected is computed without any of expertd's code: plain mlx-lm runs the same prompts, with modules in the
place of its switches that note what they are called with.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model
from numpy.typing import NDArray

import expertd
from expertd.protocol.errors import FileChanged, TraceWriteFailed
from expertd.protocol.traces import DECODE, PREFILL, Trace, part_of, read_trace, recover
from expertd.worker.load import events_of, session_of
from expertd.worker.manifest import find_switches, load_lazily, replace_module
from expertd.worker.packing import FORMATS
from expertd.worker.recording import Recorder, recording
from expertd.worker.verify import first_difference, greedy
from tests.conftest import DEADLINE_S, StartDaemon, wait_for
from tools.factory import write_checkpoint
from tools.stage import budget_for

ROOT = Path(__file__).parents[1]
FAMILIES = ("qwen3_moe", "deepseek_v3", "gpt_oss", "nemotron_h", "olmoe")
PROMPTS = [np.random.default_rng(length).integers(3, 512, length).tolist() for length in (1, 7, 40)]
ANSWER = 12
SIX_BITS = 2.0**-6
"""Half a unit in the last of six significant bits, as a share of the number, with a little for float16."""


class Noting(nn.Module):  # type: ignore[misc]
    """Stands in for a plain switch: notes what each call came with, then computes."""

    def __init__(self, switch: Any, notes: list[tuple[Any, NDArray[Any]]]) -> None:
        super().__init__()
        self._inner = switch, notes

    def __call__(self, x: Any, indices: Any) -> Any:
        switch, notes = self._inner
        notes.append((x, np.array(indices)))
        return switch(x, indices)


@dataclass(frozen=True)
class Plain:
    """Plain mlx-lm, and of each MoE layer in forward order what its switch was called with."""

    model: Any
    paths: list[str]
    notes: list[list[tuple[Any, NDArray[Any]]]]

    def forget(self) -> None:
        for notes in self.notes:
            notes.clear()

    def chosen(self) -> NDArray[Any]:
        """``[tokens, layers, top_k]`` of all calls."""
        return np.stack([np.concatenate([rows(ids) for _, ids in notes]) for notes in self.notes], axis=1)

    def logits(self, layer: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """``[tokens, experts]`` in all calls: what the router of ``layer`` thought of them, and what it chose by."""
        parent = dict(self.model.named_modules())[self.paths[layer].rpartition(".")[0]]
        router = parent.gate if "gate" in parent else parent.router
        linear = isinstance(router, nn.Linear)
        scored = [router(x) if linear else x @ router.weight.T for x, _ in self.notes[layer]]
        logits = np.concatenate([rows(np.array(each)) for each in scored])
        return logits, logits if linear else 1 / (1 + np.exp(-logits)) + np.array(router.e_score_correction_bias)


def rows(array: NDArray[Any]) -> NDArray[Any]:
    return array.reshape(-1, array.shape[-1])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``written(family)``: the folder of a small checkpoint, written once."""
    done: dict[str, Path] = {}

    def write(family: str) -> Path:
        if family not in done:
            # A row of a 4-bit slab fills a page: so a budget gives just the slots that it should.
            folder = tmp_path_factory.mktemp(family) / "model"
            done[family] = write_checkpoint(folder, family, hidden=128, expert_width=256)
        return done[family]

    return write


@pytest.fixture(scope="module")
def plain_of(written: Callable[..., Path]) -> Callable[..., Plain]:
    """``plain_of(family)``: plain mlx-lm with noting switches, loaded once and with no notes."""
    done: dict[str, Plain] = {}

    def load(family: str) -> Plain:
        if family not in done:
            paths = [layer.path for layer in load_lazily(written(family)).manifest.layers]
            model, _ = load_model(written(family))
            notes: list[list[tuple[Any, NDArray[Any]]]] = [[] for _ in paths]
            switches = {switch.path: switch.module for switch in find_switches(model)}
            for path, mine in zip(paths, notes, strict=True):
                replace_module(model, path, Noting(switches[path], mine))
            done[family] = Plain(model, paths, notes)
        done[family].forget()
        return done[family]

    return load


@pytest.fixture
def load(written: Callable[..., Path], start_daemon: StartDaemon) -> Iterator[Callable[..., Any]]:
    """``load(family, whole)``: a model in a complete pool, or in one with slots for two tokens' experts."""
    loaded: list[Any] = []

    def start(family: str = "qwen3_moe", whole: bool = True) -> Any:
        manifest = load_lazily(written(family)).manifest
        first = manifest.layers[0]
        few = str(budget_for(manifest, len(manifest.layers) * 2 * first.top_k))
        start_daemon("64MiB" if whole else few)
        model, _ = expertd.load(written(family))
        loaded.append(model)
        if whole:
            wait_for(lambda: all(pool.complete for pool in session_of(model).pools))
        return model

    yield start
    for model in loaded:
        expertd.unload(model)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "trace.npz"


def generate(model: Any, prompt: Sequence[int], count: int = ANSWER, **options: Any) -> list[int]:
    return [int(token) for token, _ in generate_step(mx.array(list(prompt)), model, max_tokens=count, **options)]


def places(found: Trace) -> dict[int, list[int]]:
    """Of each sequence its places, in the order of the file."""
    return {int(number): found.pos[found.seq_id == number].tolist() for number in np.unique(found.seq_id)}


def alike(one: NDArray[Any], other: NDArray[Any]) -> bool:
    """Whether the same experts were chosen, in whatever order."""
    return np.array_equal(np.sort(one, axis=-1), np.sort(other, axis=-1))


# -- against plain mlx-lm ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [True, False], ids=["complete", "partial"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_experts_are_those_of_plain_mlx_lm(
    family: str, whole: bool, load: Any, plain_of: Callable[..., Plain], out: Path
) -> None:
    plain, model = plain_of(family), load(family, whole)
    with recording(model, out) as recorder:
        answers = [generate(model, prompt) for prompt in PROMPTS]
    assert answers == [generate(plain.model, prompt) for prompt in PROMPTS]
    found = read_trace(out)
    assert found.info == recorder.info
    expected = plain.chosen()
    assert found.experts.dtype == np.uint8
    assert np.array_equal(found.experts, expected)
    assert found.info.agreement == [1.0] * len(plain.paths)
    # mlx-lm computes all of a prompt but its last token at once, then token after token; the last answer's too.
    lengths = [len(prompt) + ANSWER for prompt in PROMPTS]
    assert places(found) == {number: list(range(length)) for number, length in enumerate(lengths)}
    ahead = [max(0, len(prompt) - 1) for prompt in PROMPTS]
    phases = [[PREFILL] * n + [DECODE] * (length - n) for n, length in zip(ahead, lengths, strict=True)]
    assert found.phase.tolist() == [phase for each in phases for phase in each]
    passes = [[n] * (n > 0) + [1] * (length - n) for n, length in zip(ahead, lengths, strict=True)]
    flat = [width for each in passes for width in each]
    assert found.forward.tolist() == np.repeat(np.arange(len(flat)), flat).tolist()
    assert_scores(found, plain)


def assert_scores(found: Trace, plain: Plain) -> None:
    """Candidates and scores are what plain mlx-lm's routers thought of the same tokens."""
    assert found.candidates is not None
    assert found.scores is not None
    assert found.scores.dtype == np.float16
    top_k = found.info.top_k
    assert found.candidates.shape == found.scores.shape == (*found.experts.shape[:2], 2 * top_k)
    assert alike(found.candidates[..., :top_k], found.experts)
    for layer in range(found.info.layers):
        (logits, merits), candidates = plain.logits(layer), found.candidates[:, layer].astype(np.int64)
        assert all(np.unique(row).size == 2 * top_k for row in candidates)
        expected = np.take_along_axis(logits, candidates, -1)
        scores = found.scores[:, layer].astype(np.float32)
        assert np.allclose(scores, expected, rtol=SIX_BITS + 1e-3, atol=1e-6)
        assert not (found.scores[:, layer].view(np.uint16) & 0x1F).any()  # what is beyond six bits is zero
        # No other expert is better than a candidate; both halves fall (float32 may confuse those that are as good).
        ranked = np.take_along_axis(merits, candidates, -1)
        assert (np.diff(ranked[:, :top_k], axis=-1) < 1e-5).all()
        assert (np.diff(ranked[:, top_k:], axis=-1) < 1e-5).all()
        assert (ranked[:, :top_k].min(-1) >= ranked[:, top_k:].max(-1)).all()
        np.put_along_axis(merits, candidates, -np.inf, -1)
        assert (ranked.min(-1) >= merits.max(-1)).all()


def test_scores_can_be_left_out(load: Any, plain_of: Callable[..., Plain], out: Path) -> None:
    plain, model = plain_of("qwen3_moe"), load()
    with recording(model, out, scores=False):
        generate(model, PROMPTS[1])
    generate(plain.model, PROMPTS[1])
    found = read_trace(out)
    assert (found.candidates, found.scores, found.info.candidates, found.info.agreement) == (None, None, 0, [])
    assert np.array_equal(found.experts, plain.chosen())


@pytest.mark.parametrize("whole", [True, False], ids=["complete", "partial"])
def test_recording_changes_no_bit(whole: bool, load: Any, out: Path) -> None:
    model = load("qwen3_moe", whole)
    before = [greedy(model, np.array([prompt]), ANSWER) for prompt in PROMPTS]
    with recording(model, out):
        during = [greedy(model, np.array([prompt]), ANSWER) for prompt in PROMPTS]
    assert [first_difference(one, other) for one, other in zip(before, during, strict=True)] == [None, None, None]


# -- batches -----------------------------------------------------------------------------------------------------------


def answer_together(model: Any, prompts: Sequence[Sequence[int]], joining: int, **options: Any) -> list[list[int]]:
    """What mlx-lm's BatchGenerator makes of prompts; each but the first joins ``joining`` steps after the one before.

    With ``joining`` 0 they begin together.
    """
    generator = BatchGenerator(model, max_tokens=ANSWER, **options)
    tokens: dict[int, list[int]] = {}
    waiting = [list(prompt) for prompt in prompts]
    step = 0
    try:
        while waiting or any(len(mine) < ANSWER for mine in tokens.values()):
            while waiting and step >= joining * len(tokens):
                tokens.update({uid: [] for uid in generator.insert([waiting.pop(0)])})
            for response in generator.next()[1]:
                tokens[response.uid].append(response.token)
            step += 1
    finally:
        generator.close()
    return list(tokens.values())


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3", "nemotron_h"])
def test_batches_are_recorded_without_their_padding(
    family: str, load: Any, plain_of: Callable[..., Plain], out: Path
) -> None:
    plain, model = plain_of(family), load(family)
    lengths = [5, 40, 12]
    prompts = [np.random.default_rng(length).integers(3, 512, length).tolist() for length in lengths]
    with recording(model, out):
        answers = answer_together(model, prompts, 0)
    assert answers == answer_together(plain.model, prompts, 0)
    found = read_trace(out)
    # The prompts are one forward of three padded rows; forwards after it have a token of each sequence.
    first = [ids.reshape(3, 39, -1) for ids in (notes[0][1] for notes in plain.notes)]
    expected = np.stack([np.concatenate([ids[row, : lengths[row] - 1] for row in range(3)]) for ids in first], axis=1)
    count = sum(lengths) - 3
    assert np.array_equal(found.experts[:count], expected)
    assert np.array_equal(found.experts[count:], plain.chosen()[3 * 39 :])
    assert found.forward[:count].tolist() == [0] * count
    # The last of the prompt, then those of the answer, the last of which is computed too: the batch looks ahead.
    assert found.forward[count:].tolist() == np.repeat(np.arange(1, ANSWER + 2), 3).tolist()
    assert places(found) == {row: list(range(length + ANSWER)) for row, length in enumerate(lengths)}
    for row, length in enumerate(lengths):
        assert found.phase[found.seq_id == row].tolist() == [PREFILL] * (length - 1) + [DECODE] * (ANSWER + 1)
    if family == "nemotron_h":
        # mlx-lm's state-space layers take padding in, so there plain batches differ from plain single answers, too.
        return
    for row, prompt in enumerate(prompts):
        plain.forget()
        generate(plain.model, prompt)
        assert alike(found.experts[found.seq_id == row], plain.chosen())


@pytest.mark.parametrize("joining", [1, 4])
def test_prompts_in_pieces_that_join_a_batch_keep_their_places(
    joining: int, load: Any, plain_of: Callable[..., Plain], out: Path
) -> None:
    plain, model = plain_of("qwen3_moe"), load("qwen3_moe", False)
    prompts = [np.random.default_rng(length).integers(3, 512, length).tolist() for length in (5, 40, 12, 1, 2)]
    with recording(model, out):
        answer_together(model, prompts, joining, prefill_step_size=16, completion_batch_size=3)
    found = read_trace(out)
    assert [sorted(mine) for mine in places(found).values()] == [list(range(len(p) + ANSWER)) for p in prompts]
    for number, prompt in enumerate(prompts):
        plain.forget()
        generate(plain.model, prompt)
        mine = found.seq_id == number
        assert alike(found.experts[mine], plain.chosen())
        assert found.phase[mine].tolist() == [PREFILL] * (len(prompt) - 1) + [DECODE] * (ANSWER + 1)


# -- sequences ---------------------------------------------------------------------------------------------------------


def test_turns_with_one_cache_are_one_sequence(load: Any, out: Path) -> None:
    model = load()
    with recording(model, out):
        cache = make_prompt_cache(model)
        generate(model, PROMPTS[1], prompt_cache=cache)
        generate(model, PROMPTS[2], prompt_cache=cache)
        generate(model, PROMPTS[1])
        model(mx.array([PROMPTS[1]]))  # and no cache at all
        model(mx.array([PROMPTS[1]]))
    lengths = [len(PROMPTS[1]) + len(PROMPTS[2]) + 2 * ANSWER, len(PROMPTS[1]) + ANSWER, 7, 7]
    assert places(read_trace(out)) == {number: list(range(length)) for number, length in enumerate(lengths)}


def test_answers_that_take_turns_are_sequences_of_their_own(load: Any, out: Path) -> None:
    """Two loops over one model, as two threads of a program are."""
    model = load()
    with recording(model, out):
        for _ in zip(*(generate_step(mx.array(prompt), model, max_tokens=ANSWER) for prompt in PROMPTS), strict=True):
            pass
    found = read_trace(out)
    assert [sorted(mine) for mine in places(found).values()] == [list(range(len(p) + ANSWER)) for p in PROMPTS]


def test_a_batch_of_ones_own_is_as_many_sequences(load: Any, out: Path) -> None:
    model = load()
    with recording(model, out):
        greedy(model, np.random.default_rng(0).integers(3, 512, (3, 9)), 4)
    assert places(read_trace(out)) == {number: list(range(13)) for number in range(3)}


# -- beginnings and ends -----------------------------------------------------------------------------------------------


def test_a_file_is_recorded_once(load: Any, out: Path) -> None:
    model = load()
    with recording(model, out):
        generate(model, PROMPTS[1])
        with pytest.raises(TraceWriteFailed, match="being recorded already"), recording(model, out):
            pass
        generate(model, PROMPTS[1])
    with pytest.raises(TraceWriteFailed, match="is there already"), recording(model, out):
        pass
    generate(model, PROMPTS[1])
    assert read_trace(out).info.tokens == 2 * (7 + ANSWER)


def test_a_recording_in_a_recording_is_refused_or_both_are_whole(load: Any, out: Path) -> None:
    model = load()
    kinds = [type(module) for module in model.modules()]
    inner = out.with_name("inner.npz")
    refused = False
    with recording(model, out):
        generate(model, PROMPTS[1])
        try:
            with recording(model, inner):
                generate(model, PROMPTS[1])
        except TraceWriteFailed:
            refused = True
            generate(model, PROMPTS[1])
        generate(model, PROMPTS[1])
    assert [type(module) for module in model.modules()] == kinds
    whole = read_trace(out)
    assert whole.info.tokens == 3 * (7 + ANSWER)
    assert whole.scores is not None
    assert not np.isnan(whole.scores).any()
    assert refused or read_trace(inner).info.tokens == 7 + ANSWER


def test_a_recording_leaves_the_model_as_it_was(load: Any, tmp_path: Path) -> None:
    for family in ("qwen3_moe", "deepseek_v3"):
        model = load(family)
        kinds = [type(module) for module in model.modules()]
        names = [name for name, _ in tree_flatten(model.parameters())]
        for number in range(2):
            with recording(model, tmp_path / f"{family}-{number}.npz"):
                generate(model, PROMPTS[1])
                assert [name for name, _ in tree_flatten(model.parameters())] == names
                listening = [type(module) for module in model.modules()]
                assert all(issubclass(one, other) for one, other in zip(listening, kinds, strict=True))
            assert [type(module) for module in model.modules()] == kinds
        with pytest.raises(KeyError), recording(model, tmp_path / f"{family}-2.npz"):
            raise KeyError
        assert [type(module) for module in model.modules()] == kinds
        assert [name for name, _ in tree_flatten(model.parameters())] == names
        expertd.unload(model)


def test_what_is_unloaded_is_finished(load: Any, out: Path) -> None:
    model = load()
    kinds = [type(module) for module in model.modules()]
    with recording(model, out):
        generate(model, PROMPTS[1])
        expertd.unload(model)
        assert read_trace(out).info.tokens == 7 + ANSWER
    assert [type(module) for module in model.modules()] == kinds
    assert not part_of(out).exists()


def test_a_model_that_is_forgotten_leaves_a_trace(load: Any, written: Any, plain_of: Any, out: Path) -> None:
    load()  # a daemon
    model, _ = expertd.load(written("qwen3_moe"))
    events = events_of(model)
    events.recorder = Recorder(out, model, events.session.manifest)
    del events
    for _ in range(20):
        generate(model, PROMPTS[1])
    del model
    gc.collect()
    wait_for(out.exists)
    found = read_trace(out)
    plain = plain_of("qwen3_moe")
    generate(plain.model, PROMPTS[1])
    once = plain.chosen()
    # What was computed last is not read yet; before it nothing is missing.
    assert 10 * len(once) < found.info.tokens <= 20 * len(once)
    assert np.array_equal(found.experts, np.concatenate([once] * 20)[: found.info.tokens])


@pytest.mark.parametrize("whole", [True, False], ids=["complete", "partial"])
def test_layers_that_are_called_without_the_model_do_not_disturb(
    whole: bool, load: Any, plain_of: Callable[..., Plain], out: Path
) -> None:
    plain, model = plain_of("qwen3_moe"), load("qwen3_moe", whole)
    answer = generate_step(mx.array(PROMPTS[1]), model, max_tokens=ANSWER)
    with recording(model, out):
        for _ in range(ANSWER // 2):
            next(answer)
            mx.eval(model.model(mx.array([PROMPTS[2]])))
            mx.eval(model.layers[1].mlp(mx.ones((1, 3, 128))))
        rest = sum(1 for _ in answer)
    assert rest == ANSWER - ANSWER // 2
    generate(plain.model, PROMPTS[1])
    assert np.array_equal(read_trace(out).experts, plain.chosen())


def test_results_that_nobody_wants_do_not_hang(load: Any, plain_of: Callable[..., Plain], out: Path) -> None:
    plain = plain_of("qwen3_moe")
    model = load()
    with recording(model, out):
        for prompt in PROMPTS:
            model(mx.array([prompt]))
    for prompt in PROMPTS:
        mx.eval(plain.model(mx.array([prompt])))
    assert np.array_equal(read_trace(out).experts, plain.chosen())


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_another_thread_ends_a_recording_without_loss(
    family: str, load: Any, plain_of: Callable[..., Plain], out: Path
) -> None:
    """As ``expertd trace stop`` does in a process that is idle, and ``unload`` from wherever it is called."""
    plain, model = plain_of(family), load(family)
    events = events_of(model)
    events.recorder = Recorder(out, model, events.session.manifest)
    generate(model, PROMPTS[1])
    closing = threading.Thread(target=expertd.unload, args=[model])
    closing.start()
    closing.join(DEADLINE_S)
    assert not closing.is_alive()
    generate(plain.model, PROMPTS[1])
    assert np.array_equal(read_trace(out).experts, plain.chosen())


def test_a_forward_that_fails_is_not_recorded(tmp_path: Path, start_daemon: StartDaemon) -> None:
    path = write_checkpoint(tmp_path / "model", "qwen3_moe", hidden=128, expert_width=256)
    start_daemon(str(budget_for(load_lazily(path).manifest, 24)))
    model, _ = expertd.load(path)
    weights = path / "model.safetensors"
    times = weights.stat().st_atime_ns, weights.stat().st_mtime_ns
    out = tmp_path / "trace.npz"
    with recording(model, out):
        os.utime(weights, ns=(1, 1))
        with pytest.raises(FileChanged):
            generate(model, PROMPTS[2])
        os.utime(weights, ns=times)
        generate(model, PROMPTS[1])
    expertd.unload(model)
    found = read_trace(out)
    assert found.pos.tolist() == list(range(7 + ANSWER))
    assert np.unique(found.seq_id).size == 1


PROGRAM = """
import os, resource, sys
from pathlib import Path
import expertd
from expertd.protocol.traces import read_trace
from expertd.worker.recording import recording
from tests.test_recording import PROMPTS, generate
model, _ = expertd.load(sys.argv[1])
out = Path(sys.argv[2])
"""


def run_program(code: str, model: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM + code, str(model), str(out)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2 * DEADLINE_S)


@pytest.mark.skipif(sys.platform != "linux", reason="forks a process that has used MLX")
def test_a_fork_in_the_middle_corrupts_nothing(load: Any, written: Any, plain_of: Any, out: Path) -> None:
    code = """
with recording(model, out):
    generate(model, PROMPTS[2])
    for refuse in (True, False):
        child = os.fork()
        if child == 0:
            try:
                if refuse:
                    model(None)
                else:
                    expertd.unload(model)
                    del model
            except expertd.ExpertdError as error:
                os._exit(7 if error.code == "session_closed" else 8)
            os._exit(9)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (7 if refuse else 9)
        generate(model, PROMPTS[2])
"""
    load()  # a daemon
    done = run_program(code, written("qwen3_moe"), out)
    assert done.returncode == 0, done.stderr
    plain = plain_of("qwen3_moe")
    generate(plain.model, PROMPTS[2])
    assert np.array_equal(read_trace(out).experts, np.concatenate([plain.chosen()] * 3))


def test_a_disk_that_fills_ends_the_recording_and_not_the_answers(
    load: Any, written: Any, plain_of: Any, out: Path
) -> None:
    code = """
before = generate(model, PROMPTS[2])
try:
    with recording(model, out) as recorder:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))
        for _ in range(30):
            assert generate(model, PROMPTS[2]) == before
            recorder.flush()
except expertd.ExpertdError as error:
    print(error.code)
assert generate(model, PROMPTS[2]) == before
"""
    load()  # a daemon
    done = run_program(code, written("qwen3_moe"), out)
    assert (done.returncode, done.stdout) == (0, "trace_write_failed\n"), done.stderr
    assert not out.exists()
    found = read_trace(out)
    plain = plain_of("qwen3_moe")
    generate(plain.model, PROMPTS[2])
    once = plain.chosen()
    assert 0 < found.info.tokens < 30 * len(once)
    assert np.array_equal(found.experts, np.concatenate([once] * 30)[: found.info.tokens])
    assert recover(out).tokens == found.info.tokens


def test_scores_that_cannot_be_packed_end_the_recording_with_an_error(
    load: Any, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load()
    monkeypatch.delitem(FORMATS, "f")
    with pytest.raises(TraceWriteFailed, match=r"recording failed \(KeyError\('f'\)\)"), recording(model, out):
        before = generate(model, PROMPTS[2])
    assert generate(model, PROMPTS[2]) == before
    assert not out.exists()


def test_a_program_that_just_ends_leaves_a_finished_trace(load: Any, written: Any, out: Path) -> None:
    code = """
context = recording(model, out)
context.__enter__()
generate(model, PROMPTS[1])
"""
    load()  # a daemon
    done = run_program(code, written("qwen3_moe"), out)
    assert (done.returncode, done.stderr) == (0, "")
    assert read_trace(out).info.tokens == 7 + ANSWER
    assert not part_of(out).exists()
