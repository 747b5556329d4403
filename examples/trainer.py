"""Fine-tunes with Hugging Face's Trainer: its arguments, logs, evaluation and checkpoints, with hdp's global batches.

    torchrun --standalone --nproc-per-node 2 examples/trainer.py --use-cpu
    torchrun --standalone --nproc-per-node 8 examples/trainer.py --data corpus.jsonl --model path/to/model \
        --tokenizer path/to/model --max-length 131072 --capacity 16384 --tokens-per-step 1048576

Against a script with a plain Trainer two lines change: the class, and ``hdp=HdpConfig(...)`` in place of batch sizes. Without
arguments it trains a small Llama on the source files of Python's standard library, byte by byte. The checkpoints in --output
are read by ``from_pretrained``; ``--resume`` goes on from the last one, with any number of ranks.
"""

from __future__ import annotations

import argparse

from datasets import Dataset
from finetune import build_model
from transformers import TrainingArguments, set_seed

import hdp
import hdp.data
import hdp.report
from hdp.parallel.adapters import HdpConfig, HdpTrainer


def parse_arguments() -> argparse.Namespace:
    parser = hdp.report.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of text files, .jsonl file or Hugging Face dataset on disk")
    parser.add_argument(
        "--tokenizer", default="bytes", help="'bytes', a folder, or a .gguf file (default: %(default)s)"
    )
    parser.add_argument("--model", help="folder or .gguf file; default: a small Llama, untrained")
    parser.add_argument("--max-length", type=int, default=4096, help="in tokens (default: %(default)s)")
    parser.add_argument("--held-out", type=float, default=0.02, help="share of documents (default: %(default)s)")
    parser.add_argument("--held-out-tokens", type=int, default=16384, help="measure with so many (%(default)s)")
    parser.add_argument(
        "--capacity",
        type=hdp.report.tokens_or_auto,
        default="auto",
        help="tokens a rank holds at once; auto: what fits its memory (default: %(default)s)",
    )
    parser.add_argument("--tokens-per-step", type=int, default=12288, help="of all ranks (default: %(default)s)")
    parser.add_argument("--engine", default="fsdp", help="fsdp or ddp (default: %(default)s)")
    parser.add_argument("--regime", default="step", help="step or slot (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="-1: by --epochs (default: %(default)s)")
    parser.add_argument("--epochs", type=float, default=1.0, help="without --steps (default: %(default)s)")
    parser.add_argument("--save-steps", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--lr", type=float, default=2e-3, help="highest learning rate (default: %(default)s)")
    parser.add_argument("--output", default="runs/trainer", help="default: %(default)s")
    parser.add_argument("--resume", action="store_true", help="from the last checkpoint in --output")
    parser.add_argument("--use-cpu", action="store_true", help="even if there is a GPU")
    return parser.parse_args()


def rows(documents: hdp.data.Documents) -> Dataset:
    """What most scripts have at this point: a tokenised dataset."""
    return Dataset.from_dict({"input_ids": [documents[i] for i in range(len(documents))]})


def main() -> None:
    args = parse_arguments()
    training = TrainingArguments(
        output_dir=args.output,
        max_steps=args.steps,
        num_train_epochs=args.epochs,
        learning_rate=args.lr,
        warmup_steps=0.1,
        lr_scheduler_type="cosine",
        weight_decay=0.1,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=args.save_steps,
        save_steps=args.save_steps,
        disable_tqdm=True,
        report_to="none",
        use_cpu=args.use_cpu,
    )
    world = hdp.init(device=training.device)
    set_seed(training.seed)  # the same weights on every rank
    documents = hdp.data.open_documents(args.data, tokenizer=args.tokenizer, max_length=args.max_length)
    train, held_out = documents.split(held_out=args.held_out, seed=0)
    trainer = HdpTrainer(
        build_model(args.model, vocab_size=documents.vocab_size, max_length=args.max_length),
        training,
        train_dataset=rows(train),
        eval_dataset=rows(held_out.sample(tokens=args.held_out_tokens, seed=0)),
        hdp=HdpConfig(
            tokens_per_step=args.tokens_per_step, capacity=args.capacity, engine=args.engine, regime=args.regime
        ),
        world=world,
    )
    trainer.train(resume_from_checkpoint=args.resume)
    trainer.save_model()
    trainer.save_state()
    world.close()


if __name__ == "__main__":
    hdp.report.launch(main)
