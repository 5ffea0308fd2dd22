"""OpenAI's API by its official client, over fake engines that answer a prompt with its own tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from splitserve.cluster.errors import StartupError
from splitserve.router.fake_cluster import FakeCluster
from splitserve.router.fake_engine import Behaviour
from splitserve.router.service import RouterService
from tests.ports import free_port
from tests.router.routers import (
    CONTEXT,
    MODEL,
    eventually,
    model_folder,
    nothing_left,
    running_router,
    tokenizer,
    topology,
)

TEXT = "the quick brown fox"
MESSAGES: Any = [{"role": "user", "content": "Hello"}]

Scenario = Callable[[AsyncOpenAI, RouterService], Awaitable[None]]


def run(scenario: Scenario, cluster: FakeCluster, **router: Any) -> None:
    """Run `scenario` with a client that does not try again by itself."""

    async def main() -> None:
        async with running_router(cluster, **router) as (service, _):
            base_url = f"http://{service.http_address}/v1"
            async with AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
                await scenario(client, service)

    asyncio.run(main())


def echo(prompt: list[int], count: int, sample: int = 0) -> str:
    """The text that the fakes answer."""
    return tokenizer().decode([prompt[(len(prompt) + sample + step) % len(prompt)] for step in range(count)])


def test_a_completion_has_text_and_usage() -> None:
    async def scenario(client: AsyncOpenAI, service: RouterService) -> None:
        prompt = tokenizer().encode(TEXT)
        answer = await client.completions.create(model=MODEL, prompt=TEXT, max_tokens=9)
        (choice,) = answer.choices
        assert choice.text == echo(prompt, 9)
        assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
        assert answer.usage is not None
        counts = (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens)
        assert counts == (len(prompt), 9, len(prompt) + 9)
        assert answer.usage.prompt_tokens_details is not None
        assert answer.usage.prompt_tokens_details.cached_tokens == 0
        assert (answer.object, answer.model) == ("text_completion", MODEL)
        assert answer.id.startswith("cmpl-router-0-")
        by_default = await client.completions.create(model=MODEL, prompt=prompt)
        assert by_default.choices[0].text == echo(prompt, 16)
        at_the_end = await client.completions.create(model=MODEL, prompt=[5] * (CONTEXT - 3))
        assert at_the_end.usage is not None
        assert at_the_end.usage.completion_tokens == 3

    with FakeCluster() as cluster, nothing_left(cluster):
        run(scenario, cluster)


def test_several_prompts_are_answered_prompt_by_prompt() -> None:
    async def scenario(client: AsyncOpenAI, service: RouterService) -> None:
        texts = ["the quick", "END of text", "fox"]
        prompts = [tokenizer().encode(text) for text in texts]
        expected = [echo(prompt, 5, sample) for prompt in prompts for sample in range(2)]
        for given in (texts, prompts):
            answer = await client.completions.create(model=MODEL, prompt=given, n=2, max_tokens=5)
            assert [choice.text for choice in answer.choices] == expected
            assert [choice.index for choice in answer.choices] == list(range(6))
            assert answer.usage is not None
            assert answer.usage.completion_tokens == 30
            assert answer.usage.prompt_tokens == sum(map(len, prompts))
            streamed = [""] * 6
            async for chunk in await client.completions.create(
                model=MODEL, prompt=given, n=2, max_tokens=5, stream=True
            ):
                for choice in chunk.choices:
                    streamed[choice.index] += choice.text
            assert streamed == expected

    with FakeCluster() as cluster, nothing_left(cluster):
        run(scenario, cluster)


def test_a_streamed_chat_says_its_role_once_and_its_usage_last() -> None:
    async def scenario(client: AsyncOpenAI, service: RouterService) -> None:
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=MESSAGES,
            max_completion_tokens=8,
            n=2,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
        prompt = tokenizer().encode_chat(MESSAGES)
        for index in range(2):
            mine = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
            assert "".join(choice.delta.content or "" for choice in mine) == echo(prompt, 8, index)
            assert [choice.delta.role for choice in mine if choice.delta.role] == ["assistant"]
            assert [choice.finish_reason for choice in mine if choice.finish_reason] == ["length"]
        assert chunks[-1].choices == []
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 16
        assert not any(chunk.usage for chunk in chunks[:-1])
        assert {(chunk.id, chunk.object) for chunk in chunks} == {(chunks[0].id, "chat.completion.chunk")}

    with FakeCluster() as cluster, nothing_left(cluster):
        run(scenario, cluster)


def test_a_whole_chat_and_its_logprobs() -> None:
    async def scenario(client: AsyncOpenAI, service: RouterService) -> None:
        parts: Any = [{"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}]
        prompt = tokenizer().encode_chat(MESSAGES)
        answer = await client.chat.completions.create(
            model=MODEL, messages=parts, max_tokens=6, logprobs=True, top_logprobs=2
        )
        (choice,) = answer.choices
        assert (choice.message.role, choice.message.content) == ("assistant", echo(prompt, 6))
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert [entry.logprob for entry in choice.logprobs.content] == [-0.5] * 6
        said = [bytes(entry.bytes or []) for entry in choice.logprobs.content]
        assert said == [tokenizer().token_bytes(token) for token in prompt[:6]]
        unbounded = await client.chat.completions.create(model=MODEL, messages=MESSAGES)
        assert unbounded.choices[0].finish_reason == "length"

    with FakeCluster() as cluster, nothing_left(cluster):
        run(scenario, cluster)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 1, 4])
def test_echo_gives_the_log_probabilities_of_the_prompt(max_tokens: int, stream: bool) -> None:
    """As log-likelihood tasks ask for them, token ids and all."""

    async def scenario(client: AsyncOpenAI, service: RouterService) -> None:
        prompts = [tokenizer().encode("the 🙂 fox"), tokenizer().encode("stop here")]
        asked: Any = {"model": MODEL, "prompt": prompts, "max_tokens": max_tokens, "echo": True, "logprobs": 1}
        if stream:
            chunks = [chunk async for chunk in await client.completions.create(**asked, stream=True)]
        else:
            chunks = [await client.completions.create(**asked)]
            assert chunks[0].usage.completion_tokens == 2 * max_tokens
        for index, prompt in enumerate(prompts):
            parts = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
            shown = [part.logprobs for part in parts if part.logprobs]
            logprobs = [value for part in shown for value in part.token_logprobs]
            assert logprobs == [None] + [-0.5] * (len(prompt) - 1 + max_tokens)
            tops = [top for part in shown for top in part.top_logprobs]
            names = [name for part in shown for name in part.tokens]
            assert tops == [None] + [{name: -0.5} for name in names[1:]]
            offsets = [offset for part in shown for offset in part.text_offset]
            text = "".join(part.text for part in parts)
            assert text == tokenizer().decode(prompt) + echo(prompt, max_tokens)
            assert all(
                text[offset:].startswith(name)
                for offset, name in zip(offsets, names, strict=True)
                if "bytes:" not in name
            )
            assert any("bytes:" in name for name in names) == (index == 0)
            assert [part.finish_reason for part in parts if part.finish_reason] == ["length"]

    with FakeCluster() as cluster, nothing_left(cluster):
        run(scenario, cluster)


@pytest.mark.parametrize("text", ["<|im_start|>the<|im_end|> 🙂 fox", "the <|endoftext|><|im_end|>", "fox"])
def test_offsets_lie_in_the_text_where_prompts_have_special_tokens(text: str) -> None:
    """They are part of a text that is echoed as it came, and not of one that is made of token ids."""

    async def scenario(client: AsyncOpenAI, service: RouterService) -> None:
        ids = tokenizer().encode(text)
        special = sum(not tokenizer().decode([token]) for token in ids)
        for prompt in (text, ids):
            answer = await client.completions.create(model=MODEL, prompt=prompt, max_tokens=4, echo=True, logprobs=1)
            (choice,) = answer.choices
            shown: Any = choice.logprobs
            assert choice.text == (text if prompt is text else tokenizer().decode(ids)) + echo(ids, 4)
            named = list(zip(shown.text_offset, shown.tokens, strict=True))[: len(ids)]
            begun = [choice.text[offset:].startswith(name) for offset, name in named if "bytes:" not in name]
            assert begun.count(False) == (0 if prompt is text else special)
            assert shown.text_offset == sorted(shown.text_offset)
            assert shown.text_offset[len(ids)] == len(choice.text) - len(echo(ids, 4)), "where the answer begins"

    with FakeCluster() as cluster, nothing_left(cluster):
        run(scenario, cluster)


def test_every_sampling_parameter_arrives() -> None:
    async def scenario(client: AsyncOpenAI, service: RouterService) -> None:
        await client.completions.create(
            model=MODEL,
            prompt=TEXT,
            max_tokens=40,
            temperature=0.7,
            top_p=0.9,
            presence_penalty=0.1,
            frequency_penalty=0.2,
            seed=7,
            n=2,
            best_of=2,
            stop=["never"],
            logit_bias={"5": -1},
            logprobs=3,
            user="somebody",
            extra_body={
                "top_k": 11,
                "min_p": 0.05,
                "repetition_penalty": 1.1,
                "min_tokens": 2,
                "ignore_eos": True,
                "stop_token_ids": [9],
            },
        )
        plain = await client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=2)
        assert plain.choices

    seen: list[Any] = []
    with FakeCluster(on_step=lambda tokens: seen.extend(all_params(cluster))) as cluster:
        run(scenario, cluster)
    first = next(params for params in seen if params.n == 2)
    assert (first.temperature, first.top_p, first.top_k, first.min_p) == (0.7, 0.9, 11, 0.05)
    assert (first.presence_penalty, first.frequency_penalty, first.repetition_penalty) == (0.1, 0.2, 1.1)
    assert (first.seed, first.n, first.stop, first.stop_token_ids) == (7, 2, ("never",), (9,))
    assert (first.logit_bias, first.logprobs, first.prompt_logprobs) == ({5: -1.0}, 3, None)
    assert (first.max_tokens, first.min_tokens, first.ignore_eos) == (40, 2, True)
    plain = next(params for params in seen if params.n == 1)
    assert (plain.temperature, plain.max_tokens) == (1.0, 2)
    assert plain.seed > 2**20  # drawn anew each time: the chance of less is 2**-43


@pytest.mark.parametrize(("salt", "keys"), [("for Ann", ("for Ann",)), ("", ())])
def test_a_salt_keeps_cached_prefixes_apart(salt: str, keys: tuple[str, ...]) -> None:
    async def scenario(client: AsyncOpenAI, service: RouterService) -> None:
        body: Any = {"model": MODEL, "max_tokens": 4, "extra_body": {"cache_salt": salt}}
        await client.completions.create(prompt=TEXT, **body)
        await client.chat.completions.create(messages=MESSAGES, **body)

    def look(tokens: Any) -> None:
        seen.update(job.message.extra_keys for engine in cluster.engines.values() for job in engine.jobs.values())

    seen: set[tuple[str, ...]] = set()
    with FakeCluster(on_step=look) as cluster:
        run(scenario, cluster)
    assert seen == {keys}


def all_params(cluster: FakeCluster) -> list[Any]:
    return [job.message.params for engine in cluster.engines.values() for job in engine.jobs.values()]


def test_a_stop_string_is_not_shown() -> None:
    async def scenario(client: AsyncOpenAI, service: RouterService) -> None:
        answer = await client.completions.create(model=MODEL, prompt="abc END def ", max_tokens=100, stop="END de")
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("abc ", "stop")

    with FakeCluster(behaviour=Behaviour(step_s=0.02)) as cluster, nothing_left(cluster):
        run(scenario, cluster)


def test_the_synchronous_client_lists_models_and_streams() -> None:
    def talk(address: str) -> None:
        with OpenAI(base_url=f"http://{address}/v1", api_key="none") as client:
            (model,) = client.models.list()
            assert (model.id, model.owned_by, model.to_dict()["max_model_len"]) == (MODEL, "splitserve", CONTEXT)
            assert client.models.retrieve(MODEL).id == MODEL
            stream = client.completions.create(model=MODEL, prompt=TEXT, max_tokens=4, stream=True)
            assert "".join(chunk.choices[0].text for chunk in stream) == echo(tokenizer().encode(TEXT), 4)

    async def scenario(client: AsyncOpenAI, service: RouterService) -> None:
        await asyncio.to_thread(talk, str(service.http_address))

    with FakeCluster() as cluster, nothing_left(cluster):
        run(scenario, cluster)


def test_tokens_there_and_back() -> None:
    async def scenario(client: AsyncOpenAI, service: RouterService) -> None:
        at_root = client.with_options(base_url=f"http://{service.http_address}")
        tokens: Any = await at_root.post("/tokenize", body={"prompt": TEXT}, cast_to=object)
        assert tokens["tokens"] == tokenizer().encode(TEXT)
        assert (tokens["count"], tokens["max_model_len"]) == (len(tokens["tokens"]), CONTEXT)
        back: Any = await at_root.post("/detokenize", body={"tokens": tokens["tokens"]}, cast_to=object)
        assert back == {"prompt": TEXT}
        chat: Any = await at_root.post("/tokenize", body={"messages": MESSAGES}, cast_to=object)
        assert chat["tokens"] == tokenizer().encode_chat(MESSAGES)

    with FakeCluster() as cluster:
        run(scenario, cluster)


def test_health_tells_the_truth_about_the_pools() -> None:
    async def scenario(client: AsyncOpenAI, service: RouterService) -> None:
        at_root = client.with_options(base_url=f"http://{service.http_address}")
        ready = {"engines": 1, "ready": 1}
        healthy: Any = await at_root.get("/health", cast_to=object)
        assert healthy == {"status": "ready", "pools": {"prefill": ready, "decode": ready}}
        service.set_members(cluster.members[:1])
        await asyncio.sleep(0.05)
        with pytest.raises(openai.APIStatusError) as caught:
            await at_root.get("/health", cast_to=object)
        assert caught.value.status_code == 503
        body: Any = caught.value.response.json()
        assert body["reason"] == "no decode worker is ready"
        assert body["pools"] == {"prefill": ready, "decode": {"engines": 0, "ready": 0}}
        with pytest.raises(openai.InternalServerError, match="not all pools have a worker that is ready") as late:
            await client.completions.create(model=MODEL, prompt=TEXT, extra_headers={"x-request-timeout": "0.2"})
        assert late.value.status_code == 504

    with FakeCluster() as cluster:
        run(scenario, cluster)


def test_a_full_queue_is_429_with_a_retry_time() -> None:
    async def scenario(client: AsyncOpenAI, service: RouterService) -> None:
        one = asyncio.ensure_future(client.completions.create(model=MODEL, prompt=[5, 6], max_tokens=200))
        await eventually(lambda: service.dispatcher.admission.active)
        with pytest.raises(openai.RateLimitError) as caught:
            await client.completions.create(model=MODEL, prompt=TEXT)
        assert int(caught.value.response.headers["retry-after"]) >= 1
        assert int(caught.value.response.headers["retry-after-ms"]) >= 100
        one.cancel()

    with FakeCluster(behaviour=Behaviour(step_s=0.05)) as cluster, nothing_left(cluster):
        run(scenario, cluster, max_active=1, max_queue=0)


def test_a_deadline_of_the_requests_own() -> None:
    async def scenario(client: AsyncOpenAI, service: RouterService) -> None:
        headers = {"x-request-timeout": "0.2"}
        with pytest.raises(openai.InternalServerError, match=r"0\.2 s passed while decoding") as caught:
            await client.completions.create(model=MODEL, prompt=[5, 6], max_tokens=200, extra_headers=headers)
        assert caught.value.status_code == 504
        for wrong in ("soon", "0", "nan", "-1"):
            with pytest.raises(openai.BadRequestError, match="x-request-timeout"):
                await client.completions.create(model=MODEL, prompt=TEXT, extra_headers={"x-request-timeout": wrong})

    with FakeCluster(behaviour=Behaviour(step_s=0.05)) as cluster, nothing_left(cluster):
        run(scenario, cluster)


def test_a_stream_that_fails_says_so_in_its_last_event() -> None:
    async def scenario(client: AsyncOpenAI, service: RouterService) -> None:
        asked: Any = {"model": MODEL, "prompt": [5, 6], "max_tokens": 200, "stream": True}
        stream = await client.completions.create(**asked, extra_headers={"x-request-timeout": "0.5"})
        await anext(stream)
        cluster.kill("decode/0/0")
        service.set_members(cluster.members)
        with pytest.raises(openai.APIError, match=r"0\.5 s passed"):
            async for _ in stream:
                pass

    with FakeCluster(behaviour=Behaviour(step_s=0.02)) as cluster, nothing_left(cluster):
        run(scenario, cluster)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_both_engines(stream: bool) -> None:
    async def scenario(client: AsyncOpenAI, service: RouterService) -> None:
        asked: Any = {"model": MODEL, "prompt": [[5, 6], [6, 7, 8]], "max_tokens": 200, "stream": stream}
        asking = asyncio.ensure_future(client.completions.create(**asked))
        await eventually(lambda: len(cluster.engines["decode/0/0"].decoding) == 2)
        if stream:
            chunks = await asking
            await anext(chunks)
            await chunks.close()
        else:
            asking.cancel()
        await eventually(lambda: not any(engine.jobs for engine in cluster.engines.values()), within_s=1.0)
        assert service.dispatcher.admission.active == 0

    with FakeCluster(behaviour=Behaviour(step_s=0.05)) as cluster:
        run(scenario, cluster)


def test_one_prompt_that_fails_ends_the_others() -> None:
    async def scenario(client: AsyncOpenAI, service: RouterService) -> None:
        with pytest.raises(openai.InternalServerError, match="the logits are not finite"):
            await client.completions.create(model=MODEL, prompt=[[5, 6], [6, 7, 8]], max_tokens=200)

    behaviour = Behaviour(fail_prefill=("INTERNAL", "the logits are not finite"))
    with FakeCluster(behaviour=behaviour) as cluster, nothing_left(cluster):
        run(scenario, cluster)


def test_a_router_that_stops_says_so_to_those_that_wait() -> None:
    async def main(cluster: FakeCluster) -> None:
        async with running_router(cluster) as (service, _):
            client = AsyncOpenAI(base_url=f"http://{service.http_address}/v1", api_key="none", max_retries=0)
            asked: Any = {"model": MODEL, "prompt": [5, 6], "max_tokens": 200}
            whole = asyncio.ensure_future(client.completions.create(**asked))
            stream = await client.completions.create(**asked, stream=True)
            await anext(stream)
        with pytest.raises(openai.InternalServerError, match="this router is going down"):
            await whole
        with pytest.raises(openai.APIError, match="this router is going down"):
            async for _ in stream:
                pass

    with FakeCluster(behaviour=Behaviour(step_s=0.05)) as cluster, nothing_left(cluster):
        asyncio.run(main(cluster))


def test_a_port_in_use_is_named() -> None:
    async def main() -> None:
        port = free_port()
        first = RouterService(topology(http=f"127.0.0.1:{port}"), model_folder())
        await first.start()
        with pytest.raises(StartupError, match=f"router.http: cannot listen on 127.0.0.1:{port}"):
            await RouterService(topology(http=f"127.0.0.1:{port}"), model_folder()).start()
        await first.stop()

    asyncio.run(main())
