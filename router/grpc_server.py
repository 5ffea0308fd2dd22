"""The gRPC surface: the methods of splitserve.v1.SplitServe."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from splitserve.cluster.errors import InvalidRequest, Overloaded, SplitserveError
from splitserve.cluster.messages import TokenLogprobs
from splitserve.cluster.sampling import SamplingParams
from splitserve.router.chat_template import Conversation
from splitserve.router.constraint import Constraint
from splitserve.router.deadline import Deadline
from splitserve.router.dispatcher import Dispatcher
from splitserve.router.metrics import outcome
from splitserve.router.output_buffer import Answered, Delta
from splitserve.router.request import Chunk, Summary
from splitserve.router.tenants import Tenant, Tenants
from splitserve.router.v1 import splitserve_pb2 as pb
from splitserve.router.validate import Validator

SERVICE: str = pb.DESCRIPTOR.services_by_name["SplitServe"].full_name
TRACEPARENT = "traceparent"  # W3C's header, as metadata
RETRY_AFTER = "retry-after-ms"  # trailing metadata of RESOURCE_EXHAUSTED
FINISH_REASONS = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
}
ANSWERED_REASONS: dict[int, Literal["stop", "length"]] = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
}

CONSTRAINTS = {field.name for field in pb.Sampling.DESCRIPTOR.oneofs_by_name["constraint"].fields}

Context = grpc.aio.ServicerContext[bytes, Message]
M = TypeVar("M", bound=Message)
R = TypeVar("R")


class SplitServe:
    """The service. `status` makes the answer to Status."""

    def __init__(
        self,
        validator: Validator,
        dispatcher: Dispatcher,
        tenants: Tenants,
        default_deadline_s: float,
        status: Callable[[], pb.StatusResponse],
    ) -> None:
        self._validator = validator
        self._dispatcher = dispatcher
        self._tenants = tenants
        self._default_deadline_s = default_deadline_s
        self._status = status

    def handlers(self) -> grpc.GenericRpcHandler:
        """All methods, for a server. They parse requests themselves, so that bytes which are none get a clear error."""
        stream, unary = grpc.unary_stream_rpc_method_handler, grpc.unary_unary_rpc_method_handler
        methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Generate": stream(self._method(pb.GenerateRequest, self._generate), response_serializer=_serialize),
            "Chat": stream(self._method(pb.ChatRequest, self._chat), response_serializer=_serialize),
            "Tokenize": unary(self._method(pb.TokenizeRequest, self._tokenize), response_serializer=_serialize),
            "Detokenize": unary(self._method(pb.DetokenizeRequest, self._detokenize), response_serializer=_serialize),
            "ListModels": unary(self._method(pb.ListModelsRequest, self._list_models), response_serializer=_serialize),
            "Trace": unary(self._method(pb.TraceRequest, self._trace), response_serializer=_serialize),
            "Status": unary(self._method(pb.StatusRequest, self._report_status), response_serializer=_serialize),
        }
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    async def _generate(self, request: pb.GenerateRequest, context: Context) -> None:
        self._tenant(context).check()
        self._validator.check_model(request.model)
        match request.WhichOneof("prompt"):
            case "text":
                token_ids = await self._validator.encode("text", request.text)
            case "token_ids":
                token_ids = await self._validator.encode("token_ids", request.token_ids.ids)
            case _:
                raise InvalidRequest("prompt", None, "give text or token_ids")
        await self._stream(token_ids, request, context)

    async def _chat(self, request: pb.ChatRequest, context: Context) -> None:
        self._tenant(context).check()
        self._validator.check_model(request.model)
        conversation = _conversation(request.messages)
        token_ids = await self._validator.encode_chat(conversation, remember=not request.cache_salt)
        await self._stream(token_ids, request, context)

    async def _stream(
        self, token_ids: list[int], request: pb.GenerateRequest | pb.ChatRequest, context: Context
    ) -> None:
        deadline = self._deadline(context)
        params, answered = _sampling_params(request.sampling), [_answered(sample) for sample in request.answered]
        if constraint := _constraint(request.sampling):
            async with deadline.bounds():
                params = await self._validator.constrain(params, constraint)
        self._validator.check_params(token_ids, params)
        self._validator.check_answered(answered, token_ids, params)

        async def write(chunk: Chunk) -> None:
            await context.write(_response(chunk))

        serve = partial(self._dispatcher.serve, priority=request.priority, traceparent=_traceparent(context))
        serve = partial(serve, cache_salt=self._validator.cache_salt(request.cache_salt))
        with (tenant := self._tenant(context)).request(len(token_ids), params.n):
            summary = await serve(token_ids, params, deadline, write, answered, tenant=tenant)
        await context.write(pb.GenerateResponse(request_id=summary.request_id, summary=_summary(summary)))

    async def _tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        self._tenant(context).take_request()
        self._validator.check_model(request.model)
        match request.WhichOneof("input"):
            case "text":
                token_ids = await self._validator.encode("text", request.text)
            case "conversation":
                token_ids = await self._validator.encode_chat(_conversation(request.conversation.messages))
            case _:
                raise InvalidRequest("input", None, "give text or a conversation")
        return pb.TokenizeResponse(token_ids=token_ids)

    async def _detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:
        self._tenant(context).take_request()
        self._validator.check_model(request.model)
        return pb.DetokenizeResponse(text=self._validator.decode(request.token_ids))

    async def _list_models(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        known = self._validator
        model = pb.Model(name=known.model, context=known.context, vocab_size=known.tokenizer.vocab_size)
        return pb.ListModelsResponse(models=[model])

    async def _trace(self, request: pb.TraceRequest, context: Context) -> pb.TraceResponse:
        return pb.TraceResponse(chrome_trace=self._dispatcher.recent.chrome_trace(request.request_id))

    async def _report_status(self, request: pb.StatusRequest, context: Context) -> pb.StatusResponse:
        return self._status()

    def _method(
        self, request_type: type[M], behaviour: Callable[[M, Context], Awaitable[R]]
    ) -> Callable[[bytes, Context], Awaitable[R]]:
        """A handler that knows its caller, parses its request, turns our errors into gRPC statuses and counts calls."""

        name, calls = request_type.DESCRIPTOR.name.removesuffix("Request"), self._dispatcher.metrics.calls

        async def handle(data: bytes, context: Context) -> R:
            try:
                with outcome(lambda code: calls.labels("grpc", name, code).inc()):
                    self._tenant(context)
                    return await behaviour(_parse(request_type, data), context)
            except SplitserveError as error:
                retry = _retry_after(error) if isinstance(error, Overloaded) else ()
                await context.abort(_status_code(error), str(error), retry)
                raise

        return handle

    def _deadline(self, context: Context) -> Deadline:
        remaining_s = context.time_remaining()
        return Deadline(self._default_deadline_s if remaining_s is None or math.isinf(remaining_s) else remaining_s)

    def _tenant(self, context: Context) -> Tenant:
        authorization = dict(context.invocation_metadata() or ()).get("authorization")
        return self._tenants.find(authorization if isinstance(authorization, str) else None)


def _retry_after(error: Overloaded) -> tuple[tuple[str, str], ...]:
    return ((RETRY_AFTER, str(math.ceil(error.retry_after_s * 1000))),)


def _parse(request_type: type[M], data: bytes) -> M:
    try:
        return request_type.FromString(data)
    except DecodeError as error:
        name = request_type.DESCRIPTOR.name
        raise InvalidRequest("request", data[:40], f"send a {name} whose strings are all valid UTF-8") from error


def _traceparent(context: Context) -> str | None:
    found = [value for key, value in context.invocation_metadata() or () if key == TRACEPARENT]
    return str(found[0]) if found else None


def _conversation(messages: Sequence[pb.Message]) -> Conversation:
    return [{"role": message.role, "content": message.content} for message in messages]


def _answered(sample: pb.Answered) -> Answered:
    return Answered(list(sample.token_ids), ANSWERED_REASONS.get(sample.finish_reason))


def _sampling_params(sampling: pb.Sampling) -> SamplingParams:
    """Sampling parameters with the defaults of SamplingParams for what is not set. They are not validated yet."""
    plain = {field.name: _plain(value) for field, value in sampling.ListFields() if field.name not in CONSTRAINTS}
    return SamplingParams(**plain)


def _constraint(sampling: pb.Sampling) -> Constraint | None:
    match sampling.WhichOneof("constraint"):
        case None:
            return None
        case "choice":
            return Constraint.choice(sampling.choice.texts, "choice")
        case kind:
            return Constraint(kind, getattr(sampling, kind), kind)


def _plain(value: Any) -> Any:
    """The Python value of a protobuf field: maps as dict, repeated fields as tuple."""
    if isinstance(value, Mapping):
        return dict(value)
    return value if isinstance(value, int | float) else tuple(value)


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


def _status_code(error: SplitserveError) -> grpc.StatusCode:
    return getattr(grpc.StatusCode, error.code, grpc.StatusCode.INTERNAL)


def _response(chunk: Chunk) -> pb.GenerateResponse:
    return pb.GenerateResponse(
        request_id=chunk.request_id,
        deltas=[_delta(delta) for delta in chunk.deltas],
        prompt_logprobs=_logprobs(chunk.prompt_logprobs),
    )


def _delta(delta: Delta) -> pb.Delta:
    return pb.Delta(
        index=delta.index,
        text=delta.text,
        token_ids=delta.token_ids,
        logprobs=_logprobs(delta.logprobs),
        finish_reason=FINISH_REASONS[delta.finish_reason],
    )


def _logprobs(entries: Sequence[TokenLogprobs]) -> list[pb.TokenLogprobs]:
    return [
        pb.TokenLogprobs(
            logprob=entry.logprob,
            top=[pb.TokenLogprob(token_id=token, logprob=logprob) for token, logprob in entry.top],
        )
        for entry in entries
    ]


def _summary(summary: Summary) -> pb.Summary:
    usage = pb.Usage(
        prompt_tokens=summary.prompt_tokens,
        cached_tokens=summary.cached_tokens,
        completion_tokens=summary.completion_tokens,
    )
    timings: dict[str, Any] = vars(summary.timings)
    return pb.Summary(
        usage=usage,
        timings=pb.Timings(**timings),
        prefill_engine=summary.placement.prefill,
        decode_engine=summary.placement.decode,
        losses=summary.losses,
    )
