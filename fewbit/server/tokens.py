"""POST /tokenize and /detokenize: between texts and token ids, as the model will see them."""

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from fewbit.server.failures import Refusal, encoded
from fewbit.server.messages import prompt_of
from fewbit.server.protocol import DetokenizeBody, TokenizeBody
from fewbit.server.state import State


async def tokenize(http: HttpRequest) -> Response:
    state: State = http.app.state.fewbit
    body = await state.read(http, TokenizeBody)
    if (body.prompt is None) == (body.messages is None):
        raise Refusal(400, "want a prompt or messages, and not both", "prompt")
    if body.prompt is not None:
        ids = await state.text.encode(body.prompt, body.add_special_tokens is not False)
    else:
        _, ids = await prompt_of(state, body, body.tools or ())
    strings = [state.text.token(one) for one in ids] if body.return_token_strs else None
    found = {"count": len(ids), "max_model_len": state.max_len, "tokens": ids, "token_strs": strings}
    return Response(encoded(found), media_type="application/json")


async def detokenize(http: HttpRequest) -> Response:
    state: State = http.app.state.fewbit
    body = await state.read(http, DetokenizeBody)
    wrong = next((one for one in body.tokens if not 0 <= one < state.vocab), None)
    if wrong is not None:
        raise Refusal(
            400, f"tokens: {min(wrong, 1 << 63)} is no token id; they go from 0 to {state.vocab - 1}", "tokens"
        )
    return Response(encoded({"prompt": await state.text.decode(body.tokens)}), media_type="application/json")
