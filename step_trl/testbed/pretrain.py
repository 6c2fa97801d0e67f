"""
Makes the testbed model from nothing: tokenizer and pre-training on written-out traces (`traces.py`).

    python -m step_trl.testbed.pretrain --output DIR

1. Drill: unrelated lines of arithmetic.
2. Traces: first pass, re-checks and answer, with scripted slips that carry no loss; some drill.
3. Own thoughts: the model samples thoughts itself; wrong results are taken out of the loss and the true answer is put
   behind each thought. The slips are now the model's own, so that its confidence in an induced answer means something.
"""

from __future__ import annotations

import argparse
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from .problems import EVALUATION_SPLITS, SPLITS, Split, generate, parse_expression, read_problems
from .traces import TRIGGERS, Piece, TraceWriter, cut_at_trigger, drill, own_thought, with_answer


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


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of the pre-training."""

    vocab_size: int = 512
    hidden_size: int = 128
    layers: int = 5
    heads: int = 4
    learning_rate: float = 2e-3
    drill_updates: int = 1_200
    drill_tokens: int = 4_096
    trace_updates: int = 1_000
    trace_tokens: int = 8_192
    own_thoughts: int = 3_072
    own_updates: int = 200
    seed: int = 0


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE; the thinking tags are single tokens that decoding keeps, as in Qwen3."""
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


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=3 * recipe.hidden_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        head_dim=recipe.hidden_size // recipe.heads,
        max_position_embeddings=1024,
        tie_word_embeddings=False,  # vLLM's CPU server keeps a stale lm_head of tied ones after a weight reload
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    return Qwen3ForCausalLM(config)


class Corpus:
    """Endless training examples, tokenized with their labels; none holds an evaluation problem."""

    def __init__(self, seed: int):
        taken = {row["expression"] for split in EVALUATION_SPLITS for row in read_problems(split)}
        train = SPLITS["train"]
        self.problems = generate(Split(train.generator, 0, 10_000_000 + seed, train.options), taken)
        self.rng = random.Random(seed)
        self.writer = TraceWriter(self.rng)

    def problem(self) -> tuple[str, list[int]]:
        """Prompt up to the open thought, and the terms to add."""
        expression = next(self.problems)["expression"]
        question = self.rng.choice(WORDINGS).format(expression)
        prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n<think>\n"
        return prompt, parse_expression(expression)

    def drill(self) -> list[Piece]:
        return drill(self.rng)

    def mixed(self) -> list[Piece]:
        """Mostly scripted traces."""
        return self.scripted_trace() if self.rng.random() < 0.75 else self.drill()

    def scripted_trace(self) -> list[Piece]:
        prompt, terms = self.problem()
        return self.trace(prompt, terms, self.writer.thought(terms))

    def trace(self, prompt: str, terms: list[int], thought: list[Piece]) -> list[Piece]:
        """A whole trace, or one left at a re-check for a probe's sake."""
        text = "".join(piece.text for piece in thought)
        if self.rng.random() < 0.35 and re.search(TRIGGERS, text):
            answered = cut_at_trigger(thought, terms, self.rng)
        else:
            answered = with_answer(thought, terms)
        return [Piece(prompt, trained=False), *answered, Piece("<|im_end|>")]


def encode(tokenizer: PreTrainedTokenizerBase, pieces: list[Piece]) -> tuple[list[int], list[int]]:
    """Token ids and labels; the text is tokenized as a whole, labels follow the pieces' spans."""
    text = "".join(piece.text for piece in pieces)
    trained = [flag for piece in pieces for flag in [piece.trained] * len(piece.text)]
    encoding = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    labels = [
        index if trained[end - 1] else IGNORE
        for index, (_, end) in zip(encoding.input_ids, encoding.offset_mapping, strict=True)
    ]
    return encoding.input_ids, labels


