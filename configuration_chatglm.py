"""Configuration of ChatGLM-6B: one class, whose defaults are the INT8 release."""

from typing import ClassVar

import transformers

if int(transformers.__version__.split(".")[0]) < 5:  # before names that version 4 lacks
    raise ImportError(
        f"This code needs transformers 5 or newer, but version {transformers.__version__} is installed: "
        "pip install -U 'transformers>=5'."
    )

# isort: split
from transformers import PreTrainedConfig

# The Auto classes under which `trust_remote_code=True` finds the model; published files name only some of them.
_MODEL_AUTO_CLASSES = ("AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM")
_SIZES = (
    "vocab_size",
    "hidden_size",
    "inner_hidden_size",
    "num_layers",
    "num_attention_heads",
    "max_sequence_length",
)
_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "mask_token_id", "gmask_token_id", "pad_token_id")


class ChatGLMConfig(PreTrainedConfig):
    """The shape of a ChatGLM model. `ChatGLMConfig()` is the published ChatGLM-6B-INT8.

    Args:
        vocab_size: rows of the embedding and of the LM head, V. The vocabulary has 130344 pieces, the rest is padding.
        hidden_size: width of the residual stream.
        inner_hidden_size: width inside the MLP; None means 4 · hidden_size.
        num_layers: number of GLM blocks, L.
        num_attention_heads: H; the head width is D = hidden_size / H.
        max_sequence_length: tokens of one sequence, prompt and answer together, that the model was trained on.
        layernorm_epsilon: added to the variance in every LayerNorm.
        position_encoding_2d: two rows of positions, each rotating half of the head; False is ordinary rotary.
        bos_token_id, eos_token_id: `<sop>` and `<eop>`, which enclose the answer.
        mask_token_id, gmask_token_id: `[MASK]` and `[gMASK]`, the place that the answer fills.
        pad_token_id: `<pad>`, on the left.
        quantization_bit: 8 or 4 for int8 or int4 weights in the blocks' linears, 0 for float weights.
        quantization_embeddings: must be False: embedding and LM head stay in floating point.
        pre_seq_len: number of learned prefix positions of P-Tuning v2, P; None for none.
        prefix_projection: whether a two-layer network makes the prefix out of `hidden_size` numbers a position.
        use_cache: whether `forward` returns keys and values.
        tie_word_embeddings: the LM head is the embedding. The release relies on it without saying so.
        initializer_range: standard deviation of new weights.
        **kwargs: fields of `PreTrainedConfig`.

    Raises:
        ValueError: a field that this model cannot have.

    The fields are those of the release's `config.json`.
    """

    model_type = "chatglm"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]
    attribute_map: ClassVar[dict[str, str]] = {
        "num_hidden_layers": "num_layers",
        "max_position_embeddings": "max_sequence_length",
    }
    sep_token_id = None  # read by converters to other formats

    def __init__(
        self,
        vocab_size: int = 130528,
        hidden_size: int = 4096,
        inner_hidden_size: int | None = None,
        num_layers: int = 28,
        num_attention_heads: int = 32,
        max_sequence_length: int = 2048,
        layernorm_epsilon: float = 1e-5,
        position_encoding_2d: bool = True,
        bos_token_id: int = 130004,
        eos_token_id: int = 130005,
        mask_token_id: int = 130000,
        gmask_token_id: int = 130001,
        pad_token_id: int = 3,
        quantization_bit: int = 8,
        quantization_embeddings: bool = False,
        pre_seq_len: int | None = None,
        prefix_projection: bool = False,
        use_cache: bool = True,
        tie_word_embeddings: bool = True,
        initializer_range: float = 0.02,
        **kwargs,
    ):
        head_dim = kwargs.pop("head_dim", None)  # follows from the others
        super().__init__(**kwargs)
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.inner_hidden_size = inner_hidden_size if inner_hidden_size is not None else 4 * hidden_size
        self.num_layers = num_layers
        self.num_attention_heads = num_attention_heads
        self.max_sequence_length = max_sequence_length
        self.layernorm_epsilon = layernorm_epsilon
        self.position_encoding_2d = position_encoding_2d
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.mask_token_id = mask_token_id
        self.gmask_token_id = gmask_token_id
        self.pad_token_id = pad_token_id
        self.quantization_bit = quantization_bit
        self.quantization_embeddings = quantization_embeddings
        self.pre_seq_len = pre_seq_len
        self.prefix_projection = prefix_projection
        self.use_cache = use_cache
        self.tie_word_embeddings = tie_word_embeddings
        self.initializer_range = initializer_range
        self._check()
        if head_dim not in (None, self.head_dim):
            raise ValueError(
                f"ChatGLMConfig: head_dim is {head_dim!r}, and hidden_size / num_attention_heads is {self.head_dim}: "
                "leave head_dim out."
            )
        # Published files name only some of the Auto classes; complete them, keeping a "repository--" prefix.
        auto_map = dict(getattr(self, "auto_map", None) or {})
        model_class = auto_map.get("AutoModel", "modeling_chatglm.ChatGLMForConditionalGeneration")
        auto_map.setdefault("AutoConfig", "configuration_chatglm.ChatGLMConfig")
        for name in _MODEL_AUTO_CLASSES:
            auto_map.setdefault(name, model_class)
        self.auto_map = auto_map

    @property
    def head_dim(self) -> int:
        """D, the width of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def position_rows(self) -> int:
        """R, the rows of positions."""
        return 2 if self.position_encoding_2d else 1

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """A configuration out of the contents of `config.json`; those of FP16 releases do not mention quantisation."""
        return super().from_dict({"quantization_bit": 0, **config_dict}, **kwargs)

    def _check(self) -> None:
        def refuse(field: str, expected: str):
            raise ValueError(
                f"ChatGLMConfig: {field} is {getattr(self, field)!r}, expected {expected}. "
                "Correct it in config.json or in the arguments."
            )

        def is_int(value: object, least: int) -> bool:
            return isinstance(value, int) and value >= least

        for field in _SIZES:
            if not is_int(getattr(self, field), 1):
                refuse(field, "a positive whole number")
        if self.quantization_bit not in (0, 4, 8):
            refuse("quantization_bit", "0 (float weights), 4 or 8")
        if self.quantization_embeddings:
            refuse("quantization_embeddings", "false: embedding and LM head stay in floating point")
        halves = 2 * self.position_rows
        if self.hidden_size % (self.num_attention_heads * halves):
            refuse("hidden_size", f"a multiple of {halves} · num_attention_heads = {self.num_attention_heads}")
        if self.quantization_bit == 4 and (self.hidden_size % 2 or self.inner_hidden_size % 2):
            refuse("inner_hidden_size", "an even number, since INT4 packs two columns in a byte")
        if self.pre_seq_len is not None and not is_int(self.pre_seq_len, 1):
            refuse("pre_seq_len", "a positive number of prefix positions, or null for none")
        for field in _SPECIAL_IDS:
            token_id = getattr(self, field)
            if token_id is not None and not (is_int(token_id, 0) and token_id < self.vocab_size):
                refuse(
                    field,
                    f"an id below vocab_size = {self.vocab_size} (the defaults are of the release's vocabulary: with "
                    f"another one, give all of {', '.join(_SPECIAL_IDS)})",
                )


ChatGLMConfig.register_for_auto_class()
