"""Batched decoding, and the text of answers."""

import asyncio
import contextlib
import random
import threading
import time

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from chatglm_int8.apps.server import cache_rows, sampling
from chatglm_int8.apps.server import scheduler as scheduler_module
from chatglm_int8.apps.server.answer_text import AnswerText
from chatglm_int8.apps.server.answers import Answer, Busy, Failed, Sampling, TimeLimit, Token, arrival, deliver
from chatglm_int8.apps.server.cache_rows import RowCache
from chatglm_int8.apps.server.scheduler import Scheduler, prefill_group


def prompts_for(model, count: int, seed: int = 0) -> list[list[int]]:
    """Prompts of 3 to 20 ids."""
    generator = random.Random(seed)
    low = max(model.config.bos_token_id, model.config.eos_token_id, model.config.gmask_token_id) + 1
    ids = range(6, model.config.mask_token_id) if low >= model.config.vocab_size else range(6, 60)
    end = [model.config.gmask_token_id, model.config.bos_token_id]
    return [[*generator.choices(ids, k=generator.randint(1, 18)), *end] for _ in range(count)]


def generated(model, prompt: list[int], sampling: Sampling) -> list[int]:
    """What `generate` answers."""
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    settings = {"max_new_tokens": sampling.max_new_tokens, "do_sample": sampling.temperature > 0}
    settings["min_new_tokens"] = sampling.min_new_tokens or None
    if settings["do_sample"]:
        settings.update(temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k)
    ids = model.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist()
    return ids[: ids.index(model.config.eos_token_id)] if model.config.eos_token_id in ids else ids


@contextlib.contextmanager
def scheduling(model, tokenizer=None, **options):
    # Of a tokenizer, only the length counts here.
    scheduler = Scheduler(model, tokenizer or range(model.config.vocab_size), **options)
    try:
        yield scheduler
    finally:
        scheduler.close()


def answers_of(scheduler: Scheduler, jobs: list[tuple[list[int], Sampling]]) -> list[list[Token]]:
    """The tokens of all jobs, submitted at once."""

    async def one(prompt, sampling):
        (answer,) = scheduler.submit(prompt, [sampling])
        return [token async for token in answer]

    async def all_of_them():
        return await asyncio.gather(*(one(*job) for job in jobs))

    return asyncio.run(all_of_them())


def ids_of(answers: list[list[Token]]) -> list[list[int]]:
    return [[token.id for token in answer] for answer in answers]


@pytest.mark.parametrize(
    ("name", "unit"), [("base", 1), ("base", 16), ("pos1d", 1), ("prefix", 1), ("prefix", 16), ("int8", 1), ("int4", 1)]
)
def test_batched_answers_are_those_of_generate(name, unit, golden_model, monkeypatch):
    """Greedy and sampled, each with its own seed and settings, in more answers than rows, in a cache that grows.

    T and padded prompts are a multiple of `unit`, as on a GPU.
    """
    monkeypatch.setattr(cache_rows, "FIRST_COLUMNS", 8)
    model = golden_model(name, attention="sdpa")
    generator = random.Random(1)
    jobs = []
    for index, prompt in enumerate(prompts_for(model, 12)):
        limit, least = generator.randint(1, 24), generator.choice([0, 0, 1, 8])
        warpers = generator.choice([(0, 1.0, 0), (0.95, 0.7, 50), (1.0, 1.0, 0), (1.7, 0.9, 20)])
        jobs.append((prompt, Sampling(limit, min(limit, least), *warpers, seed=index)))
    with scheduling(model, max_batch=5) as scheduler:
        scheduler._cache.unit = unit
        got = ids_of(answers_of(scheduler, jobs))
        again = ids_of([answers_of(scheduler, [job])[0] for job in jobs])
    expected = [generated(model, *job) for job in jobs]
    assert got == expected
    assert again == expected
    assert len({len(ids) for ids in got}) > 3


@pytest.mark.parametrize("warpers", [(1.0, 0, 1.0), (0.95, 50, 0.7), (1.7, 20, 0.9), (1.3, 4990, 0.8)])
def test_rows_are_drawn_as_by_multinomial(warpers):
    """Warped as transformers does it, with the same random numbers, and as many, as torch.multinomial on each row."""
    temperature, top_k, top_p = warpers
    steps = 3 * torch.randn(20, 3, 5000, generator=torch.Generator().manual_seed(1))
    expected = [[], [], []]
    for row in range(3):
        generator = torch.Generator().manual_seed(row)
        for scores in steps[:, row : row + 1]:
            for warp in (
                TemperatureLogitsWarper(temperature),
                TopKLogitsWarper(top_k or 5000),
                TopPLogitsWarper(top_p),
            ):
                scores = warp(None, scores)
            expected[row].append(int(torch.multinomial(scores.softmax(dim=-1), 1, generator=generator)))
    generators = [torch.Generator().manual_seed(row) for row in range(3)]
    got = []
    for scores in steps:
        noise = torch.stack([torch.empty(5000).exponential_(generator=generator) for generator in generators])
        got.append(sampling.draw(scores, noise, *warpers).tolist())
    assert [list(row) for row in zip(*got, strict=True)] == expected


