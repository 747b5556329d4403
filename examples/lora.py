"""Fine-tunes low-rank adapters (LoRA, with peft) of a frozen model that FSDP2 shards over all ranks.

    torchrun --standalone --nproc-per-node 2 examples/lora.py
    torchrun --standalone --nproc-per-node 8 examples/lora.py --model path/to/model --tokenizer path/to/model \
        --data corpus.jsonl --max-length 131072 --capacity 16384 --tokens-per-step 1048576

Only adapters get gradients and optimizer states. --output holds the adapter alone, for ``PeftModel.from_pretrained``.
"""

from __future__ import annotations

import argparse

import peft
import torch
from finetune import build_model

import hdp
import hdp.data
import hdp.report
from hdp.parallel.adapters import save_pretrained
from hdp.parallel.flops import ModelFlops


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
    parser.add_argument("--regime", default="step", help="step or slot (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="default: %(default)s")
    parser.add_argument("--lr", type=float, default=5e-3, help="default: %(default)s")
    parser.add_argument("--peak", type=float, help="FLOP/s of one device: adds the utilisation to each line")
    parser.add_argument("--output", default="runs/lora", help="folder of the adapter (default: %(default)s)")
    return parser.parse_args()


def adapt(model: torch.nn.Module, rank: int) -> peft.PeftModel:
    """Adapters on every linear layer of the decoder; not on the output head, which computes the loss."""
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", exclude_modules=["lm_head"], task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, config)


def main() -> None:
    args = parse_arguments()
    world = hdp.init()
    torch.manual_seed(0)  # the same adapters on every rank
    documents = hdp.data.open_documents(args.data, tokenizer=args.tokenizer, max_length=args.max_length)
    model = adapt(build_model(args.model, vocab_size=documents.vocab_size, max_length=args.max_length), args.rank)
    engine = hdp.shard(model, world, regime=args.regime)
    flops = ModelFlops.of(model)
    optimizer = torch.optim.AdamW([p for p in engine.parameters() if p.requires_grad], lr=args.lr)
    loader = hdp.Loader(
        documents,
        engine,
        tokens_per_step=args.tokens_per_step,
        capacity=args.capacity,
        steps=args.steps,
    )
    for batch in loader:
        result = engine.forward_backward(batch)
        engine.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        if world.rank == 0:
            line = f"step {result.step} loss {result.loss:.8f} tokens/s {result.tokens_per_second:.0f}"
            rate = flops.step(batch.plan.lengths) / result.seconds / world.world_size
            print(
                f"{line} GFLOP/s {rate / 1e9:.1f}" + (f" MFU {rate / args.peak:.1%}" if args.peak else ""), flush=True
            )
    save_pretrained(model, args.output, rank=world.rank)
    world.close()


if __name__ == "__main__":
    hdp.report.launch(main)
