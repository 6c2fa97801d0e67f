"""
Train the testbed model from scratch: tokenizer, and pre-training on written-out traces (`traces.py`).

    python benchmarks/testbed_model --output DIR

1. Drill: unrelated lines of arithmetic. Only results are trained on, because operands are noise that would drown them.
2. Passes: a problem and one correct pass over it, without re-checks, so that half of the tokens are copied operands:
   first with one-digit numbers, then with all. Taking the right operand next is what a small model learns last.
3. Traces: first pass, re-checks and answer, with scripted slips that carry no loss, and some passes.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from step_trl.testbed.problems import EVALUATION_SPLITS, SPLITS, Split, generate, parse_expression, read_problems

from .traces import DRILL_TOTALS, TRIGGERS, Piece, SlipRates, TraceWriter, cut_at_trigger, drill, with_answer


SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"
)
# The split of Qwen, digits one by one and newlines kept with the punctuation before them; a digit may carry the space
# before it, as words do, which makes arithmetic a quarter shorter.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDINGS = (
    "State the final answer to the following arithmetic problem: {} =",
    "State the final answer to the following arithmetic problem: {} =",
    "Calculate {}.",
    "Find the value of {}.",
    "How much is {}?",
)
IGNORE = -100
Inputs = tuple[dict[str, torch.Tensor], torch.Tensor]  # of the model, and labels


@dataclass(frozen=True)
class Recipe:
    """The hyper-parameters of the pre-training."""

    vocab_size: int = 512
    hidden_size: int = 128
    layers: int = 5
    heads: int = 4
    learning_rate: float = 2e-3
    drill_updates: int = 1_200
    drill_tokens: int = 4_096
    easy_pass_updates: int = 800
    pass_updates: int = 1_000
    pass_tokens: int = 6_144
    trace_updates: int = 600
    trace_tokens: int = 8_192
    seed: int = 0


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer. The thinking tags are single tokens that decoding keeps, as in Qwen3."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,  # the two thinking tags are added after
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def text_config(
    hidden_size: int, layers: int, heads: int, tokenizer: PreTrainedTokenizerFast, **further: Any
) -> Qwen3Config:
    """Return the configuration of a small Qwen3 without tied embeddings."""
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden_size // heads,
        max_position_embeddings=1024,
        tie_word_embeddings=False,  # vLLM's CPU server keeps a stale lm_head of tied ones after a weight reload
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
        **further,
    )


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(text_config(recipe.hidden_size, recipe.layers, recipe.heads, tokenizer))


class Corpus:
    """An endless source of training examples, as pieces, without any evaluation problem."""

    drill_totals: tuple[int, ...] = DRILL_TOTALS

    def __init__(self, seed: int):
        self.problems, self.easy_problems = self.sources(seed)
        self.rng = random.Random(seed)
        self.writer = TraceWriter(self.rng)
        self.sure_writer = TraceWriter(self.rng, SlipRates(0, 0, 0))

    def sources(self, seed: int) -> tuple[Iterator[dict], Iterator[dict]]:
        """Return the endless problems, and the easy ones, which have one-digit numbers."""
        taken = {row["expression"] for split in EVALUATION_SPLITS for row in read_problems(split)}
        train = SPLITS["train"]
        one_digit = train.options | {"max_terms": 9, "max_digits": 1}
        return (
            generate(Split(train.generator, 0, 10_000_000 + seed, train.options), taken),
            generate(Split(train.generator, 0, 20_000_000 + seed, one_digit), taken),
        )

    def drill(self) -> list[Piece]:
        return drill(self.rng, totals=self.drill_totals)

    def problem(self, easy: bool = False) -> tuple[str, list[int]]:
        """Return the prompt up to the open thought, and the terms to add. An easy problem has one-digit numbers."""
        expression = next(self.easy_problems if easy else self.problems)["expression"]
        question = self.rng.choice(WORDINGS).format(expression)
        prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n<think>\n"
        return prompt, parse_expression(expression)

    def one_pass(self, easy: bool = False) -> list[Piece]:
        """Return one correct pass over a problem or, now and then, a drill."""
        if self.rng.random() < 0.1:
            return self.drill()
        prompt, terms = self.problem(easy)
        writer = self.sure_writer
        write = self.rng.choices((writer.pairs, writer.single, writer.parts, writer.reorder), (5, 2, 2, 1))[0]
        return [Piece(prompt, trained=False), *write(terms)[1]]

    def mixed(self) -> list[Piece]:
        """Return a trace or a single pass."""
        return self.scripted_trace() if self.rng.random() < 0.5 else self.one_pass()

    def texts(self, count: int) -> list[str]:
        """Return whole traces, for a tokenizer to be trained on."""
        return ["".join(piece.text for piece in self.scripted_trace()) for _ in range(count)]

    def scripted_trace(self) -> list[Piece]:
        prompt, terms = self.problem()
        return self.trace(prompt, terms, self.writer.thought(terms))

    def trace(self, prompt: str, terms: list[int], thought: list[Piece]) -> list[Piece]:
        """Return a whole trace, or one that is cut at a re-check to train probes."""
        text = "".join(piece.text for piece in thought)
        if self.rng.random() < 0.35 and re.search(TRIGGERS, text):
            answered = cut_at_trigger(thought, terms, self.rng)
        else:
            answered = with_answer(thought, terms)
        return [Piece(prompt, trained=False), *answered, Piece("<|im_end|>")]


def encode(tokenizer: PreTrainedTokenizerBase, pieces: list[Piece]) -> tuple[list[int], list[int]]:
    """Return token ids and labels. The text is tokenized as a whole; labels follow the spans of the pieces."""
    text = "".join(piece.text for piece in pieces)
    trained = [flag for piece in pieces for flag in [piece.trained] * len(piece.text)]
    encoding = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    labels = [
        index if trained[end - 1] else IGNORE
        for index, (_, end) in zip(encoding.input_ids, encoding.offset_mapping, strict=True)
    ]
    return encoding.input_ids, labels


def in_batches(rows: Iterable[tuple], tokens: int, rng: random.Random) -> list[list[tuple]]:
    """Return rows, which begin with their token ids, in batches of about `tokens` tokens and of similar length."""
    found: list[list[tuple]] = [[]]
    for row in sorted(rows, key=lambda row: len(row[0])):
        if (len(found[-1]) + 1) * len(row[0]) > tokens:
            found.append([])
        found[-1].append(row)
    rng.shuffle(found)
    return found


def padded(rows: Sequence[list[int]], value: int) -> torch.Tensor:
    """Return rows of numbers as a tensor, padded on the right."""
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def batches(
    tokenizer: PreTrainedTokenizerBase,
    example: Callable[[], list[Piece]],
    tokens: int,
    rng: random.Random,
    drawn_at_once: int = 512,
) -> Iterator[Inputs]:
    """Yield batches of about `tokens` tokens, of examples of similar length among those that are drawn at once."""
    while True:
        for rows in in_batches((encode(tokenizer, example()) for _ in range(drawn_at_once)), tokens, rng):
            ids, labels = zip(*rows)
            yield {"input_ids": padded(ids, 0)}, padded(labels, IGNORE)


def loss_of(model: PreTrainedModel, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy of the next tokens that have labels."""
    logits = model(**inputs).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)