def test_penalties_and_logprobs(golden_model):
    """Against OpenAI's formula, token by token."""
    model = golden_model("base", attention="sdpa")
    (prompt,) = prompts_for(model, 1)
    sampling = Sampling(12, temperature=0, presence_penalty=1.5, frequency_penalty=0.7, top_logprobs=3)
    with scheduling(model) as scheduler:
        plain, answer = answers_of(scheduler, [(prompt, Sampling(12, temperature=0)), (prompt, sampling)])
    ids = list(prompt)
    for token in answer:
        with torch.no_grad():
            scores = model(torch.tensor([ids])).logits[0, -1].float()
        logprobs = scores.log_softmax(dim=-1)
        assert token.logprob == pytest.approx(float(logprobs[token.id]), abs=1e-4)
        values, best = logprobs.topk(3)
        assert [pair[0] for pair in token.top] == best.tolist()
        assert [pair[1] for pair in token.top] == pytest.approx(values.tolist(), abs=1e-4)
        for other in set(ids[len(prompt) :]):
            scores[other] -= 1.5 + 0.7 * ids[len(prompt) :].count(other)
        assert token.id == int(scores.argmax())
        ids.append(token.id)
    assert ids_of([plain]) != ids_of([answer])
    assert plain[0].logprob is None


def test_ids_without_text_are_never_chosen(golden_model):
    """However hot the sampling is, and not among the likeliest either: embeddings have more rows than vocabularies."""
    model = golden_model("base", attention="sdpa")
    (prompt,) = prompts_for(model, 1)
    known = model.config.vocab_size // 2
    sampling = Sampling(40, temperature=1e30, top_p=1.0, top_k=0, seed=1, top_logprobs=20)
    with scheduling(model, tokenizer=range(known)) as scheduler:
        (answer,) = answers_of(scheduler, [(prompt, sampling)])
    assert len(answer) == 40
    assert all(index < known for token in answer for index in (token.id, *dict(token.top)))


def test_cancelled_answers_leave_before_the_next_step(golden_model, monkeypatch):
    model = golden_model("base", attention="sdpa")
    model.config.eos_token_id = -1  # nothing ends by itself
    (prompt,) = prompts_for(model, 1)
    with scheduling(model, max_batch=2, max_queue=2) as scheduler:
        rows = []
        step = scheduler._step
        monkeypatch.setattr(scheduler, "_step", lambda: (rows.append(list(scheduler._rows)), step()))

        async def run():
            first, second, queued = scheduler.submit(prompt, [Sampling(60) for _ in range(3)])
            async for _ in first:
                break
            first.cancel()
            seen = len(rows)
            ids = [token.id async for token in second]
            assert len([token async for token in first]) <= seen + 1
            assert first.finish_reason == "cancelled"
            queued_ids = [token.id async for token in queued]
            assert len(ids) == len(queued_ids) == 60
            return first, seen

        first, seen = asyncio.run(run())
        # A step may have been on its way when `cancel` was called.
        assert all(first not in step_rows for step_rows in rows[seen + 1 :])
        assert rows[-1]


def test_several_answers_are_followed_at_once():
    """What came before a failure is given first."""

    async def run():
        first, second = (Answer([1], Sampling(3), deadline=0) for _ in range(2))
        deliver([(second, Token(1)), (second, Token(2)), (second, Failed("broken"))])
        await arrival([first, second])
        assert first.take() == []
        assert ids_of([second.take()]) == [[1, 2]]
        await arrival([first, second])
        with pytest.raises(Failed):
            second.take()
        waiting = asyncio.ensure_future(arrival([first, second]))
        await asyncio.sleep(0)
        assert not waiting.done()
        deliver([(first, Token(3)), (first, "length")])
        await waiting
        assert ids_of([first.take()]) == [[3]]
        assert first.finish_reason == "length"

    asyncio.run(run())


