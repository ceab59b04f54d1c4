"""Generation: many requests at a time over one model, driven step by step by whoever owns the engine.

Continuous batching is mlx-lm's ``BatchGenerator``; this adds what a server needs around it: the chat template, text
instead of tokens, stop strings, cancelling, limits, memory for caches, and failures that end requests and not the
engine.  No sockets, no clock: see ``expertd.worker.process`` for the loop.  How prompts are made is in ``prompts``, how
tokens are chosen in ``sampling`` and ``grammar``, what is told of their text in ``written``, what earlier requests left
in ``prompt_cache``.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import BatchGenerator

from expertd.protocol.errors import (
    ExpertdError,
    MemoryPressure,
    MessageInvalid,
    ParameterUnsupported,
)
from expertd.protocol.messages import Delta, Finished, Generate, Refused, TokenLogprob, TopToken, encode
from expertd.worker.channels import Channels, Piece
from expertd.worker.grammar import Enforced, Vocabulary
from expertd.worker.kv_memory import CacheMemory, Growth, available_bytes
from expertd.worker.kv_quantized import new_caches
from expertd.worker.pressure import Buffers, Gauge
from expertd.worker.prompt_cache import PromptCache
from expertd.worker.prompts import Prompts
from expertd.worker.sampling import LogitsProcessor, Sampler, processors_of, sampler_of
from expertd.worker.sequential import SequentialGenerator
from expertd.worker.wired import WiredLimit
from expertd.worker.written import Written

__all__ = ["Engine", "Event", "context_length"]

log = logging.getLogger(__name__)

Event = Delta | Finished | Refused

DEFAULT_CONTEXT = 32768
PREFILL_TOKENS = 512 if mx.metal.is_available() else 32
"""Longest piece of a prompt that one step computes, so that a cancel never waits for more than that.  A CPU takes as
long for each token however many there are, so short pieces cost it nothing."""
SMALL_BYTES = 16384
"""A request of more is prepared on another thread: a template, a tokenizer or a grammar may take seconds for it, in
which all other answers would stand still.  They compute outside the interpreter, mostly."""
PREPARED_WAIT_S = 0.02
"""How long a step that has nothing to compute waits for that."""
PREFILL_REQUESTS = 4
"""Prompts that are computed side by side: they share each expert that a step fetches."""
DECODE_REQUESTS = 32
PROMPT_CACHE_SHARE = 4
"""One in so many bytes that there are at the start may hold caches for requests whose prompts begin alike.  They are
given back when memory is short, or a request needs it."""
JSON_CALLS = "mlx_lm.tool_parsers.json_tools"
"""The parser of those models that write a call as JSON with a name and arguments."""
LEAST_LOGPROB = -9999.0
"""What OpenAI says for a token that is next to impossible."""
LONGEST_REASON = 1000
"""Characters of an error's sentence that are passed on: a chat template may quote the whole prompt in one."""


@dataclass
class _Request:
    """One request between ``submit`` and its last event."""

    id: int
    prompt: list[int]
    max_tokens: int
    asked_tokens: int | None  # what the client gave as max_tokens
    sampler: Sampler | None
    processors: list[LogitsProcessor]
    enforced: Enforced | None  # the last of them, if the answer is kept to a grammar
    top_logprobs: int | None
    written: Written
    detokenizer: Any
    cached: int = 0
    told: bool = False  # whether the client knows how long its prompt is
    prefilling: bool = True
    tokens: int = 0
    unreported: int = field(default=0)

    @property
    def progress(self) -> str:
        """How far it is, in words for the log."""
        return "in its prompt" if self.prefilling else f"after {self.tokens} tokens"

    @property
    def growth(self) -> Growth:
        """Tokens in its cache (none are counted until the prompt is done), and the most that it was asked for."""
        now = 0 if self.prefilling else len(self.prompt) + self.tokens
        return Growth(now, len(self.prompt) + (self.asked_tokens or 0))


