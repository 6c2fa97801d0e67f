"""Run as a script that Ctrl-C ends: rollouts on the server whose URL it is given."""

import signal
import sys

from step_trl import testbed
from step_trl.rollout import DynamicTruncatedRollout, SamplingParams
from step_trl.rollout.engines import VLLMServerEngine


def main(url: str) -> None:
    tokenizer = testbed.load_tokenizer()
    problems = testbed.load_dataset("train").select(range(64))["prompt"]
    prompts = [tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=False) for p in problems]
    engine = VLLMServerEngine(url, tokenizer)
    DynamicTruncatedRollout(engine, [], SamplingParams(900)).run(prompts)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
    main(sys.argv[1])
