"""A byte-pair tokenizer for the world's texts, with a chat template."""

import functools

from tinyworld.corpus import Document
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 704
CONTEXT = 256
BOS, END, PAD, UNKNOWN = "<|bos|>", "<|end|>", "<|pad|>", "<|unknown|>"
SPECIAL_TOKENS = [PAD, BOS, END, UNKNOWN, "<|system|>", "<|user|>", "<|assistant|>"]
# A turn is its role's token, the content and <|end|>, with nothing in between, so a
# conversation's tokens are always a prefix of the same conversation continued.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<|assistant|>' }}"
    "{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% elif message['role'] in ('system', 'user') %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% else %}{{ raise_exception('unknown role: ' + message['role']) }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(documents: list[Document]) -> PreTrainedTokenizerFast:
    """Byte-level BPE over printable ASCII: the world needs no other character."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    printable = "".join(map(chr, range(32, 127))) + "\n"
    alphabet = [pair[0] for pair in map(encode_byte_level, printable)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    texts = [part for d in documents for part in (d.prompt, d.text) if part]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        extra_special_tokens=SPECIAL_TOKENS[4:],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def encode_byte_level(character: str) -> str:
    """The stand-in that byte-level BPE uses for a character, a space's being `Ġ`."""
    return pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(character)[0][0]


class Encoder:
    """Turns documents into token ids, remembering the ones that come in every epoch."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.encode_chat = functools.lru_cache(maxsize=20_000)(self._encode_chat)

    def _encode_chat(self, document: Document) -> list[int]:
        text = self.tokenizer.apply_chat_template(document.messages(), tokenize=False)
        return self.tokenizer.encode(text)

    def encode(self, document: Document) -> list[int]:
        if document.prompt is None:
            return self.tokenizer.encode(document.text + END)
        return self.encode_chat(document)
