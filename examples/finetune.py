"""Fine-tunes (or trains from scratch) a causal language model on documents of very different lengths.

    torchrun --standalone --nproc-per-node 2 examples/finetune.py
    torchrun --standalone --nproc-per-node 8 examples/finetune.py --data corpus.jsonl --model path/to/model \
        --tokenizer path/to/model --max-length 131072 --capacity 16384 --tokens-per-step 1048576

Without arguments it trains a small Llama on the source files of Python's standard library, byte by byte: nothing is downloaded.
Short documents stay whole on one rank; those longer than --capacity are spread over as many ranks as they need, with groups
made anew for every step. Everything about the run lands in runs/NAME/.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import tempfile
from pathlib import Path

import torch
import transformers
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import hdp
import hdp.data
import hdp.report


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = hdp.report.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data", help="folder of text files, .jsonl file or Hugging Face dataset on disk; default: Python's own"
    )
    data.add_argument("--text-column", default="text", help="where rows keep their text (default: %(default)s)")
    data.add_argument("--tokenizer", default="bytes", help="'bytes', a folder, or a .gguf file (default: %(default)s)")
    data.add_argument(
        "--max-length", type=int, default=4096, help="cut longer documents, in tokens (default: %(default)s)"
    )
    data.add_argument(
        "--held-out", type=float, default=0.02, help="share of documents not trained on (default: %(default)s)"
    )
    data.add_argument(
        "--held-out-tokens", type=int, default=16384, help="measure with so many of them (default: %(default)s)"
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", help="folder or .gguf file of any causal LM of transformers; default: a small Llama, untrained"
    )
    plan = parser.add_argument_group("plan")
    plan.add_argument("--planner", default="naive", help="how documents are laid over ranks (default: %(default)s)")
    plan.add_argument(
        "--capacity",
        type=hdp.report.tokens_or_auto,
        default="auto",
        help="tokens a rank holds at once; auto: what fits its memory (default: %(default)s)",
    )
    plan.add_argument("--tokens-per-step", type=int, default=12288, help="of all ranks together (default: %(default)s)")
    plan.add_argument(
        "--schedule",
        help="how shared documents are computed: ring, ulysses, ..., forward/backward such as ring/ring_q, or auto, which"
        " chooses for each by cost; default: as the plan says, a ring",
    )
    plan.add_argument(
        "--activations",
        default="keep",
        choices=["keep", "offload", "recompute", "auto", "plan"],
        help="what is saved for backward: keep it, move it to --scratch, compute it again, move what costs no time, or let the"
        " planner decide for each micro-batch (default: %(default)s)",
    )
    plan.add_argument("--scratch", default=tempfile.gettempdir(), help="folder on a local disk (default: %(default)s)")
    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=int, default=36, help="default: %(default)s")
    training.add_argument("--lr", type=float, default=2e-3, help="highest learning rate (default: %(default)s)")
    training.add_argument("--warmup", type=float, default=0.1, help="share of the steps (default: %(default)s)")
    training.add_argument("--weight-decay", type=float, default=0.1, help="default: %(default)s")
    training.add_argument("--clip", type=float, default=1.0, help="largest global gradient norm (default: %(default)s)")
    training.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    training.add_argument(
        "--timeout", type=float, default=300.0, help="seconds until a stuck rank is an error (%(default)s)"
    )
    report = parser.add_argument_group("report")
    report.add_argument("--name", default="finetune", help="the run's folder below --runs (default: %(default)s)")
    report.add_argument("--runs", type=Path, default=Path("runs"), help="default: %(default)s")
    report.add_argument("--picture", type=int, help="the step to draw; default: the one whose groups differ most")
    return parser.parse_args(argv)


def build_model(path: str | None, *, vocab_size: int, max_length: int) -> PreTrainedModel:
    """A model of transformers, unchanged; ``attn_implementation="hdp"`` is all that makes it ours."""
    if path is None:
        config = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=max_length,
            tie_word_embeddings=False,
        )
        return AutoModelForCausalLM.from_config(config, attn_implementation="hdp", dtype=torch.float32)
    source = Path(path).expanduser()
    if not source.exists():
        raise FileNotFoundError(f"no model at {source}: give a folder that save_pretrained wrote, or a .gguf file")
    folder, options = (source.parent, {"gguf_file": source.name}) if source.suffix == ".gguf" else (source, {})
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="hdp", dtype=torch.float32, **options)
    if model.config.vocab_size < vocab_size:
        raise ValueError(
            f"the tokenizer has {vocab_size} ids, the model {model.config.vocab_size}: give the model's --tokenizer"
        )
    return model


def learning_rate(step: int, *, steps: int, warmup: float) -> float:
    """Linear warm-up, then half a cosine down to a tenth; as a share of the highest rate."""
    warm = max(1, round(warmup * steps))
    if step < warm:
        return (step + 1) / warm
    progress = (step - warm) / max(1, steps - warm)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, progress)))


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    world = hdp.init(timeout=args.timeout, schedule=args.schedule)
    torch.manual_seed(args.seed)  # the same weights on every rank
    if world.rank != 0:
        transformers.logging.disable_progress_bar()

    documents = hdp.data.open_documents(
        args.data, tokenizer=args.tokenizer, text_column=args.text_column, max_length=args.max_length
    )
    train, held_out = documents.split(held_out=args.held_out, seed=args.seed)
    held_out = held_out.sample(tokens=args.held_out_tokens, seed=args.seed)

    model = build_model(args.model, vocab_size=documents.vocab_size, max_length=args.max_length)
    # Weights and optimizer stay in fp32; no fast attention kernel of a GPU computes in it.
    dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    engine = hdp.shard(model, world, mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32))
    optimizer = torch.optim.AdamW(engine.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=args.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate(step, steps=args.steps, warmup=args.warmup)
    )
    loader = hdp.Loader(
        train,
        engine,
        tokens_per_step=args.tokens_per_step,
        capacity=args.capacity,
        planner=args.planner,
        seed=args.seed,
        steps=args.steps,
        offload="auto" if args.activations == "plan" else "off",
        recompute="auto" if args.activations == "plan" else "off",
    )

    settings = {
        "arguments": vars(args),
        "capacity": loader.capacity,
        "model": model.config.to_dict(),
        "parameters": model.num_parameters(),
    }
    with contextlib.ExitStack() as cleanup:
        if args.activations != "keep":
            opened = hdp.Activations.open(world, policy=args.activations, folder=args.scratch)
            engine.activations = cleanup.enter_context(opened)
        run = cleanup.enter_context(
            hdp.report.Run(args.runs / args.name, world, steps=args.steps, settings=settings, picture=args.picture)
        )
        run.say(f"{len(train):,} documents of {train.tokens:,} tokens to train on, {held_out.tokens:,} tokens held out")
        run.evaluation(engine.evaluate(held_out, capacity=args.capacity))
        for batch in loader:
            result = engine.forward_backward(batch)
            grad_norm = engine.clip_grad_norm_(args.clip)
            optimizer.step()
            optimizer.zero_grad()
            run.step(batch, result, lr=schedule.get_last_lr()[0], grad_norm=grad_norm)
            schedule.step()
        run.evaluation(engine.evaluate(held_out, capacity=args.capacity))
    world.close()


if __name__ == "__main__":
    hdp.report.launch(main)
