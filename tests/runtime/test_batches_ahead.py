"""What is known ahead is what the Trainer then takes, in the order that it has without looking ahead."""

import random

import pytest
import torch
from datasets import Dataset, IterableDataset
from small_runs import SMALL_RUN
from trl import GRPOConfig, GRPOTrainer

from step_trl import testbed
from step_trl.runtime.batches_ahead import BatchesAhead


class Recording(GRPOTrainer):
    """Trains on nothing, and records the rows and the update of each generation, and what was known of the next."""

    batches = None

    def look_ahead(self):
        self.batches = BatchesAhead(self)
        return self

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        source = epoch_iterator if self.batches is None else self.batches.of_epoch(epoch_iterator)
        return super().get_batch_samples(source, num_batches, device)

    def training_step(self, model, inputs, num_items_in_batch):
        if self._step % (self.args.steps_per_generation * self.num_iterations) == 0:
            self.generations.append((numbers(inputs), self.state.global_step))
            if self.batches is not None:
                following = self.batches.after(inputs)
                self.known.append(None if following is None else (numbers(following.rows), following.update))
        self._step += 1
        return torch.tensor(0.0)

    def train(self, **options):
        self.generations, self.known = [], []
        super().train(**options)
        return self.generations


def numbers(rows):
    return [row["number"] for row in rows]


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    model, tokenizer = testbed.load_model(), testbed.load_tokenizer()
    rows = [{"prompt": f"What is {number}?", "number": number} for number in range(12)]

    def build(number_of_rows, *, stream=False, **options):
        data = Dataset.from_list(rows[:number_of_rows])
        if stream:
            data = IterableDataset.from_generator(lambda: iter(rows[:number_of_rows]))
        sizes = {"num_generations": 2, "per_device_train_batch_size": 2, "seed": 3}
        args = GRPOConfig(str(tmp_path_factory.mktemp("run")), **SMALL_RUN | sizes | options)
        return Recording(
            model, lambda completions, **_: [0.0] * len(completions), args, data, processing_class=tokenizer
        )

    return build


def draw(generator):
    options = {
        "steps_per_generation": generator.choice([1, 2, 3, 4]),
        "num_iterations": generator.choice([1, 1, 2]),
        "gradient_accumulation_steps": generator.choice([1, 2, 3, 4]),
        "max_steps": generator.randint(1, 12),
    }
    return generator.randint(options["steps_per_generation"], 12), options


@pytest.mark.parametrize("seed", range(12))
def test_the_next_batch_is_known_and_the_order_stays(build, seed):
    rows, options = draw(random.Random(seed))
    expected = build(rows, **options).train()
    trainer = build(rows, **options).look_ahead()
    assert trainer.train() == expected
    assert trainer.known == [*expected[1:], None], options


def test_epochs_are_counted_without_max_steps(build):
    options = {"max_steps": -1, "num_train_epochs": 3, "steps_per_generation": 2, "gradient_accumulation_steps": 3}
    expected = build(5, **options).train()
    trainer = build(5, **options).look_ahead()
    assert len(expected) == 6 and trainer.train() == expected and trainer.known == [*expected[1:], None]
    assert trainer.train() == build(5, **options).train()  # a second training begins afresh


def test_a_stream_is_known_too(build):
    expected = build(5, stream=True, max_steps=6).train()
    trainer = build(5, stream=True, max_steps=6).look_ahead()
    assert trainer.train() == expected and trainer.known == [*expected[1:], None]


@pytest.mark.parametrize("saved_at", [2, 4, 5])  # of epochs of four updates
def test_a_resumed_training_has_the_same_order(build, saved_at):
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": saved_at}
    whole = build(4, **options).look_ahead()
    whole.train()
    folder = f"{whole.args.output_dir}/checkpoint-{saved_at}"
    resumed = build(4, **options).look_ahead()
    assert resumed.train(resume_from_checkpoint=folder) == build(4, **options).train(resume_from_checkpoint=folder)
    assert len(resumed.known) == 8 - saved_at and resumed.known == [*resumed.generations[1:], None]