def batches(
    tokenizer: PreTrainedTokenizerBase, example: Callable[[], list[Piece]], tokens: int, rng: random.Random
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Right-padded batches of about `tokens` tokens, of examples of like length: input ids and labels."""
    while True:
        pool = sorted((encode(tokenizer, example()) for _ in range(512)), key=lambda row: len(row[0]))
        found: list[list] = [[]]
        for row in pool:
            if (len(found[-1]) + 1) * len(row[0]) > tokens:
                found.append([])
            found[-1].append(row)
        rng.shuffle(found)
        for rows in found:
            width = max(len(ids) for ids, _ in rows)
            yield (
                torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows]),
                torch.tensor([labels + [IGNORE] * (width - len(labels)) for _, labels in rows]),
            )


def train(
    model: PreTrainedModel,
    examples: Iterator[tuple[torch.Tensor, torch.Tensor]],
    updates: int,
    learning_rate: float,
    name: str,
) -> None:
    """AdamW with a short warm-up and a linear decay over the last third."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    model.train()
    started, seen, total_loss = time.monotonic(), 0, 0.0
    for update in range(1, updates + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, update / 50, 3 * (updates + 1 - update) / updates)
        input_ids, labels = next(examples)
        logits = model(input_ids=input_ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen += input_ids.numel()
        total_loss += loss.item()
        if update % 50 == 0:
            speed = seen / (time.monotonic() - started)
            print(f"{name} {update}/{updates} loss {total_loss / 50:.4f} {speed:.0f} tokens/s", flush=True)
            total_loss = 0.0
    model.eval()


@torch.no_grad()
def sample_thoughts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, corpus: Corpus, number: int, batch_size: int = 128
) -> list[tuple[str, list[int], str]]:
    """Prompt, terms and thought of `number` completions that the model closed within the budget."""
    found: list[tuple[str, list[int], str]] = []
    while len(found) < number:
        problems = [corpus.problem() for _ in range(batch_size)]
        inputs = tokenizer([prompt for prompt, _ in problems], return_tensors="pt", padding=True, padding_side="left")
        outputs = model.generate(**inputs, do_sample=True, max_new_tokens=512)  # type: ignore[operator]
        texts = tokenizer.batch_decode(outputs[:, inputs.input_ids.size(1) :])
        for (prompt, terms), text in zip(problems, texts, strict=True):
            thought, closed, _ = text.partition("\n</think>")
            if closed:
                found.append((prompt, terms, thought))
        print(f"own thoughts {len(found)}/{number}", flush=True)
    return found[:number]


def pretrain(recipe: Recipe, output: Path) -> None:
    """Run all stages and save model and tokenizer to `output`."""
    torch.manual_seed(recipe.seed)
    corpus = Corpus(recipe.seed)
    tokenizer = train_tokenizer(
        ["".join(piece.text for piece in corpus.scripted_trace()) for _ in range(3_000)], recipe.vocab_size
    )
    tokenizer.save_pretrained(output)
    model = build_model(recipe, tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens", flush=True)

    drills = batches(tokenizer, corpus.drill, recipe.drill_tokens, corpus.rng)
    train(model, drills, recipe.drill_updates, recipe.learning_rate, "drill")
    traces = batches(tokenizer, corpus.mixed, recipe.trace_tokens, corpus.rng)
    train(model, traces, recipe.trace_updates, recipe.learning_rate, "traces")
    model.save_pretrained(output)

    thoughts = sample_thoughts(model, tokenizer, corpus, recipe.own_thoughts)

    def own_trace() -> list[Piece]:
        prompt, terms, thought = corpus.rng.choice(thoughts)
        return corpus.trace(prompt, terms, own_thought(thought))

    own = batches(tokenizer, own_trace, recipe.trace_tokens, corpus.rng)
    train(model, own, recipe.own_updates, recipe.learning_rate / 4, "own")
    model.save_pretrained(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the model and its tokenizer")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=False)
    pretrain(Recipe(seed=arguments.seed), arguments.output)


if __name__ == "__main__":
    main()
