"""The closed loop against a scheduler that is played token by token, and what must hold for any load."""

from collections import deque

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as how
from hypothesis import strategies as st

from moeplan.planner.serving import Load, Settings, closed_loop

POLICIES = ("mixed", "whole", "prefill_first")


def seconds(batch: float, context: float, prompts: float, tokens: float, before: float) -> float:
    """Of a step: a launch, and more for every token and every token looked back at."""
    return 1e-3 + 1e-5 * batch + 1e-8 * batch * context + 2e-5 * tokens + 1e-9 * tokens * before


def lengths(load: Load) -> list[tuple[int, int]]:
    """Prompt and answer of every request, in the order in which they are sent, as the loop spreads them."""
    golden = (5**0.5 - 1) / 2

    def between(longest: int, turn: float) -> int:
        least = max(int(longest * load.shortest), 1)
        return least + int((longest + 1 - least) * (turn % 1.0))

    count = load.concurrency * load.rounds
    return [(between(load.isl, i * golden), max(between(load.osl, i * golden**2 + 0.5), 2)) for i in range(count)]


def played(load: Load, policy: str, chunk: int) -> tuple[float, float]:
    """Mean seconds to the first token and between tokens, one step after another."""
    todo = deque(lengths(load))
    now = 0.0
    waiting: deque[dict] = deque()
    running: list[dict] = []
    ttft: list[float] = []
    tpot: list[float] = []

    def send() -> None:
        if todo:
            prompt, answer = todo.popleft()
            waiting.append({"sent": now, "prompt": prompt, "done": 0, "answer": answer, "made": 0})

    for _ in range(load.concurrency):
        send()
    for _ in range(10**6):
        if not waiting and not running:
            break
        beside = [] if policy == "prefill_first" and waiting else list(running)
        room = chunk - len(beside)
        given_out = []
        for request in waiting:
            left = request["prompt"] - request["done"]
            if policy == "whole":
                if left > room and given_out:
                    break
                count = left
            else:
                count = min(left, room)
            if count <= 0:
                break
            given_out.append((request, count))
            room -= count
        if not given_out:
            beside = list(running)
        context = sum(r["prompt"] + r["made"] for r in beside) / max(len(beside), 1)
        tokens = sum(count for _, count in given_out)
        before = sum(r["done"] for r, _ in given_out) / max(len(given_out), 1)
        now += seconds(len(beside), context, len(given_out), tokens, before)
        for request in beside:
            request["made"] += 1
        ended = sorted((r for r in beside if r["made"] == r["answer"]), key=lambda r: r["sent"])
        for request in ended:
            running.remove(request)
            tpot.append((now - request["first"]) / (request["answer"] - 1))
        for request, count in given_out:
            request["done"] += count
            if request["done"] == request["prompt"]:
                waiting.popleft()
                request["first"], request["made"] = now, 1
                ttft.append(now - request["sent"])
                running.append(request)
        for _ in ended:
            send()
    return float(np.mean(ttft)), float(np.mean(tpot))


def engine(policy: str, chunk: int) -> Settings:
    """Without the time outside the model and without steps on their way, which the play has not."""
    return Settings(policy, chunk, overlaps=False)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    "load",
    [
        Load(40, 12, 1, 1.0, 3),
        Load(40, 12, 5, 0.5, 4),
        Load(100, 60, 16, 0.8, 5),
        Load(300, 9, 24, 0.8, 4),
        Load(7, 200, 9, 0.3, 3),
    ],
)
def test_runs_of_equal_steps_are_the_steps_one_by_one(policy: str, load: Load) -> None:
    run = closed_loop(load, engine(policy, 128), seconds)
    first, between = played(load, policy, 128)
    assert len(run.ttft) == load.concurrency * load.rounds
    assert run.ttft.mean() == pytest.approx(first, rel=0.02)
    assert run.tpot.mean() == pytest.approx(between, rel=0.02)


@given(
    policy=st.sampled_from(POLICIES),
    isl=st.integers(1, 300),
    osl=st.integers(2, 80),
    clients=st.integers(1, 30),
    chunk=st.integers(1, 200),
    interval=st.integers(1, 12),
    most=st.integers(1, 40),
    room=st.integers(1, 5000),
)
@how(max_examples=60, deadline=None)
def test_every_request_is_answered(
    policy: str, isl: int, osl: int, clients: int, chunk: int, interval: int, most: int, room: int
) -> None:
    """Whatever the engine's limits: nothing is lost, nothing waits for ever, and no time is negative."""
    settings = Settings(policy, chunk, recv_interval=interval, max_requests=most)
    load = Load(isl, osl, clients, 0.7, rounds=3)
    run = closed_loop(load, settings, seconds, room=float(room))
    assert len(run.ttft) == clients * 3
    assert (run.ttft > 0).all()
    assert (run.tpot > 0).all()
    assert run.tokens >= clients * 3 * 2
    assert run.mean_batch <= min(clients, max(most, 1)) + 1e-9


def test_more_clients_wait_longer() -> None:
    runs = [closed_loop(Load(200, 40, clients, 0.8), engine("mixed", 128), seconds) for clients in (1, 4, 16, 64)]
    ttft, tpot = [r.ttft.mean() for r in runs], [r.tpot.mean() for r in runs]
    assert ttft == sorted(ttft)
    assert tpot == sorted(tpot)
    rate = [r.tokens / r.seconds for r in runs]
    assert rate == sorted(rate)


def test_requests_wait_for_memory() -> None:
    load = Load(100, 50, 20, 1.0, 5)
    free = closed_loop(load, engine("mixed", 512), seconds)
    tight = closed_loop(load, engine("mixed", 512), seconds, room=5 * 150.0)
    assert tight.mean_batch <= 5
    assert tight.ttft.mean() > 3 * free.ttft.mean()


def test_a_scheduler_that_looks_rarely_answers_late() -> None:
    load = Load(100, 400, 4, 0.5, 6)
    runs = [closed_loop(load, Settings("mixed", 512, recv_interval=every), seconds) for every in (1, 10, 30)]
    assert runs[0].ttft.mean() < runs[1].ttft.mean() < runs[2].ttft.mean()


def test_twice_the_same() -> None:
    one, two = (closed_loop(Load(64, 32, 8, 0.8), engine("mixed", 64), seconds) for _ in range(2))
    assert np.array_equal(one.ttft, two.ttft)
    assert np.array_equal(one.tpot, two.tpot)