def test_full_queue_takes_all_or_nothing(golden_model):
    model = golden_model("base", attention="sdpa")
    (prompt,) = prompts_for(model, 1)
    with scheduling(model, max_batch=1, max_queue=2) as scheduler:

        async def run():
            answers = scheduler.submit(prompt, [Sampling(40)] * 3)
            with pytest.raises(Busy):
                scheduler.submit(prompt, [Sampling(40)])
            for answer in answers[1:]:
                answer.cancel()
            tokens = [token async for token in answers[0]]
            for _ in range(100):  # both have left by now, or are about to
                if not scheduler.waiting + scheduler.running:
                    break
                await asyncio.sleep(0.05)
            with pytest.raises(Busy):
                scheduler.submit(prompt, [Sampling(40)] * 4)
            assert not scheduler.waiting + scheduler.running
            return tokens

        assert asyncio.run(run())


def test_time_limit_and_close(golden_model):
    model = golden_model("base", attention="sdpa")
    model.config.eos_token_id = -1
    (prompt,) = prompts_for(model, 1)
    scheduler = Scheduler(model, range(model.config.vocab_size), max_batch=1, time_limit=0.05)

    async def late():
        answers = scheduler.submit(prompt, [Sampling(10_000)] * 2)
        scheduler.time_limit = 60
        for answer in answers:  # one running, one waiting
            with pytest.raises(TimeLimit):
                async for _ in answer:
                    pass
        (last,) = scheduler.submit(prompt, [Sampling(10_000)])
        async for _ in last:
            break
        await asyncio.to_thread(scheduler.close)
        with pytest.raises(Failed, match="shutting down"):
            async for _ in last:
                pass
        with pytest.raises(Failed, match="shutting down"):
            scheduler.submit(prompt, [Sampling(1)])

    model.config.max_sequence_length = 100_000
    scheduler.max_length = 100_000
    scheduler._cache._limit = 100_000
    asyncio.run(late())


@pytest.mark.parametrize("error", [RuntimeError("secret path"), torch.OutOfMemoryError("secret path")])
def test_a_failed_step_fails_its_answers_alone(error, golden_model, monkeypatch):
    model = golden_model("base", attention="sdpa")
    jobs = [(prompt, Sampling(8, seed=3)) for prompt in prompts_for(model, 3)]
    expected = [generated(model, *job) for job in jobs]
    with scheduling(model) as scheduler:
        step = scheduler._step

        def fail():
            raise error

        monkeypatch.setattr(scheduler, "_step", fail)
        with pytest.raises(Failed) as failure:
            answers_of(scheduler, jobs)
        assert "secret" not in str(failure.value)
        monkeypatch.setattr(scheduler, "_step", step)
        assert ids_of(answers_of(scheduler, jobs)) == expected
        assert scheduler.healthy


@pytest.mark.parametrize(
    ("error", "counts"), [(RuntimeError("secret"), True), (torch.OutOfMemoryError("secret"), False)]
)
def test_a_prompt_that_fails(error, counts, golden_model, monkeypatch):
    """Its client is told; three in a row that are not for want of memory, and the scheduler is broken."""
    job = ([7, 8, 501, 504], Sampling(4, seed=1, min_new_tokens=4))
    with scheduling(golden_model("base", attention="sdpa")) as scheduler:
        prefill = scheduler._prefill

        def fail(group):
            raise error

        monkeypatch.setattr(scheduler, "_prefill", fail)
        for i in range(3):
            with pytest.raises(Failed) as failure:
                answers_of(scheduler, [job])
            assert "secret" not in str(failure.value)
            assert scheduler.healthy == (i < 2 or not counts)
        monkeypatch.setattr(scheduler, "_prefill", prefill)
        assert len(answers_of(scheduler, [job])[0]) == 4
        assert scheduler.healthy


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite(value, golden_model):
    """No answer is made of them; those of prompts neither."""
    model = golden_model("base", attention="sdpa")
    weight = model.transformer.final_layernorm.weight.data[0].clone()
    with scheduling(model) as scheduler:
        model.transformer.final_layernorm.weight.data[0] = value
        for options in ({"temperature": 0}, {}, {"top_logprobs": 2}, {"top_logprobs": 2, "prompt_logprobs": True}):
            with pytest.raises(Failed, match="NaN or infinite"):
                answers_of(scheduler, [([7, 8, 501, 504, 9], Sampling(3, **options))])
        model.transformer.final_layernorm.weight.data[0] = weight
        assert scheduler.healthy
        (ids,) = ids_of(answers_of(scheduler, [([7, 8, 501, 504], Sampling(3, 3))]))
        assert len(ids) == 3


