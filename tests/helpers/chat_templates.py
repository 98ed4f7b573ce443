"""Chat templates of well-known models, written for these tests after the formats that the models publish.

Source of each format: the named model's card, and chat_template in its tokenizer_config.json. The jinja is our own and
has the project's licence (Apache-2.0); no model's file was copied. It gives the same text for turns of system, user and
assistant, and leaves out tools and pictures. R1's special tokens have plain characters here.
"""

import functools
import json
from dataclasses import dataclass, replace
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lora_lab.dataset.shipped import SHIPPED


@dataclass(frozen=True, slots=True)
class Published:
    """A model's chat template and the tokens that it uses."""

    model: str
    template: str
    special: tuple[str, ...]
    eos: str
    bos: str | None = None


_IM = "{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}"
_IM_ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
_ALTERNATE = (
    "{% for m in turns %}{% if (m.role == 'user') != (loop.index0 is even) %}"
    "{{ raise_exception('roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% endfor %}"
)
_SYSTEM_APART = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set turns = messages[1:] %}"
    "{% else %}{% set turns = messages %}{% endif %}"
)

CHATML = Published(
    "ChatML",
    "{% for m in messages %}" + _IM + "{% endfor %}" + _IM_ASK,
    ("<|im_start|>", "<|im_end|>"),
    "<|im_end|>",
)
LLAMA_3 = Published(
    "meta-llama/Llama-3.2-1B-Instruct",
    _SYSTEM_APART + "{% if strftime_now is defined %}{% set today = strftime_now('%d %b %Y') %}{% endif %}"
    "{{ bos_token ~ '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n' ~"
    " 'Today Date: ' ~ (date_string or today) ~ '\n\n' ~ (system or '') | trim ~ '<|eot_id|>' }}"
    "{% for m in turns %}"
    "{{ '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\n\n' ~ m.content | trim ~ '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "<|eot_id|>",
    "<|begin_of_text|>",
)
MISTRAL = Published(  # the system prompt stands before the question only if that is the last turn of all
    "mistralai/Mistral-7B-Instruct-v0.3",
    _SYSTEM_APART + _ALTERNATE + "{{ bos_token }}{% for m in turns %}{% if m.role == 'user' %}"
    "{% if loop.last and system is defined %}{{ '[INST] ' ~ system ~ '\n\n' ~ m.content ~ '[/INST]' }}"
    "{% else %}{{ '[INST] ' ~ m.content ~ '[/INST]' }}{% endif %}"
    "{% else %}{{ ' ' ~ m.content | trim ~ eos_token }}{% endif %}{% endfor %}",
    ("<s>", "</s>", "[INST]", "[/INST]"),
    "</s>",
    "<s>",
)
MISTRAL_1 = Published(  # no system prompt; an end of turn that is followed by a space
    "mistralai/Mistral-7B-Instruct-v0.1",
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 is even) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ '[INST] ' ~ m.content ~ ' [/INST]' }}"
    "{% else %}{{ m.content ~ eos_token ~ ' ' }}{% endif %}{% endfor %}",
    ("<s>", "</s>"),
    "</s>",
    "<s>",
)
GEMMA = Published(
    "google/gemma-2-2b-it",
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% set turns = messages %}" + _ALTERNATE + "{% for m in turns %}"
    "{{ '<start_of_turn>' ~ ('model' if m.role == 'assistant' else m.role) ~ '\n' }}"
    "{{ m.content | trim ~ '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
    "<eos>",
    "<bos>",
)
PHI_3 = Published(  # whatever follows, a conversation without a generation prompt ends in the end of text
    "microsoft/Phi-3.5-mini-instruct",
    "{% for m in messages %}{{ '<|' ~ m.role ~ '|>\n' ~ m.content ~ '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
    "<|endoftext|>",
)
QWEN_2_5 = Published(
    "Qwen/Qwen2.5-7B-Instruct",
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a "
    "helpful assistant.<|im_end|>\n' }}{% endif %}{% for m in messages %}" + _IM + "{% endfor %}" + _IM_ASK,
    ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    "<|im_end|>",
)
QWEN_3 = Published(  # thoughts are left out of answers before the last question; the last answer always has some
    "Qwen/Qwen3-8B",
    "{% set at = namespace(last=messages | length - 1, looking=true) %}{% for m in messages[::-1] %}"
    "{% if at.looking and m.role == 'user' and not (m.content.startswith('<tool_response>') and "
    "m.content.endswith('</tool_response>')) %}"
    "{% set at.looking = false %}{% set at.last = messages | length - 1 - loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role != 'assistant' %}"
    + _IM
    + "{% else %}{% set said = m.content %}{% set thought = '' %}"
    "{% if '</think>' in said %}"
    "{% set thought = said.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > at.last and (loop.last or thought) %}"
    "{{ '<|im_start|>assistant\n<think>\n' ~ thought.strip('\n') ~ '\n</think>\n\n' }}"
    "{{ said.lstrip('\n') ~ '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>assistant\n' ~ said ~ '<|im_end|>\n' }}{% endif %}{% endif %}{% endfor %}" + _IM_ASK,
    ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    "<|im_end|>",
)
QWEN_3_THINKING = replace(  # its generation prompt opens the thoughts, which earlier answers do not have
    QWEN_3,
    model="Qwen/Qwen3-4B-Thinking-2507",
    template=QWEN_3.template.replace(
        _IM_ASK, "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
    ),
)
ZEPHYR = Published(  # the roles' names are plain text
    "HuggingFaceH4/zephyr-7b-beta",
    "{% for m in messages %}{{ '<|' ~ m.role ~ '|>\n' ~ m.content ~ eos_token ~ '\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>' ~ '\n' }}{% endif %}{% endfor %}",
    ("<s>", "</s>"),
    "</s>",
    "<s>",
)
LLAMA_2 = Published(
    "meta-llama/Llama-2-7b-chat-hf",
    _SYSTEM_APART + _ALTERNATE + "{% for m in turns %}{% if m.role == 'user' %}{{ bos_token ~ '[INST] ' ~ "
    "('<<SYS>>\n' ~ system ~ '\n<</SYS>>\n\n' if loop.first and system is defined else '') ~ "
    "m.content | trim ~ ' [/INST]' }}"
    "{% else %}{{ ' ' ~ m.content | trim ~ ' ' ~ eos_token }}{% endif %}{% endfor %}",
    ("<s>", "</s>"),
    "</s>",
    "<s>",
)
R1 = Published(  # the generation prompt opens the reasoning; thoughts are left out of every answer
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
    _SYSTEM_APART
    + "{{ bos_token ~ (system or '') }}{% for m in turns %}{% if m.role == 'user' %}{{ '<|User|>' ~ m.content }}"
    "{% else %}{{ '<|Assistant|>' ~ m.content.split('</think>')[-1] ~ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}",
    ("<|begin|>", "<|User|>", "<|Assistant|>", "<|end|>"),
    "<|end|>",
    "<|begin|>",
)

EVERY = (CHATML, LLAMA_3, MISTRAL, MISTRAL_1, GEMMA, PHI_3, QWEN_2_5, QWEN_3, ZEPHYR, LLAMA_2, R1)


@functools.cache
def tokenizer_of(published: Published) -> Any:
    """A byte-level tokenizer with merges that were learned here, the model's special tokens and its template."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    texts = [json.loads(line)["output"] for line in SHIPPED.read_text().splitlines()[:80]]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=[*published.special], initial_alphabet=alphabet)
    made.train_from_iterator(texts, trainer)
    named = {"eos_token": published.eos, "bos_token": published.bos}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, **{name: token for name, token in named.items() if token}
    )
    tokenizer.chat_template = published.template
    return tokenizer
