"""``expertd chat``: what is said, what stays computed, and the command in a terminal and in a pipe."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import mlx_lm
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.generate import stream_generate

import expertd
from expertd.clients.terminal.conversation import (
    Command,
    Conversation,
    SaveFailed,
    parse,
    printable,
    read_message,
)
from expertd.protocol.errors import ContextLengthExceeded, RequestInvalid
from expertd.protocol.paths import Home
from expertd.worker.manifest import load_lazily
from expertd.worker.template import encode_chat
from expertd.worker.turns import Reuse, Turns, reuse
from tools.factory import write_checkpoint
from tools.stage import ask_status, budget_for, running_daemon, temporary_home
from tools.terminal import CTRL_C, CTRL_D, Terminal

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "models" / "demo"
QUESTIONS = ["What does os.path.join do?", "And what is the module socket for?", "Write the function clamp."]
ENDLESS = "Write a function for me"
"""A question that the demo model answers without end."""


# -- what is said ------------------------------------------------------------------------------------------------------


def test_messages_come_in_turns_after_the_system_s() -> None:
    said = Conversation("Be kind.")
    said.ask("One?")
    said.answered("One.")
    said.ask("Two?")
    system, one, answer = (
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "One."},
    )
    assert said.messages == [system, one, answer, {"role": "user", "content": "Two?"}]
    said.take_back()
    said.take_back()  # the last word is the model's: there is nothing to take back
    assert said.messages == [system, one, answer]
    said.system = ""
    assert said.messages == [one, answer]
    said.reset()
    assert said.messages == []


@pytest.mark.parametrize(
    ("line", "typed"),
    [
        ("hello\n", "hello"),
        ("  hello  ", "hello"),
        ("", ""),
        ("/quit\n", Command("quit", "")),
        ("/system  Be kind. \n", Command("system", "Be kind.")),
        (" /usr/bin is what?", "/usr/bin is what?"),
    ],
)
def test_a_line_is_a_message_or_a_command(line: str, typed: Command | str) -> None:
    assert parse(line) == typed


def lines_of(*lines: str) -> Callable[[], str]:
    rest = iter(lines)

    def more() -> str:
        try:
            return next(rest)
        except StopIteration:
            raise EOFError from None

    return more


@pytest.mark.parametrize(
    ("first", "more", "message"),
    [
        ("one", ["unread"], "one"),
        ("one\\", ["two\\", "three", "unread"], "one\ntwo\nthree"),
        ("one\\", [], "one"),
        ('"""', ["one", "", "two", '"""', "unread"], "one\n\ntwo"),
        ('"""one', ['two"""', "unread"], "one\ntwo"),
        ('"""one"""', ["unread"], "one"),
        ('"""', ["one"], "one"),
    ],
)
def test_a_message_may_have_several_lines(first: str, more: list[str], message: str) -> None:
    assert read_message(first, lines_of(*more)) == message


def test_a_chat_is_saved_as_text_or_as_messages_and_nothing_is_overwritten(tmp_path: Path) -> None:
    said = Conversation("Be kind.")
    said.ask("One?")
    said.answered("Eins.")
    said.save(tmp_path / "chat.txt", "demo")
    assert (tmp_path / "chat.txt").read_text() == "system:\nBe kind.\n\nuser:\nOne?\n\nassistant:\nEins.\n"
    said.save(tmp_path / "chat.json", "demo")
    assert json.loads((tmp_path / "chat.json").read_text()) == {"model": "demo", "messages": said.messages}
    with pytest.raises(SaveFailed, match=r"chat\.txt exists already; choose another name"):
        said.save(tmp_path / "chat.txt", "demo")
    with pytest.raises(SaveFailed, match="cannot be written"):
        said.save(tmp_path / "nowhere" / "chat.txt", "demo")


def test_a_terminal_is_not_steered_by_what_a_model_says() -> None:
    assert printable("a\x1b[2Jb\x07\r\n\tc\x9b\x7fé█") == "a[2Jb\n\tcé█"


