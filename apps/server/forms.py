"""What clients send. Null stands for an argument that is left out, and what asks for nothing is dropped."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

# Arguments that this server doesn't have, with values that ask for nothing. So do null, false, "", [] and {}.

IDLE: dict[str, tuple] = {
    "add_generation_prompt": (True,),
    "add_special_tokens": (True,),
    "best_of": (1,),
    "function_call": ("none", "auto"),
    "length_penalty": (1,),
    "min_p": (0,),
    "modalities": (["text"],),
    "num_beams": (1,),
    "priority": (0,),
    "prompt_logprobs": (0,),
    "reasoning_effort": ("none",),
    "repeat_penalty": (1,),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "tool_choice": ("none", "auto"),
    "typical_p": (1,),
    "verbosity": ("medium",),
}


def asks_for_nothing(name: str, value: Any) -> bool:
    """Whether an argument that this server doesn't have can be dropped."""
    if name == "logit_bias" and isinstance(value, dict):
        return not any(value.values())
    return value is None or value is False or value in ("", [], {}) or value in IDLE.get(name, ())


class Form(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    ignored: ClassVar[frozenset[str]] = frozenset()  # arguments that are taken and not used

    @model_validator(mode="before")
    @classmethod
    def _without_idle_arguments(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {
            name: value
            for name, value in data.items()
            if (value is not None if name in cls.model_fields else not cls._is_idle(name, value))
        }

    @classmethod
    def _is_idle(cls, name: str, value: Any) -> bool:
        return name in cls.ignored or asks_for_nothing(name, value)


class TextPart(Form):
    ignored = frozenset({"annotations", "cache_control"})

    type: Literal["text"]
    text: str


def _given(content: Any) -> Any:
    if content is None:
        raise ValueError("a message needs its text, and has none (null). Give the text, or leave the message out")
    return content


class Message(Form):
    ignored = frozenset({"annotations", "cache_control", "id", "name", "reasoning", "reasoning_content", "refusal"})

    role: Literal["system", "developer", "user", "assistant"] = Field(description="developer is system.")
    content: Annotated[str | list[TextPart], BeforeValidator(_given)] = Field(None, validate_default=True)


class StreamOptions(Form):
    ignored = frozenset({"include_obfuscation"})

    include_usage: bool = False
    continuous_usage_stats: bool = Field(False, description="With include_usage: usage so far in every event.")


class SamplingForm(Form):
    ignored = frozenset(
        {
            "cache_prompt",
            "metadata",
            "parallel_tool_calls",
            "prompt_cache_key",
            "prompt_cache_retention",
            "request_id",
            "safety_identifier",
            "service_tier",
            "store",
            "user",
        }
    )

    model: str | None = Field(None, description="The name of the model, if at all.")
    temperature: float = Field(0.95, ge=0, le=2, description="0 takes the likeliest token each time.")
    top_p: float = Field(0.7, ge=0, le=1)
    top_k: int = Field(50, ge=0, description="0 or -1: none. Not in OpenAI's API; the default is that of model.chat.")
    seed: int | None = Field(None, ge=-(2**63), lt=2**64, description="Choice i of n has seed + i.")
    n: int = Field(1, ge=1, le=8)
    stop: str | list[str] = Field([], max_length=64, description="Up to 64 strings that end the answer.")
    max_tokens: int | None = Field(None, ge=1, description="-1, or more than there is room for: all the room.")
    min_tokens: int = Field(0, ge=0, description="The model does not end before. Not in OpenAI's API.")
    ignore_eos: bool = Field(False, description="The answer ends at max_tokens. Not in OpenAI's API.")
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _in_one_form(cls, data: Any) -> Any:
        """A stop string as a list; what other servers take for "no limit" as it is written here."""
        if not isinstance(data, dict):
            return data
        data = dict(data)
        if isinstance(data.get("stop"), str):
            data["stop"] = [data["stop"]] if data["stop"] else []
        for name, unlimited in (("max_tokens", None), ("max_completion_tokens", None), ("top_k", 0)):
            if data.get(name) == -1:
                data[name] = unlimited
        if data.get("best_of") == data.get("n", 1):
            data.pop("best_of", None)
        return data

    @property
    def limit(self) -> int | None:
        return self.max_tokens

    @property
    def reported(self) -> int | None:
        """How many likeliest tokens to report beside each token; None: nothing."""
        return None

    @property
    def scores_prompt(self) -> bool:
        """Whether the prompt's tokens are reported, too."""
        return False


class ChatForm(SamplingForm):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def reported(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionForm(SamplingForm):
    prompt: str | list[str] | list[int] | list[list[int]] = Field(
        description="A text, or its token ids, or several of either. Ids with `<sop>` are taken as they are."
    )
    max_tokens: int | None = Field(None, ge=0, description="-1, or more than there is room for: all the room.")
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool = Field(False, description="Give the prompt before the answer.")

    @model_validator(mode="before")
    @classmethod
    def _without_false(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("logprobs") is False:
            return {**data, "logprobs": None}
        return data

    @property
    def reported(self) -> int | None:
        return self.logprobs

    @property
    def scores_prompt(self) -> bool:
        return self.echo and self.logprobs is not None


class TokenizeForm(Form):
    ignored = frozenset({"model", "return_token_strs"})

    prompt: str | None = Field(None, description="A text; its ids have no [gMASK] <sop> behind them, unless asked for.")
    messages: list[Message] | None = Field(None, min_length=1, description="A conversation, instead of a text.")
    add_special_tokens: bool = False


class DetokenizeForm(Form):
    ignored = frozenset({"model"})

    tokens: list[int]


class PublicForm(Form):
    prompt: str
    history: list[Annotated[list[str], Field(min_length=2, max_length=2)]] = []
    max_length: int = Field(2048, ge=1)
    top_p: float = Field(0.7, ge=0, le=1)
    temperature: float = Field(0.95, ge=0)