def context_length(model: Any) -> int:
    """Longest prompt and answer together, in tokens, by the model's config; 32768 where it does not say."""
    arguments = getattr(model, "args", None)
    for holder in (arguments, getattr(arguments, "text_config", None)):
        found = (
            holder.get("max_position_embeddings")
            if isinstance(holder, dict)
            else getattr(holder, "max_position_embeddings", None)
        )
        if isinstance(found, int) and found > 0:
            return found
    return DEFAULT_CONTEXT


def new_generator(model: Any, tokenizer: Any, prompts: int, answers: int) -> Any:
    """A generator of so many prompts and answers at a time, or of one where the caches cannot be batched."""
    ends = set(tokenizer.eos_token_ids)
    if not all(hasattr(layer, "merge") for layer in new_caches(model, None)):
        return SequentialGenerator(model, ends, PREFILL_TOKENS)
    return BatchGenerator(
        model,
        stop_tokens=[[end] for end in sorted(ends)],
        completion_batch_size=answers,
        prefill_batch_size=prompts,
        prefill_step_size=PREFILL_TOKENS,
    )


class Engine:
    """Not thread-safe: one thread submits, cancels and steps.

    Every submitted request gets any number of ``Delta`` and then one ``Finished`` or ``Refused``, unless it is
    cancelled.  The ``tokens`` of its deltas add up to ``completion_tokens``, which counts the eos token too.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        context: int | None = None,
        buffers: Buffers | None = None,
        wired: WiredLimit | None = None,
        memory: CacheMemory | None = None,
        prompt_cache: int | None = None,
        kv_bits: int | None = None,
    ) -> None:
        """Take a model and its tokenizer as ``mlx_lm.load`` returns them.

        Args:
            context: overrides the config's.
            buffers: the model's, if it has any to share with its layers.
            wired: the wired limit to hold until ``close``.
            memory: what its requests' caches need; None: no request is refused for it.
            prompt_cache: bytes of caches to keep for requests to come; None: a share of what there is.
            kv_bits: of the caches' numbers; None: as the model computes them.
        """
        self.context = context or context_length(model)
        self._model = model
        self._tokenizer = tokenizer
        self._buffers = buffers or Buffers(Gauge())
        self._wired = wired
        self._memory = memory or CacheMemory([])
        self._kv_bits = kv_bits
        self._vocabulary = Vocabulary(tokenizer)
        self._kept = PromptCache(available_bytes() // PROMPT_CACHE_SHARE if prompt_cache is None else prompt_cache)
        self._hold_limit()  # once before the first generator, which sets its own: what is former is not that
        self._generator = self._new_generator()
        self._waiting: deque[_Request] = deque()
        self._running: dict[int, _Request] = {}
        self._outbox: list[Event] = []
        self._prompts = Prompts(tokenizer, self.context)
        self._aside = ThreadPoolExecutor(1, "expertd-prompts")
        self._prepared: dict[int, Future[_Request | Finished]] = {}

    @property
    def at_once(self) -> int:
        """Answers that are computed at a time."""
        return 1 if isinstance(self._generator, SequentialGenerator) else DECODE_REQUESTS

    @property
    def busy(self) -> bool:
        """Whether ``step`` has anything to do."""
        return bool(self._waiting or self._running or self._outbox or self._prepared)

    def submit(self, message: Generate) -> None:
        """Queue a request.  One that cannot be served is answered by the next ``step``.

        Raises:
            MessageInvalid: the request's number is in use.
        """
        known = [request.id for request in (*self._waiting, *self._running.values())]
        if message.request in known or message.request in self._prepared:
            raise MessageInvalid(f"a request numbered {message.request} is running already")
        prepare = partial(self._prepare, message)
        if len(encode(message)) > SMALL_BYTES:
            self._prepared[message.request] = self._aside.submit(prepare)
        else:
            self._take(message.request, prepare)

    def cancel(self, request: int) -> None:
        """Forget a request: no event about it follows.  An unknown one has just ended, which is no error."""
        self._outbox = [event for event in self._outbox if event.request != request]
        if any(waiting.id == request for waiting in self._waiting):
            log.debug("request %d was cancelled while it waited", request)
        self._waiting = deque(waiting for waiting in self._waiting if waiting.id != request)
        if (prepared := self._prepared.pop(request, None)) is not None:
            prepared.cancel()
        running = [uid for uid, running in self._running.items() if running.id == request]
        if running:
            log.debug("request %d was cancelled %s", request, self._running[running[0]].progress)
            self._drop(running)
            self._buffers.after_request(idle=not self._running)

    def relieve(self) -> None:
        """Between two steps: give back what can be spared, if memory has become short."""
        if self._buffers.relieve():
            self._kept.give_back()

    def step(self) -> list[Event]:
        """Compute one token of every running answer and at most ``PREFILL_TOKENS`` of every running prompt.

        A prompt in progress yields an empty ``Delta``, so that whoever waits sees that there is work.  An exception out
        of the model ends all requests that were in this step, since their caches are half written.
        """
        self._take_prepared()
        events, self._outbox = self._outbox, []
        events += self._admit()
        if not self._running:
            return events
        before = len(self._running)
        try:
            prompts, answers = self._generator.next()
        except Exception as error:
            return events + self._fail(error)
        for progress in prompts:
            request = self._running.get(progress.uid)
            if request is not None and progress.end_of_prompt:
                request.prefilling = False
            elif request is not None:
                events.append(self._delta(request, Piece(), []))
        for answer in answers:
            events += self._advance(answer)
        if len(self._running) < before:
            self._buffers.after_request(idle=not self._running)
        return events

    def close(self) -> None:
        """Drop all requests and what they hold."""
        self._waiting.clear()
        self._running.clear()
        self._outbox.clear()
        self._prepared.clear()
        self._aside.shutdown(wait=False, cancel_futures=True)
        self._generator.close()
        self._kept.give_back()
        if self._wired is not None:
            self._wired.release()
        self._buffers.clear()

    def _new_generator(self) -> Any:
        generator = new_generator(self._model, self._tokenizer, PREFILL_REQUESTS, DECODE_REQUESTS)
        self._hold_limit()
        return generator

    def _hold_limit(self) -> None:
        if self._wired is not None:
            self._wired.hold()

    def _prepare(self, message: Generate) -> _Request | Finished:
        """What is to be done for a message, or its answer if nothing is; on the engine's thread or another."""
        prompt = self._prompts.encode(message)
        if message.count:
            return Finished(request=message.request, reason="length", prompt_tokens=len(prompt), completion_tokens=0)
        max_tokens = self._prompts.room(message, len(prompt))
        keeps = message.schema is not None or message.tool_choice == "required"
        channels = Channels(self._tokenizer, prompt, message.tools, raw=message.messages is None, enforced=keeps)
        processors = self._processors(message, len(prompt))
        enforced = self._enforced(message, len(prompt), channels.thinking)
        return _Request(
            id=message.request,
            prompt=prompt,
            max_tokens=max_tokens,
            asked_tokens=message.max_tokens,
            sampler=sampler_of(message.sampling),
            processors=processors if enforced is None else [*processors, enforced],
            enforced=enforced,
            top_logprobs=message.top_logprobs,
            written=Written(channels, message.stop, one_call=not message.parallel_calls),
            detokenizer=self._tokenizer.detokenizer,
        )

    def _take(self, request: int, prepare: Callable[[], _Request | Finished]) -> None:
        """Queue what ``prepare`` returns, or tell why it cannot be."""
        try:
            made = prepare()
        except Exception as error:
            # What makes tokens of text, and grammars of schemas, is of others, and what clients send may be anything.
            if not isinstance(error, ExpertdError):
                log.error("request %d could not be prepared", request, exc_info=error)
            self._outbox.append(_refused(request, error))
            return
        if isinstance(made, Finished):
            self._outbox.append(made)
        else:
            self._waiting.append(made)

    def _take_prepared(self) -> None:
        """Queue what has been prepared aside; with nothing else to do, wait for it a little."""
        if self._prepared and not (self._waiting or self._running or self._outbox):
            wait(self._prepared.values(), PREPARED_WAIT_S, FIRST_COMPLETED)
        for request in [request for request, prepared in self._prepared.items() if prepared.done()]:
            self._take(request, self._prepared.pop(request).result)

    def _processors(self, message: Generate, prompt_tokens: int) -> list[LogitsProcessor]:
        """What the logits pass through before a grammar."""
        self._prompts.check_tokens(message.sampling.logit_bias, "logit_bias")
        return processors_of(message.sampling, prompt_tokens)

    def _enforced(self, message: Generate, prompt_tokens: int, thinking: bool) -> Enforced | None:
        """The grammar that the answer is kept to, if any; it begins where the reasoning ends."""
        after = tuple(self._tokenizer.think_end_tokens or ()) if thinking else ()
        has_to_call = message.tool_choice == "required"
        if message.schema is None and not has_to_call:
            return None
        if message.schema is not None and not message.tools:
            return self._vocabulary.json(message.schema, prompt_tokens, after)
        if getattr(self._tokenizer.tool_parser, "__module__", "") != JSON_CALLS:
            what, param = ("a call of a tool", "tool_choice") if has_to_call else ("a schema beside tools", "tools")
            raise ParameterUnsupported(
                f"{what} cannot be enforced with this model, which does not write calls as JSON; leave '{param}' out",
                param=param,
            )
        markers = self._tokenizer.tool_call_start, self._tokenizer.tool_call_end
        return self._vocabulary.calls(
            message.tools, markers, message.parallel_calls, prompt_tokens, after,
            schema=None if has_to_call else message.schema,
        )  # fmt: skip

    def _admit(self) -> list[Event]:
        """Hand waiting requests to the generator, no more than its next step computes, so that only those can fail.

        One whose cache can never fit is refused; one whose cache fits when others have ended waits for that.
        """
        refused: list[Event] = []
        prefilling = sum(request.prefilling for request in self._running.values())
        while self._waiting and prefilling < PREFILL_REQUESTS and len(self._running) < DECODE_REQUESTS:
            request = self._waiting[0]
            try:
                if not self._fits(request):
                    break
            except MemoryPressure as error:
                self._waiting.popleft()
                refused.append(_refused(request.id, error))
                continue
            self._waiting.popleft()
            self._insert(request)
            prefilling += 1
        return refused

    def _fits(self, request: _Request) -> bool:
        """Whether there is memory for its cache now; what is kept of earlier requests makes room, piece by piece.

        Raises:
            MemoryPressure: it will not fit later either.
        """
        running = [other.growth for other in self._running.values()]
        while not self._memory.fits(len(request.prompt), request.asked_tokens, running, self._kept.size):
            if not self._kept.size:
                return False
            self._kept.give_back_least()
            self._buffers.clear()
        return True

    def _insert(self, request: _Request) -> None:
        cache, rest = self._kept.take(request.prompt)
        request.cached = len(request.prompt) - len(rest)
        (uid,) = self._generator.insert(
            [rest],
            [request.max_tokens],
            caches=[new_caches(self._model, self._kv_bits) if cache is None else cache],
            all_tokens=[request.prompt[: request.cached]],
            samplers=[request.sampler],
            logits_processors=[request.processors],
        )
        self._running[uid] = request

    def _advance(self, answer: Any) -> list[Event]:
        """The events of one more token of an answer."""
        request = self._running.get(answer.uid)
        if request is None:
            return []
        request.tokens += 1
        request.unreported += 1
        reason = answer.finish_reason
        # With the last token that was asked for, what would have followed does not matter.
        if request.enforced is not None and request.enforced.problem is not None and reason != "length":
            log.info("request %d: %s", request.id, request.enforced.problem.message)
            self._drop([answer.uid])
            return [_refused(request.id, request.enforced.problem)]
        try:
            if reason != "stop":
                request.detokenizer.add_token(answer.token)
            if reason is not None:
                request.detokenizer.finalize()
            pieces = request.written.feed(
                request.detokenizer.last_segment, last=reason is not None, cut=reason == "length"
            )
            logprobs = self._logprobs(request, answer)
        except Exception as error:
            log.exception("the text of request %d could not be made", request.id)
            self._drop([answer.uid])
            return [_refused(request.id, error)]
        if request.written.ended:
            reason = "stop"
        if reason is None:
            return self._deltas(request, pieces, logprobs)
        events: list[Event] = [
            *self._deltas(request, pieces, logprobs),
            Finished(
                request=request.id,
                reason="tool_calls" if reason == "stop" and request.written.called else reason,
                prompt_tokens=len(request.prompt),
                completion_tokens=request.tokens,
                cached_tokens=request.cached,
                stop=request.written.stop,
            ),
        ]
        if answer.prompt_cache is not None:
            self._kept.keep(answer.all_tokens, answer.prompt_cache)
        self._drop([answer.uid])
        return events

    def _deltas(self, request: _Request, pieces: list[Piece], logprobs: list[TokenLogprob]) -> list[Event]:
        """What one token tells: one message, empty if nothing can be told; or several, to keep their order."""
        first, *more = pieces or [Piece()]
        return [self._delta(request, first, logprobs), *(self._delta(request, piece, []) for piece in more)]

    @staticmethod
    def _delta(request: _Request, piece: Piece, logprobs: list[TokenLogprob]) -> Delta:
        tokens, request.unreported = request.unreported, 0
        first, request.told = not request.told, True
        return Delta(
            request=request.id,
            text=piece.text,
            tokens=tokens,
            reasoning=piece.reasoning,
            calls=piece.calls,
            logprobs=logprobs,
            prompt_tokens=len(request.prompt) if first else 0,
            cached_tokens=request.cached if first else 0,
        )

    def _logprobs(self, request: _Request, answer: Any) -> list[TokenLogprob]:
        """What the request wants to know of a token; nothing of the one that ends an answer, which is no part of it."""
        if request.top_logprobs is None or answer.finish_reason == "stop":
            return []
        found = np.array(answer.logprobs.astype(mx.float32))
        most = min(request.top_logprobs, len(found))
        best = np.argpartition(-found, most - 1)[:most] if most else np.array([], np.intp)
        top = [self._top(int(token), found) for token in best[np.argsort(-found[best], kind="stable")]]
        own = self._top(answer.token, found)
        return [TokenLogprob(token=own.token, logprob=own.logprob, top=top)]

    def _top(self, token: int, logprobs: Any) -> TopToken:
        # Negative infinity, which JSON does not have, is what a grammar makes of all else.
        return TopToken(token=self._vocabulary.bytes_of(token), logprob=max(float(logprobs[token]), LEAST_LOGPROB))

    def _drop(self, uids: list[int]) -> None:
        """Forget running requests; what those have computed that did not end by themselves is kept too."""
        for uid in uids:
            del self._running[uid]
        if uids:
            for cache, tokens in self._generator.remove(uids, return_prompt_caches=True).values():
                self._kept.keep(tokens, cache)

    def _fail(self, error: Exception) -> list[Event]:
        """End all that was in the step, and begin again with a new generator."""
        if isinstance(error, ExpertdError):
            log.warning("%d requests failed: %s [%s]", len(self._running), error.message, error.code)
        else:
            log.error("%d requests failed", len(self._running), exc_info=error)
        failed: list[Event] = [_refused(request.id, error) for request in self._running.values()]
        self._running.clear()
        with contextlib.suppress(Exception):
            # It waits for the device, which may be what failed.
            self._generator.close()
        self._generator = self._new_generator()
        self._buffers.clear()
        return failed


def _refused(request: int, error: Exception) -> Refused:
    code, param = ExpertdError.code, None
    message = f"the worker failed while generating ({type(error).__name__}: {error}); its log says where"
    if isinstance(error, ExpertdError):
        code, message, param = error.code, error.message, error.param
    if len(message) > LONGEST_REASON:
        message = f"{message[:LONGEST_REASON]}..."
    return Refused(request=request, code=code, message=message, param=param)