# -- what stays computed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cached", "prompt", "can_drop", "found"),
    [
        ([], [1, 2, 3], True, Reuse(0, 0)),
        ([1, 2], [1, 2, 3], True, Reuse(2, 0)),
        ([1, 2], [1, 2, 3], False, Reuse(2, 0)),
        ([1, 2, 9, 9], [1, 2, 3], True, Reuse(2, 2)),
        ([1, 2, 9, 9], [1, 2, 3], False, Reuse(0, 4)),
        ([9, 2, 3], [1, 2, 3], True, Reuse(0, 3)),
        ([1, 2, 3], [1, 2, 3], True, Reuse(2, 1)),
        ([1, 2, 3, 4], [1, 2, 3], True, Reuse(2, 2)),
        ([1, 2, 3], [1, 2, 3], False, Reuse(0, 3)),
    ],
)
def test_what_of_a_cache_serves_a_prompt(cached: list[int], prompt: list[int], can_drop: bool, found: Reuse) -> None:
    assert reuse(cached, prompt, can_drop) == found


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2), min_size=1), st.booleans())
@settings(max_examples=300, deadline=None)
def test_what_is_kept_is_the_longest_common_beginning(cached: list[int], prompt: list[int], can_drop: bool) -> None:
    kept, dropped = reuse(cached, prompt, can_drop)
    assert kept + dropped == len(cached)
    assert kept < len(prompt) and cached[:kept] == prompt[:kept]
    longer = kept + 1 < len(prompt) and kept < len(cached) and cached[kept] == prompt[kept]
    assert not longer or not can_drop
    assert can_drop or not (kept and dropped)


class Chat:
    """Turns over a model with their text, as the command has them."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.turns = Turns(model, tokenizer)
        self.said = Conversation()
        self._tokenizer = tokenizer

    def ask(self, text: str, tokens: int = 100, **options: Any) -> list[int]:
        """The tokens of the answer."""
        self.said.ask(text)
        answer = list(self.turns.answer(self.prompt(), tokens, **options))
        self.said.answered("".join(response.text for response in answer))
        return [response.token for response in answer]

    def prompt(self) -> list[int]:
        return encode_chat(self._tokenizer, self.said.messages)


@pytest.fixture(scope="module")
def both() -> tuple[Any, Any]:
    """The demo model as plain mlx-lm has it, and its tokenizer."""
    model, tokenizer, *_ = mlx_lm.load(str(DEMO))
    return model, tokenizer


@pytest.fixture(scope="module")
def plain(both: tuple[Any, Any]) -> Any:
    return both[0]


@pytest.fixture(scope="module", params=[1.0, 0.3], ids=["complete", "partial"])
def loaded(request: pytest.FixtureRequest) -> Iterator[tuple[Any, Any]]:
    """The demo model with so much of its experts resident, and its tokenizer.  Its cache of a chat is each test's."""
    manifest = load_lazily(DEMO).manifest
    blocks = sum(layer.experts for layer in manifest.layers)
    with temporary_home() as home, running_daemon(home, budget_for(manifest, round(request.param * blocks))):
        model, tokenizer = expertd.load(DEMO)
        yield model, tokenizer
        expertd.unload(model)


def from_nothing(plain: Any, tokenizer: Any, prompt: list[int], tokens: int) -> list[int]:
    """What plain mlx-lm answers without any cache that was kept."""
    return [response.token for response in stream_generate(plain, tokenizer, prompt, max_tokens=tokens)]


def test_three_turns_have_the_tokens_of_plain_mlx_lm_and_compute_only_what_is_new(
    loaded: tuple[Any, Any], plain: Any
) -> None:
    model, tokenizer = loaded
    chat = Chat(model, tokenizer)
    computed = []
    for question in QUESTIONS:
        answer = chat.ask(question)
        prompt = encode_chat(tokenizer, chat.said.messages[:-1])
        assert answer == from_nothing(plain, tokenizer, prompt, 100)
        assert chat.turns.cached == [*prompt, *answer]
        computed.append((len(prompt), chat.turns.computed))
    assert computed == [(17, 17), (59, 18), (84, 15)]


