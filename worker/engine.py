"""Generation: many requests at a time over one model, driven step by step by whoever owns the engine.

Continuous batching is mlx-lm's ``BatchGenerator``; this adds what a server needs around it: the chat template, text
instead of tokens, stop strings, cancelling, limits, memory for caches, and failures that end requests and not the
engine.  No sockets, no threads, no clock: see ``expertd.worker.process`` for the loop.  Reasoning and tool calls are
not parsed; they are text.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_sampler

from expertd.protocol.errors import ExpertdError, MemoryPressure, MessageInvalid, PromptTooLong
from expertd.protocol.messages import Delta, Finished, Generate, Refused
from expertd.worker.kv_memory import CacheMemory, Growth
from expertd.worker.pressure import Buffers, Gauge
from expertd.worker.sequential import SequentialGenerator
from expertd.worker.stops import StopText
from expertd.worker.template import encode_chat
from expertd.worker.wired import WiredLimit

__all__ = ["Engine", "Event", "context_length"]

log = logging.getLogger(__name__)

Event = Delta | Finished | Refused

DEFAULT_CONTEXT = 32768
PREFILL_TOKENS = 512
"""Longest piece of a prompt that one step computes, so that a cancel never waits for more than that."""
PREFILL_REQUESTS = 4
"""Prompts that are computed side by side: they share each expert that a step fetches."""
DECODE_REQUESTS = 32
COLDEST = 1e-5
"""Below this a temperature is greedy: its inverse would overflow to NaN on the way to the same token."""
LONGEST_REASON = 1000
"""Characters of an error's sentence that are passed on: a chat template may quote the whole prompt in one."""


@dataclass
class _Request:
    """One request between ``submit`` and its last event."""

    id: int
    prompt: list[int]
    max_tokens: int
    asked_tokens: int | None  # what the client gave as max_tokens
    sampler: Any
    stops: StopText
    detokenizer: Any
    prefilling: bool = True
    tokens: int = 0
    unreported: int = field(default=0)

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
    if not all(hasattr(layer, "merge") for layer in make_prompt_cache(model)):
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
    ) -> None:
        """Take a model and its tokenizer as ``mlx_lm.load`` returns them.

        Args:
            context: overrides the config's.
            buffers: the model's, if it has any to share with its layers.
            wired: the wired limit to hold until ``close``.
            memory: what its requests' caches need; None: no request is refused for it.
        """
        self.context = context or context_length(model)
        self._model = model
        self._tokenizer = tokenizer
        self._buffers = buffers or Buffers(Gauge())
        self._wired = wired
        self._memory = memory or CacheMemory([])
        self._hold_limit()  # once before the first generator, which sets its own: what is former is not that
        self._generator = self._new_generator()
        self._waiting: deque[_Request] = deque()
        self._running: dict[int, _Request] = {}
        self._outbox: list[Event] = []

    @property
    def busy(self) -> bool:
        """Whether ``step`` has anything to do."""
        return bool(self._waiting or self._running or self._outbox)

    def submit(self, message: Generate) -> None:
        """Queue a request.  One that cannot be served is answered by the next ``step``.

        Raises:
            MessageInvalid: the request's number is in use.
        """
        if any(request.id == message.request for request in (*self._waiting, *self._running.values())):
            raise MessageInvalid(f"a request numbered {message.request} is running already")
        try:
            self._waiting.append(self._prepare(message))
        except ExpertdError as error:
            self._outbox.append(_refused(message.request, error))

    def cancel(self, request: int) -> None:
        """Forget a request: no event about it follows.  An unknown one has just ended, which is no error."""
        self._outbox = [event for event in self._outbox if event.request != request]
        self._waiting = deque(waiting for waiting in self._waiting if waiting.id != request)
        running = [uid for uid, running in self._running.items() if running.id == request]
        if running:
            self._drop(running)
            self._buffers.after_request(idle=not self._running)

    def relieve(self) -> None:
        """Between two steps: give back what can be spared, if memory has become short."""
        self._buffers.relieve()

    def step(self) -> list[Event]:
        """Compute one token of every running answer and at most ``PREFILL_TOKENS`` of every running prompt.

        A prompt in progress yields an empty ``Delta``, so that whoever waits sees that there is work.  An exception out
        of the model ends all requests that were in this step, since their caches are half written.
        """
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
                events.append(Delta(request=request.id, text="", tokens=0))
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
        self._generator.close()
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

    def _prepare(self, message: Generate) -> _Request:
        prompt = encode_chat(self._tokenizer, message.messages)
        room = self.context - len(prompt)
        if message.max_tokens is not None and message.max_tokens > room > 0:
            raise PromptTooLong(
                f"the prompt has {len(prompt)} tokens and max_tokens is {message.max_tokens}, which is more than the "
                f"model's context of {self.context}; shorten the prompt or lower max_tokens",
                param="max_tokens" if message.max_tokens >= self.context else "messages",
            )
        if room < 1:
            raise PromptTooLong(
                f"the prompt has {len(prompt)} tokens, which leaves no room in the model's context of {self.context}; "
                "shorten the prompt",
                param="messages",
            )
        return _Request(
            id=message.request,
            prompt=prompt,
            max_tokens=message.max_tokens or room,
            asked_tokens=message.max_tokens,
            sampler=make_sampler(message.temperature, top_p=message.top_p) if message.temperature > COLDEST else None,
            stops=StopText(message.stop),
            detokenizer=self._tokenizer.detokenizer,
        )

    def _admit(self) -> list[Event]:
        """Hand waiting requests to the generator, no more than its next step computes, so that only those can fail.

        One whose cache can never fit is refused; one whose cache fits when others have ended waits for that.
        """
        refused: list[Event] = []
        prefilling = sum(request.prefilling for request in self._running.values())
        while self._waiting and prefilling < PREFILL_REQUESTS and len(self._running) < DECODE_REQUESTS:
            request = self._waiting[0]
            running = [other.growth for other in self._running.values()]
            try:
                if not self._memory.fits(len(request.prompt), request.asked_tokens, running):
                    break
            except MemoryPressure as error:
                self._waiting.popleft()
                refused.append(_refused(request.id, error))
                continue
            self._waiting.popleft()
            (uid,) = self._generator.insert([request.prompt], [request.max_tokens], samplers=[request.sampler])
            self._running[uid] = request
            prefilling += 1
        return refused

    def _advance(self, answer: Any) -> list[Event]:
        """The events of one more token of an answer."""
        request = self._running.get(answer.uid)
        if request is None:
            return []
        request.tokens += 1
        request.unreported += 1
        reason = answer.finish_reason
        try:
            if reason != "stop":
                request.detokenizer.add_token(answer.token)
            if reason is not None:
                request.detokenizer.finalize()
            text, stopped = request.stops.feed(request.detokenizer.last_segment)
        except Exception as error:
            log.exception("the text of request %d could not be made", request.id)
            self._drop([answer.uid])
            return [_refused(request.id, error)]
        if stopped:
            reason = "stop"
        elif reason is not None:
            text += request.stops.flush()
        events: list[Event] = [Delta(request=request.id, text=text, tokens=request.unreported)]
        request.unreported = 0
        if reason is not None:
            events.append(
                Finished(
                    request=request.id,
                    reason=reason,
                    prompt_tokens=len(request.prompt),
                    completion_tokens=request.tokens,
                )
            )
            self._drop([answer.uid])
        return events

    def _drop(self, uids: list[int]) -> None:
        for uid in uids:
            del self._running[uid]
        if uids:
            self._generator.remove(uids)

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
