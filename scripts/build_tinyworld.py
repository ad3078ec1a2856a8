"""Build tinyworld, the small language model and data behind `hft`'s quick start.

The script invents a world of people and places, writes a corpus about it, trains
a byte-pair tokenizer and a Llama of about 1.1 million parameters on that corpus, checks
that the model recalls the world without looking anything up, and writes:

    model/          the model and its tokenizer, as a Hugging Face folder
    facts.jsonl     questions about the world, each fact in two wordings
    skill/          a new skill to teach: turning a sentence into a record
    preferences/    pairs of answers, polite (chosen) against curt (rejected)
    sequence/       five plain-text tasks to learn one after another
    text.jsonl      unseen paragraphs about the world
    build.json      seed, versions, sizes and the measured recall

Run it from the repository root (about ten minutes on two cores):

    python scripts/build_tinyworld.py

The same seed on the same kind of machine gives the same data files, byte for byte. The
script exits with an error if the saved model recalls less than 95 % of the facts.
"""

import argparse
import json
import os
import random
import sys
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import tokenizers
import torch
import transformers
from tinyworld.corpus import write_epoch
from tinyworld.pretraining import STEPS, create_model, pack_sequences, pretrain
from tinyworld.recall import MIN_RECALL, measure_recall
from tinyworld.rows import QUESTIONS_PER_WORDING, hold_out_text, list_questions, write_data, write_json
from tinyworld.tokenizer import Encoder, train_tokenizer
from tinyworld.world import invent_world
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

DEFAULT_OUTPUT = Path(__file__).resolve().parent.parent / "hftcli" / "tinyworld"


def save_model(output: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    model.save_pretrained(output / "model")
    tokenizer.save_pretrained(output / "model", save_jinja_files=False)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Build the model and data of the quick start.")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="%(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of everything (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="for torch (%(default)s)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(arguments.seed)
    rng = random.Random(arguments.seed)

    world = invent_world(rng)
    held_out = hold_out_text(world, rng)
    sample = rng.sample(world.facts, QUESTIONS_PER_WORDING)
    tokenizer = train_tokenizer(write_epoch(world, rng, frozenset(held_out)))
    model = create_model(tokenizer)
    pretrain(model, pack_sequences(world, Encoder(tokenizer), rng, frozenset(held_out)))

    questions = list_questions(sample)
    write_data(arguments.output, world, questions, held_out, arguments.seed)
    save_model(arguments.output, model, tokenizer)

    # What ships is what is measured: the saved model, over every fact of the world.
    model = AutoModelForCausalLM.from_pretrained(arguments.output / "model")
    tokenizer = AutoTokenizer.from_pretrained(arguments.output / "model")
    everything = list_questions(world.facts)
    recall = {
        wording: round(measure_recall(model, tokenizer, [q for q in everything if q["wording"] == wording]), 4)
        for wording in "ab"
    }
    report = {
        "seed": arguments.seed,
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "parameters": model.num_parameters(),
        "pretraining_steps": STEPS,
        "facts": len(world.facts),
        "recall": recall,
    }
    write_json(arguments.output / "build.json", report)
    print(json.dumps(report, indent=1))
    if min(recall.values()) < MIN_RECALL:
        sys.exit(f"recall {recall} is below {MIN_RECALL}: the model is not fit to ship")


if __name__ == "__main__":
    main()