def test_a_prompt_that_departs_from_what_is_cached_is_computed_from_there(loaded: tuple[Any, Any], plain: Any) -> None:
    model, tokenizer = loaded
    chat = Chat(model, tokenizer)
    chat.ask(QUESTIONS[0])
    chat.said.turns[-1]["content"] = "Return another path."  # as a template that leaves thoughts out
    answer = chat.ask(QUESTIONS[1])
    prompt = encode_chat(tokenizer, chat.said.messages[:-1])
    assert answer == from_nothing(plain, tokenizer, prompt, 100)
    assert 18 < chat.turns.computed < len(prompt)
    chat.said.system = "You are kind."
    answer = chat.ask(QUESTIONS[2], 20)
    prompt = encode_chat(tokenizer, chat.said.messages[:-1])
    assert answer == from_nothing(plain, tokenizer, prompt, 20)
    assert chat.turns.computed == len(prompt) - 1  # both begin with the mark of a message


def test_an_answer_that_is_stopped_is_kept_as_far_as_it_came(loaded: tuple[Any, Any], plain: Any) -> None:
    model, tokenizer = loaded
    chat = Chat(model, tokenizer)
    seen: list[int] = []
    first = chat.ask(ENDLESS, stopped=lambda: bool(seen.append(1)) or len(seen) > 9)
    whole = from_nothing(plain, tokenizer, chat.turns.cached[: len(chat.turns.cached) - len(first)], 100)
    assert 0 < len(first) < 10 and first == whole[: len(first)]
    answer = chat.ask(QUESTIONS[1])
    prompt = encode_chat(tokenizer, chat.said.messages[:-1])
    assert answer == from_nothing(plain, tokenizer, prompt, 100)
    assert chat.turns.computed < len(prompt) - len(first)


def test_a_prompt_that_is_stopped_keeps_its_pieces(loaded: tuple[Any, Any], plain: Any) -> None:
    model, tokenizer = loaded
    turns = Turns(model, tokenizer, piece_tokens=256)
    prompt = [3 + place % 200 for place in range(300)]
    seen: list[int] = []
    assert list(turns.answer(prompt, 5, stopped=lambda: bool(seen.append(1)) or len(seen) > 1)) == []
    assert turns.cached == prompt[:256]
    answer = [response.token for response in turns.answer(prompt, 5)]
    assert turns.computed == 44
    assert answer == from_nothing(plain, tokenizer, prompt, 5)


def test_after_a_failure_nothing_is_taken_for_cached(loaded: tuple[Any, Any], plain: Any) -> None:
    model, tokenizer = loaded
    chat = Chat(model, tokenizer)
    chat.ask(QUESTIONS[0])
    broken, tokens = False, chat.turns.cached

    def fail() -> bool:
        if broken:
            raise RuntimeError("played by a test")
        return False

    chat.said.ask(QUESTIONS[1])
    answer = chat.turns.answer(chat.prompt(), 100, stopped=fail)
    next(answer)
    broken = True
    with pytest.raises(RuntimeError):
        next(answer)
    assert chat.turns.cached == [] != tokens
    answer = [response.token for response in chat.turns.answer(chat.prompt(), 100)]
    assert answer == from_nothing(plain, tokenizer, chat.prompt(), 100)
    assert chat.turns.computed == len(chat.prompt())


def test_where_the_context_ends_an_answer_does_and_a_prompt_is_refused(loaded: tuple[Any, Any]) -> None:
    turns = Turns(*loaded)
    turns.context = 20
    assert len(list(turns.answer(list(range(3, 20)), 100))) == 3
    with pytest.raises(ContextLengthExceeded, match="the chat has 20 tokens"):
        next(turns.answer(list(range(3, 23)), 100))


def test_a_model_without_a_chat_template_is_refused(loaded: tuple[Any, Any]) -> None:
    class Bare:
        has_chat_template = False

    with pytest.raises(RequestInvalid, match="no chat template"):
        encode_chat(Bare(), [])


# -- the command -------------------------------------------------------------------------------------------------------


def piped(*arguments: str, said: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "expertd.clients.cli", "chat", *arguments], input=said, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip


