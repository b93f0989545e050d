"""A serving engine under a closed loop of clients, step by step of its scheduler; runs of equal steps at once.

Each client sends its next request when its last is answered. A step is what the engine's policy makes of the prompts
that wait and the sequences that decode (see ``Settings.policy``). While nothing waits, all steps until the next
request ends or arrives decode the same batch, and are counted together.
"""

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from .shapes import Load, Settings

Seconds = Callable[[float, float, float, float, float], float]
"""Of one step: (sequences that decode, their mean context, prompts, their tokens, tokens computed before them)."""
GOLDEN = 0.6180339887498949


@dataclass(eq=False)
class Request:
    """One request on its way. Times in seconds since the start."""

    number: int
    arrival: float
    prompt: int
    answer: int
    done: int = 0
    """Tokens of the prompt that have been computed."""
    first: float = 0.0
    end: float = 0.0


@dataclass
class Run:
    """What came of a load: [requests] seconds to the first token and between tokens, seconds of it all, and means."""

    ttft: np.ndarray
    tpot: np.ndarray
    seconds: float
    tokens: int
    mean_batch: float
    mean_context: float


@dataclass
class _Engine:
    load: Load
    settings: Settings
    seconds: Seconds
    copies: int
    room: float
    """Tokens whose keys and values there is memory for."""
    held: float = 0.0
    now: float = 0.0
    steps: int = 0
    sent: int = 0
    context: float = 0.0
    """Tokens of all sequences that decode, their contexts added up."""
    waiting: deque[Request] = field(default_factory=deque)
    noticed: list[Request] = field(default_factory=list)
    """Come, but the scheduler has not looked yet; it does at step ``joining``."""
    joining: int = 0
    coming: list[tuple[float, int, Request]] = field(default_factory=list)
    running: list[tuple[int, int, Request]] = field(default_factory=list)
    """By the step after which they end."""
    ended: list[Request] = field(default_factory=list)
    weighed: list[tuple[float, float, float]] = field(default_factory=list)
    """Seconds, sequences and mean context of runs of decodes."""

    def send(self, at: float) -> None:
        """The next request of a client, sent at ``at``."""
        load, number = self.load, self.sent
        if number >= load.concurrency * load.rounds:
            return
        self.sent += 1
        prompt = _length(load.isl, load.shortest, number * GOLDEN)
        answer = max(_length(load.osl, load.shortest, number * GOLDEN * GOLDEN + 0.5), 2)
        request = Request(number, at, prompt, answer)
        delay = self.settings.frontend + self.settings.frontend_token * prompt
        heapq.heappush(self.coming, (at + delay, number, request))

    def admit(self) -> None:
        """Notices what has come by now, as long as there is room for its keys and values and for one more request."""
        while self.coming and self.coming[0][0] <= self.now and not self.full:
            request = heapq.heappop(self.coming)[2]
            self.held += request.prompt + request.answer
            if not self.noticed:
                self.joining = self.steps + self.settings.recv_interval - 1 + self.settings.overlaps
            self.noticed.append(request)
        if self.noticed and self.steps >= self.joining:
            self.join()

    def join(self) -> None:
        """What was noticed waits for the next step."""
        self.waiting.extend(self.noticed)
        self.noticed.clear()

    def undisturbed(self) -> int:
        """Steps until the scheduler looks at what it has noticed."""
        return self.joining - self.steps if self.noticed else 2**30

    def prompts(self) -> tuple[list[tuple[Request, int]], int]:
        """Which prompts the next step computes, how many tokens of each, and how many sequences decode beside them."""
        policy, room = self.settings.policy, self.settings.chunk * self.copies
        decoding = 0 if policy == "prefill_first" else len(self.running)
        room -= decoding
        chosen: list[tuple[Request, int]] = []
        for request in self.waiting:
            left = request.prompt - request.done
            if policy == "whole" and left > room and chosen:
                break
            tokens = left if policy == "whole" else min(left, room)
            if tokens <= 0:
                break
            chosen.append((request, tokens))
            room -= tokens
        return chosen, decoding

    def prefill(self) -> None:
        """One step with prompts in it."""
        chosen, decoding = self.prompts()
        if not chosen:  # decodes alone fill the step
            self.decode(1)
            return
        tokens = sum(count for _, count in chosen)
        before = sum(request.done for request, _ in chosen) / len(chosen)
        context = self.context / max(len(self.running), 1)
        self.now += self.seconds(decoding, context, len(chosen), tokens, before)
        if decoding:
            self.steps += 1
            self.context += decoding
            self.finish()
        for request, count in chosen:
            request.done += count
            if request.done >= request.prompt:
                self.waiting.popleft()  # in the order in which they came
                request.first = self.now
                self.context += request.prompt + 1
                heapq.heappush(self.running, (self.steps + request.answer - 1, request.number, request))

    def decode(self, most: int) -> None:
        """At most so many steps that only decode."""
        batch = len(self.running)
        count = min(most, self.running[0][0] - self.steps)
        context = self.context / batch + (count - 1) / 2
        each = self.seconds(batch, context, 0, 0, 0)
        if self.coming and not self.full and not self.noticed:
            until = int((self.coming[0][0] - self.now) / each) + 1
            count = max(min(count, until), 1)
        self.now += count * each
        self.weighed.append((count * each, batch, context))
        self.steps += count
        self.context += batch * count
        self.finish()

    @property
    def full(self) -> bool:
        """Whether the next request has to wait for another's end."""
        count = len(self.running) + len(self.waiting) + len(self.noticed)
        if not count:
            return False
        return count >= self.settings.max_requests or self.held + self.coming[0][2].prompt > self.room

    def finish(self) -> None:
        """Requests whose last token came with this step; their clients send the next."""
        while self.running and self.running[0][0] <= self.steps:
            request = heapq.heappop(self.running)[2]
            request.end = self.now
            self.context -= request.prompt + request.answer
            self.held -= request.prompt + request.answer
            self.ended.append(request)
            self.send(self.now)


def closed_loop(load: Load, settings: Settings, seconds: Seconds, copies: int = 1, room: float = np.inf) -> Run:
    """Run ``load`` against an engine of ``copies`` attention copies, whose steps take ``seconds``.

    ``room``: tokens whose keys and values there is memory for; requests beyond wait.
    """
    engine = _Engine(load, settings, seconds, copies, room)
    for _ in range(load.concurrency):
        engine.send(0.0)
    while engine.sent > len(engine.ended):
        engine.admit()
        if engine.waiting:
            engine.prefill()
            engine.join()
        elif engine.running:
            engine.decode(engine.undisturbed())
        elif engine.noticed:
            engine.join()
        else:
            engine.now = max(engine.now, engine.coming[0][0])
    return _run(engine)


def _run(engine: _Engine) -> Run:
    ended = engine.ended
    ttft = np.array([request.first - request.arrival for request in ended])
    tpot = np.array([(request.end - request.first) / (request.answer - 1) for request in ended])
    weight = np.array(engine.weighed) if engine.weighed else np.array([[1.0, 1.0, engine.load.isl]])
    share = weight[:, 0] / weight[:, 0].sum()
    tokens = sum(request.answer for request in ended)
    batch, context = float(share @ weight[:, 1]), float(share @ weight[:, 2])
    return Run(ttft, tpot, engine.now, tokens, batch, context)


def _length(longest: int, shortest: float, turn: float) -> int:
    """Evenly spread from ``shortest`` times the longest to the longest, without chance: the golden ratio's turns."""
    least = max(int(longest * shortest), 1)
    return least + int((longest + 1 - least) * (turn % 1.0))
