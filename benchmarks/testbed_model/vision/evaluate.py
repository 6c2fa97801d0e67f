"""
Measure the visual testbed's model: accuracy and completion lengths with its own thought, and with an empty one.

    python benchmarks/testbed_model/vision/evaluate.py [--model DIR] [--limit 128] [--temperature 1.0] [--skip-thought]
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from step_trl.testbed import vision
from step_trl.testbed.vision.problems import Problem, draw_problems
from step_trl.testbed.vision.scenes import draw


FORMAT = re.compile(r"<think>\n.*</think>\n<answer>([^<]*)</answer>", re.DOTALL)
NO_THOUGHT = "<think>\n\n</think>\n"


@dataclass(frozen=True)
class Completion:
    """A completion, with the number of its tokens and the answer in its tags, if it is well-formed."""

    text: str
    tokens: int
    answer: str | None


@torch.no_grad()
def complete(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    asked: list[Problem],
    temperature: float = 1.0,
    start: str = "",
    max_tokens: int = 512,
) -> list[Completion]:
    """Return one completion per problem, each of which begins with `start`. With temperature 0, it is greedy."""
    messages = [
        [
            {
                "role": "user",
                "content": [
                    *({"type": "image", "image": draw(scene)} for scene in problem.frames),
                    {"type": "text", "text": problem.question.text},
                ],
            }
        ]
        for problem in asked
    ]
    texts = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    pictures = [[draw(scene) for scene in problem.frames] for problem in asked]
    inputs = processor(images=pictures, text=[text + start for text in texts], padding=True, return_tensors="pt")
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    output = model.generate(**inputs, max_new_tokens=max_tokens, **sampling)
    completions = []
    opened = len(processor.tokenizer.encode(start))
    for ids in output[:, inputs["input_ids"].size(1) :]:
        ids = ids[ids != processor.tokenizer.pad_token_id]
        text = start + processor.tokenizer.decode(ids, skip_special_tokens=True)
        match = FORMAT.fullmatch(text)
        completions.append(Completion(text, opened + len(ids), match and match[1]))
    return completions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=vision.MODEL_DIR)
    parser.add_argument("--splits", nargs="+", default=vision.EVALUATION_SPLITS)
    parser.add_argument("--limit", type=int, default=256, help="problems per split")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--skip-thought", action="store_true", help="begin each completion with an empty thought")
    parser.add_argument("--show", type=int, default=0, help="completions to print per split")
    arguments = parser.parse_args()
    model = AutoModelForImageTextToText.from_pretrained(arguments.model, dtype="float32")
    processor = AutoProcessor.from_pretrained(arguments.model)
    start = NO_THOUGHT if arguments.skip_thought else ""
    torch.manual_seed(0)
    for split in arguments.splits:
        asked = draw_problems(split)[: arguments.limit]
        by_family: dict[str, list[bool]] = defaultdict(list)
        tokens, well_formed = 0, 0
        for first in range(0, len(asked), 64):
            batch = asked[first : first + 64]
            found = complete(model, processor, list(batch), arguments.temperature, start)
            for problem, completion in zip(batch, found):
                by_family[problem.question.family].append(completion.answer == problem.answer)
                tokens += completion.tokens
                well_formed += completion.answer is not None
            for problem, completion in list(zip(batch, found))[: max(0, arguments.show - first)]:
                print(f"{problem.question.text} ({problem.answer})\n{completion.text}\n")
        right = [one for verdicts in by_family.values() for one in verdicts]
        families = ", ".join(f"{family} {sum(all_) / len(all_):.2f}" for family, all_ in sorted(by_family.items()))
        print(
            f"{split}: accuracy {sum(right) / len(right):.3f}, {tokens / len(asked):.1f} tokens, "
            f"well-formed {well_formed / len(asked):.3f} ({families})",
            flush=True,
        )


if __name__ == "__main__":
    main()