def test_one_row_that_is_not_finite_fails_alone(golden_model, monkeypatch):
    model = golden_model("base", attention="sdpa")
    job = ([7, 8, 501, 504], Sampling(6, 6, temperature=0))
    with scheduling(model) as scheduler:
        expected = answers_of(scheduler, [job])
        scores = scheduler._scores

        def broken(logits):
            monkeypatch.setattr(scheduler, "_scores", scores)
            found = scores(logits)
            found[0, 3] = torch.nan
            return found

        async def run():
            first, second = scheduler.submit(job[0], [job[1]] * 2)
            with pytest.raises(Failed, match="NaN"):
                async for _ in first:
                    pass
            return [token async for token in second]

        monkeypatch.setattr(scheduler, "_scores", broken)
        ids = [token.id for token in asyncio.run(run())]
        assert [ids] == ids_of(expected)


@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt(), MemoryError()])
def test_an_end_of_the_thread_is_told(error, golden_model, monkeypatch):
    """To all that wait and to all that come; MemoryError ends no thread."""
    job = ([7, 8, 501, 504], Sampling(4))
    with scheduling(golden_model("base", attention="sdpa"), max_batch=1) as scheduler:

        def fail(_):
            raise error

        monkeypatch.setattr(scheduler, "_prefill", fail)

        async def run():
            for answer in scheduler.submit(job[0], [job[1]] * 3):
                with pytest.raises(Failed):
                    async for _ in answer:
                        pass
            if not isinstance(error, MemoryError):
                scheduler._thread.join()
                with pytest.raises(Failed, match="restarted"):
                    scheduler.submit(*job[:1], [job[1]])

        asyncio.run(asyncio.wait_for(run(), 20))
        assert scheduler.healthy == isinstance(error, MemoryError)


def test_memory_that_is_short_on_a_cpu_is_no_fault(golden_model, monkeypatch):
    """PyTorch raises a RuntimeError there."""
    job = ([7, 8, 501, 504], Sampling(4))
    with scheduling(golden_model("base", attention="sdpa")) as scheduler:

        def fail(_):
            torch.empty(1 << 55, dtype=torch.uint8)

        monkeypatch.setattr(scheduler, "_prefill", fail)
        for _ in range(4):
            with pytest.raises(Failed, match="out of memory"):
                answers_of(scheduler, [job])
        assert scheduler.healthy


def test_a_step_that_hangs(golden_model, monkeypatch):
    """Clients are told at their time limit, and health tells."""
    monkeypatch.setattr(scheduler_module, "GRACE", 0.0)
    hang = threading.Event()
    with scheduling(golden_model("base", attention="sdpa"), time_limit=0.2) as scheduler:
        monkeypatch.setattr(scheduler, "_prefill", lambda group: hang.wait(20))

        async def run():
            for answer in scheduler.submit([7, 8, 501, 504], [Sampling(4)] * 2):
                with pytest.raises(TimeLimit):
                    async for _ in answer:
                        pass

        asyncio.run(asyncio.wait_for(run(), 10))
        assert not scheduler.healthy
        hang.set()


def test_the_time_limit_counts_from_the_door(golden_model):
    with scheduling(golden_model("base", attention="sdpa"), time_limit=60) as scheduler:

        async def run():
            (answer,) = scheduler.submit([7, 8, 501, 504], [Sampling(4)], since=time.monotonic() - 61)
            with pytest.raises(TimeLimit):
                async for _ in answer:
                    pass

        asyncio.run(run())


def test_a_step_is_one_message(golden_model, monkeypatch):
    """Of all rows, and of the end of some."""
    with scheduling(golden_model("base", attention="sdpa")) as scheduler:

        async def run():
            loop, calls = asyncio.get_running_loop(), []
            hand_over = loop.call_soon_threadsafe
            monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *given: (calls.append(given), hand_over(*given)))
            answers = scheduler.submit([7, 8, 501, 504], [Sampling(10, 10)] * 5)
            for answer in answers:
                assert len([token async for token in answer]) == 10
            return len(calls)

        assert asyncio.run(run()) <= 10


def test_without_a_seed_answers_differ(golden_model):
    job = ([7, 8, 501, 504], Sampling(8, temperature=2.0, top_p=1.0, min_new_tokens=8))
    with scheduling(golden_model("base", attention="sdpa")) as scheduler:
        assert len(set(map(tuple, ids_of(answers_of(scheduler, [job] * 4))))) > 1


