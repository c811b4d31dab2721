"""A tiny byte-level BPE tokenizer, trained in memory in some milliseconds, for tests that need no model."""

from __future__ import annotations

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = [
    "name : The Copper Kettle | food : Italian | area : riverside -> There is an Italian pub called The Copper Kettle",
    "the quick brown fox jumps over the lazy dog, and the dog was not amused at all.",
    "Reviews are excellent and prices are low. It is family-friendly and it is not far from the river.",
    '{"name": "Mara Lind", "age": 34, "city": "Oslo"}',
] * 4
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@cache
def tiny_tokenizer(vocabulary: int = 400, *, begin: bool = False) -> PreTrainedTokenizerFast:
    """`vocabulary` tokens: 4 special ones (<|im_end|> ends a text), all 256 bytes, and merges; with a chat template.

    begin: whether it puts its begin-of-text token before every text unless told not to, as Llama's does.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[attr-defined]
    core.decoder = decoders.ByteLevel()  # type: ignore[attr-defined]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(TEXT, trainer)
    if begin:
        core.post_processor = processors.TemplateProcessing(  # type: ignore[attr-defined]
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", special.index("<|im_start|>"))]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    made.chat_template = CHAT_TEMPLATE
    return made