def step(model: PreTrainedModel, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    """Update the weights with the gradient of a loss."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def make_optimizer(model: PreTrainedModel, learning_rate: float, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.98), **options)


def train(
    model: PreTrainedModel,
    examples: Iterator[Inputs],
    updates: int,
    learning_rate: float,
    name: str,
) -> None:
    """Train with AdamW, a short warm-up, and a linear decay over the last third."""
    optimizer = make_optimizer(model, learning_rate)
    model.train()
    started, seen, total_loss = time.monotonic(), 0, 0.0
    for update in range(1, updates + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, update / 50, 3 * (updates + 1 - update) / updates)
        inputs, labels = next(examples)
        loss = loss_of(model, inputs, labels)
        step(model, optimizer, loss)
        seen += labels.numel()
        total_loss += loss.item()
        if update % 50 == 0:
            speed = seen / (time.monotonic() - started)
            print(f"{name} {update}/{updates} loss {total_loss / 50:.4f} {speed:.0f} tokens/s", flush=True)
            total_loss = 0.0
    model.eval()


def pretrain(recipe: Recipe, output: Path) -> None:
    """Run all stages, and save the model and the tokenizer to `output`."""
    torch.manual_seed(recipe.seed)
    corpus = Corpus(recipe.seed)
    tokenizer = train_tokenizer(corpus.texts(3_000), recipe.vocab_size)
    tokenizer.save_pretrained(output)
    model = build_model(recipe, tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens", flush=True)

    for name, example, updates, tokens in (
        ("drill", corpus.drill, recipe.drill_updates, recipe.drill_tokens),
        ("easy passes", partial(corpus.one_pass, easy=True), recipe.easy_pass_updates, recipe.pass_tokens),
        ("passes", corpus.one_pass, recipe.pass_updates, recipe.pass_tokens),
        ("traces", corpus.mixed, recipe.trace_updates, recipe.trace_tokens),
    ):
        train(model, batches(tokenizer, example, tokens, corpus.rng), updates, recipe.learning_rate, name)
        model.save_pretrained(output / f"after {name}")
    model.save_pretrained(output)