def test_an_answer_ends_where_the_room_does(golden_model):
    model = golden_model("base", attention="sdpa")
    model.config.eos_token_id = -1

    async def run() -> tuple[int, str]:
        (answer,) = scheduler.submit([7, 8, 501, 504], [Sampling(10_000, temperature=0)])
        return len([token async for token in answer]), answer.finish_reason

    with scheduling(model, max_length=20) as scheduler:
        assert asyncio.run(run()) == (16, "length")


def test_those_who_wait_may_leave_or_be_late(golden_model):
    model = golden_model("base", attention="sdpa")
    model.config.eos_token_id = -1
    prompt = [7, 8, 501, 504]

    async def run() -> None:
        (first,) = scheduler.submit(prompt, [Sampling(1500)])
        async for _ in first:
            break
        (gone,) = scheduler.submit(prompt, [Sampling(5)])
        scheduler.time_limit = 0.05
        (late,) = scheduler.submit(prompt, [Sampling(5)])
        gone.cancel()
        assert [token async for token in gone] == []
        assert gone.finish_reason == "cancelled"
        with pytest.raises(TimeLimit):
            async for _ in late:
                pass
        assert (scheduler.waiting, scheduler.running, first.finish_reason) == (0, 1, None)
        first.cancel()

    with scheduling(model, max_batch=1) as scheduler:
        asyncio.run(run())


def test_rows_leave_nothing_behind(golden_model):
    """NaN in a row that left must not reach the one that takes its place."""
    model = golden_model("base", attention="sdpa")
    cache = RowCache(model, rows=3, columns=20)

    class Prefilled:
        def __init__(self, value: float):
            heads, width = model.config.num_attention_heads, model.config.hidden_size
            states = torch.full((1, heads, 9, width // heads), value)
            layer = type("Layer", (), {"keys": states, "values": states})
            self.layers = [layer] * model.config.num_layers

    for value, length in ((1.0, 4), (float("nan"), 9), (3.0, 2)):
        cache.append(Prefilled(value), 0, length)
    cache.remove(1)
    assert cache.lengths == [4, 2]
    for store in cache._stores:
        assert (store[:, 0, :, :4] == 1).all()
        assert (store[:, 1, :, :2] == 3).all()
        assert (store[:, 0, :, 4:] == 0).all()
        assert (store[:, 1, :, 2:] == 0).all()
        assert (store[:, 2] == 0).all()


def test_prompts_of_like_length_are_read_together():
    def waiting(*lengths):
        return [type("Answer", (), {"prompt": [0] * length, "length": length}) for length in lengths]

    def group(rows, *lengths):
        return [answer.length for answer in prefill_group(waiting(*lengths), rows)]

    assert group(8) == []
    assert group(8, 10, 12, 9) == [10, 12, 9]
    assert group(2, 10, 12, 9) == [10, 12]
    assert group(8, 10, 500, 12) == [10, 12]  # the long one is first next time
    assert group(8, 1500, 1400) == [1500]
    assert group(0, 3) == []
    assert [answer.length for answer in prefill_group(waiting(10, 60, 50, 12), 8, 200)] == [10, 60, 50]


class Characters:
    """A tokenizer of one that decodes each id to a string of a list."""

    def __init__(self, strings: list[str]):
        self.strings = strings

    def decode_stream(self):
        return type("Stream", (), {"step": lambda _, i: self.strings[i], "flush": lambda _: ""})()


def test_pieces_of_text_make_up_the_whole(golden_model):
    """However it is cut into tokens; with stop strings, up to the one that is complete first."""
    process = golden_model("base").process_response
    generator = random.Random(3)
    alphabet = [*"ab ,!?:;，中文\n[]", "[[训练时间]]", "[[训练时", "间]]", "ab\n", "b,"]
    stopped = 0
    for _ in range(4000):
        strings = generator.choices(alphabet, k=12)
        stop = [
            "".join(generator.choices("ab,，\n中 ", k=generator.randint(1, 3))) for _ in range(generator.randint(0, 2))
        ]
        chat = generator.random() < 0.7
        text = AnswerText(Characters(strings), process if chat else None, stop)
        got = ""
        for index in range(len(strings)):
            got += text.step(index)
            if text.stopped:
                break
        got += text.finish()

        whole = "".join(strings)
        if chat:
            space = whole[len(whole.rstrip()) :]
            whole = process(whole) + (space if process(whole) else "")
        found = [(whole.find(s) + len(s), whole.find(s)) for s in stop if s in whole]
        expected = whole[: min(found)[1]] if found else whole
        assert got == (expected.rstrip() if chat else expected), (strings, stop)
        assert text.stopped == bool(found)
        stopped += text.stopped
    assert 500 < stopped < 3500