@pytest.fixture(scope="module")
def partial_home() -> Iterator[Home]:
    """The home of a daemon with room for a third of the demo model's blocks."""
    with temporary_home() as home, running_daemon(home, budget_for(load_lazily(DEMO).manifest, 64)):
        yield home


@pytest.fixture
def partial(partial_home: Home, monkeypatch: pytest.MonkeyPatch) -> Home:
    """That home, for the programs that a test starts."""
    monkeypatch.setenv("EXPERTD_HOME", str(partial_home.root))
    return partial_home


class Expected(Protocol):
    """What plain mlx-lm answers to the last of ``messages``, which are the user's and the model's in turns."""

    def __call__(self, messages: list[str], system: str = "", tokens: int = 100) -> str: ...


@pytest.fixture(scope="module")
def expected(both: tuple[Any, Any]) -> Expected:
    model, tokenizer = both

    def answer(messages: list[str], system: str = "", tokens: int = 100) -> str:
        said = Conversation(system)
        for place, text in enumerate(messages):
            (said.answered if place % 2 else said.ask)(text)
        prompt = encode_chat(tokenizer, said.messages)
        return mlx_lm.generate(model, tokenizer, prompt, max_tokens=tokens)

    return answer


def test_in_a_pipe_each_line_is_a_turn(partial: Home, expected: Expected, tmp_path: Path) -> None:
    first = expected(QUESTIONS[:1])
    second = expected([QUESTIONS[0], first, QUESTIONS[1]])
    kind = expected(QUESTIONS[2:3], "You are kind.", 9)
    path = tmp_path / "chat.json"
    said = [*QUESTIONS[:2], "", "/reset", "/system You are kind.", "/nothing", f"/save {path}", "/quit", "unread"]
    done = piped(str(DEMO), said="\n".join(said))
    assert done.returncode == 2, "for /nothing"
    told = ["The chat begins anew.", "The model is told so from now on.", f"saved 1 messages to {path}"]
    assert done.stdout == "\n".join([first, second, *told]) + "\n"
    figures = r"expertd: \d+ tokens, [\d.]+/s; [\d.]+ % hits; \d.\d MB of experts; chat {} tokens \({} new\)"
    lines = done.stderr.splitlines()
    assert len(lines) == 3
    assert re.fullmatch(figures.format(41, 17), lines[0]), lines
    assert re.fullmatch(figures.format(r"\d+", 18), lines[1]), lines
    assert lines[2] == "expertd: there is no /nothing; /help lists what there is"
    assert "\x1b" not in done.stdout + done.stderr
    done = piped(str(DEMO), "--system", "You are kind.", "--max-tokens", "9", said=QUESTIONS[2])
    assert (done.returncode, done.stdout) == (0, f"{kind}\n")
    assert done.stderr.startswith("expertd: cut off by --max-tokens; 9 tokens, ")


def test_in_a_pipe_a_message_may_have_several_lines(partial: Home, expected: Expected) -> None:
    forms = (
        ['"""', "Write the", "function clamp.", '"""'],
        ["Write the\\", "function clamp."],
        ['"""Write the', "function clamp."],
    )
    saves = ["/save /nowhere/chat", "/save ~nobody-here/chat"]
    said = [*saves, *"|/reset|".join("|".join(form) for form in forms).split("|")]
    done = piped(str(DEMO), "--max-tokens", "9", said="\n".join(said))
    answer = expected(["Write the\nfunction clamp."], tokens=9)
    assert done.stdout == "The chat begins anew.\n".join([f"{answer}\n"] * 3)
    assert done.stderr.startswith("expertd: /nowhere/chat cannot be written (") and done.returncode == 1


