"""Bodies of requests as OpenAI has them, with vLLM's sampling fields beside. Unknown fields are refused, as there.

Types are checked here; what values a sampling field may have is SamplingParams' business.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field


class Quick(FailFast):
    """One wrong entry is enough: a long list of them is not gone through."""

    def __hash__(self) -> int:  # a union of types hashes what they are annotated with
        return hash(Quick)


Number = float | int
Object = dict[str, Any]
Ids = Annotated[list[int], Quick()]
Strings = Annotated[list[str], Quick()]
Objects = Annotated[list[Object], Quick()]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool | None = None


class Sampling(Body):
    """What chat and plain completions share."""

    model: str | None = None
    n: int | None = None
    best_of: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: int | None = None
    min_p: Number | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    repetition_penalty: Number | None = None
    seed: int | None = None
    stop: str | Strings | None = None
    stop_token_ids: Ids | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    logit_bias: Object | None = None
    allowed_token_ids: Ids | None = None
    bad_words: Strings | None = None
    logits_processors: list[Any] | None = None
    truncate_prompt_tokens: int | None = None
    use_beam_search: bool | None = None
    length_penalty: Number | None = None
    early_stopping: bool | None = None

    response_format: Object | None = None
    structured_outputs: Object | None = None
    guided_json: str | Object | None = None
    guided_regex: str | None = None
    guided_choice: Strings | None = None
    guided_grammar: str | None = None
    guided_decoding_backend: str | None = None
    guided_whitespace_pattern: str | None = None

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    add_special_tokens: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    return_token_ids: bool | None = None
    priority: int = Field(default=0, ge=-(1 << 31), lt=1 << 31)
    request_id: str | None = None
    user: str | None = None


class CompletionBody(Sampling):
    prompt: str | Strings | Ids | Annotated[list[Ids], Quick()]
    suffix: str | None = None
    echo: bool | None = None
    logprobs: int | None = None


class ToolFunction(Body):
    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: Object | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: ToolFunction


class Message(BaseModel):
    """Other fields (reasoning, and what a template may read besides) pass."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: str = Field(min_length=1, max_length=64)
    content: str | Objects | None = None
    name: str | None = None
    tool_calls: Objects | None = None
    tool_call_id: str | None = None


Messages = Annotated[list[Message], Quick()]
Tools = Annotated[list[Tool], Quick()]


class ChatBody(Sampling):
    messages: Messages = Field(min_length=1, max_length=4096)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: Tools | None = Field(default=None, max_length=256)
    tool_choice: str | Object | None = None
    parallel_tool_calls: bool | None = None
    functions: list[Any] | None = None
    function_call: str | Object | None = None
    modalities: Strings | None = None
    audio: Object | None = None
    web_search_options: Object | None = None
    prediction: Object | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    store: bool | None = None
    metadata: Object | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    echo: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    documents: Objects | None = None
    chat_template: str | None = None
    chat_template_kwargs: Object | None = None


class ResponsesBody(Body):
    model: str | None = None
    input: str | Objects
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_logprobs: int | None = None
    stream: bool | None = None
    stream_options: Object | None = None
    text: Object | None = None
    tools: Objects | None = None
    tool_choice: str | Object | None = None
    parallel_tool_calls: bool | None = None
    previous_response_id: str | None = None
    conversation: str | Object | None = None
    background: bool | None = None
    include: Strings | None = None
    prompt: Object | None = None
    reasoning: Object | None = None
    truncation: str | None = None
    max_tool_calls: int | None = None
    store: bool | None = None
    metadata: Object | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    user: str | None = None
    top_k: int | None = None
    min_p: Number | None = None
    repetition_penalty: Number | None = None
    seed: int | None = None
    stop: str | Strings | None = None
    ignore_eos: bool | None = None


class TokenizeBody(Body):
    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = Field(default=None, min_length=1, max_length=4096)
    tools: Tools | None = Field(default=None, max_length=256)
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: Object | None = None
    return_token_strs: bool = False


class DetokenizeBody(Body):
    model: str | None = None
    tokens: Ids


class EmbeddingsBody(BaseModel):
    """Refused whatever it holds."""
