"""A training loop of Hugging Face accelerate with hdp in it: three lines differ from what it was, and are marked.

    torchrun --standalone --nproc-per-node 2 examples/accelerate_script.py
    accelerate launch --multi_gpu --num_processes 8 examples/accelerate_script.py

(accelerate starts several processes on CPUs through MPI only; torchrun needs none.) Launch without FSDP or DeepSpeed in
accelerate's own configuration: ``hdp.shard`` wraps the model, so the model is not prepared.
Neither is the scheduler: accelerate would step it once per process, but a batch here is already that of all processes.
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from finetune import build_model

import hdp
import hdp.data
import hdp.report
from hdp.parallel.adapters import save_pretrained


def parse_arguments() -> argparse.Namespace:
    parser = hdp.report.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of text files, .jsonl file or Hugging Face dataset on disk")
    parser.add_argument("--model", help="folder or .gguf file; default: a small Llama, untrained")
    parser.add_argument(
        "--tokenizer", default="bytes", help="'bytes', a folder, or a .gguf file (default: %(default)s)"
    )
    parser.add_argument("--max-length", type=int, default=4096, help="in tokens (default: %(default)s)")
    parser.add_argument(
        "--capacity",
        type=hdp.report.tokens_or_auto,
        default="auto",
        help="tokens a rank holds at once; auto: what fits its memory (default: %(default)s)",
    )
    parser.add_argument("--tokens-per-step", type=int, default=12288, help="of all ranks (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="default: %(default)s")
    parser.add_argument("--lr", type=float, default=2e-3, help="default: %(default)s")
    parser.add_argument(
        "--output", default="runs/accelerate", help="folder of the trained model (default: %(default)s)"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    set_seed(0)
    world = hdp.init(device=accelerator.device)
    documents = hdp.data.open_documents(args.data, tokenizer=args.tokenizer, max_length=args.max_length)
    model = build_model(args.model, vocab_size=documents.vocab_size, max_length=args.max_length)

    # 1. was: model = accelerator.prepare(model)
    engine = hdp.shard(model, world)
    # 2. was: loader = accelerator.prepare(DataLoader(documents, batch_size=8, shuffle=True, collate_fn=pad))
    loader = hdp.Loader(
        documents, engine, tokens_per_step=args.tokens_per_step, capacity=args.capacity, steps=args.steps
    )

    optimizer = accelerator.prepare(torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.1))
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=args.steps)
    for batch in loader:
        # 3. was: loss = model(**batch).loss; accelerator.backward(loss)
        loss = engine.forward_backward(batch).loss
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        accelerator.print(f"step {batch.step} loss {loss:.8f}")

    save_pretrained(model, args.output, rank=world.rank)
    world.close()


if __name__ == "__main__":
    hdp.report.launch(main)