def test_in_a_pipe_the_first_error_ends_it(partial: Home, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model", "qwen3_moe")
    config = path / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": "{{ raise_exception('no') }}"}))
    done = piped(str(path), said="one\ntwo\n")
    assert (done.returncode, done.stdout) == (RequestInvalid.exit_status, "")
    assert done.stderr == "expertd: the model's chat template refused the messages (no) [request_invalid]\n"


def test_a_folder_that_is_no_model_is_told_at_once(home: Home, tmp_path: Path) -> None:
    done = piped(str(tmp_path), said="")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith(" [not_a_checkpoint]\n")


@pytest.mark.parametrize("columns", [80, 200])
def test_a_chat_in_a_terminal(columns: int, partial: Home, expected: Expected) -> None:
    first = expected(QUESTIONS[:1])
    several = expected([QUESTIONS[0], first, "Write the\nfunction clamp."], tokens=40)
    with Terminal("chat", str(DEMO), "--max-tokens", "40", columns=columns) as terminal:
        terminal.expect("demo: type a message.  /help lists what else there is; Ctrl-D leaves.\n>>> ")
        terminal.send("What do os.path.join do?" + "\x1b[D" * len(" os.path.join do?") + "es\n")  # the cursor goes back
        shown = terminal.expect("(17 new)")
        assert f"\n{first}\n" in shown
        figures = terminal.raw.split("\x1b[2m")[-1].split("\x1b[0m")[0]
        assert re.match(r"\d+ tokens, [\d.]+/s; [\d.]+ % hits; \d.\d MB of experts; chat 41 tokens", figures)
        terminal.expect(">>> ", len(shown))
        since = len(terminal.text)
        terminal.send('"""\nWrite the\nfunction clamp.\n"""\n')
        assert f"\n{several}\n" in terminal.expect(" new)", since)
        since = len(terminal.text)
        terminal.send("/help\n")
        told = terminal.expect("needs a space before it.", since)
        assert max(map(len, told.splitlines())) <= 80
        since = len(terminal.text)
        terminal.send(CTRL_C)
        terminal.expect(">>> ", since)
        since = len(terminal.text)
        terminal.send(CTRL_D)
        assert terminal.ended() == 0
        assert terminal.modes_now() == terminal.modes


def test_ctrl_d_before_the_first_prompt_leaves(partial: Home) -> None:
    with Terminal("chat", str(DEMO)) as terminal:
        terminal.send(CTRL_D)
        assert terminal.ended() == 0
        assert "type a message" in terminal.text and ">>> " not in terminal.text


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(partial: Home) -> None:
    with Terminal("chat", str(DEMO), "--max-tokens", "100") as terminal:
        terminal.expect(">>> ")
        terminal.send(f"{ENDLESS}\n")
        terminal.expect("fromisoformat")
        terminal.send(CTRL_C)
        terminal.expect("stopped; ")
        since = len(terminal.text)
        terminal.send(f"{QUESTIONS[1]}\n")
        terminal.expect(" new)", since)
        assert "stopped" not in terminal.text[since:]
        terminal.send("/quit\n")
        assert terminal.ended() == 0


def test_a_chat_goes_on_when_its_daemon_is_killed(own_home: Home, expected: Expected) -> None:
    """The daemon that the chat has started is killed in the middle of an answer; the next one is started by it."""
    # With fewer slots than a token needs blocks, each token misses: none is computed without a daemon.
    manifest = load_lazily(DEMO).manifest
    budget = budget_for(manifest, len(manifest.layers) * 2)
    with Terminal("chat", str(DEMO), "--budget", str(budget), "--max-tokens", "120") as terminal:
        terminal.expect(">>> ")
        daemon = ask_status(own_home).daemon.pid
        terminal.send(f"{ENDLESS}\n")
        terminal.expect("fromisoformat")
        os.kill(daemon, signal.SIGKILL)
        shown = terminal.expect("cut off by --max-tokens; ")
        assert f"\n{expected([ENDLESS], tokens=120)}\n" in shown
        told = " ".join(shown.splitlines()[-4:])
        assert f"the daemon of {own_home.root} has ended; the model waits for its return" in told
        assert "expertd: started a daemon (process " in told
        since = len(terminal.text)
        terminal.send("/reset\n")
        terminal.send(f"{QUESTIONS[0]}\n")
        assert expected(QUESTIONS[:1]) in terminal.expect(" new)", since)
        again = ask_status(own_home)
        assert again.daemon.pid != daemon
        assert [session.pid for session in again.models[0].sessions] == [terminal.pid]
        terminal.send(CTRL_D)
        assert terminal.ended() == 0
