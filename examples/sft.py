"""Supervised fine-tuning with TRL's SFTTrainer on prompts and completions, with hdp's global batches.

    torchrun --standalone --nproc-per-node 2 examples/sft.py --use-cpu
    torchrun --standalone --nproc-per-node 8 examples/sft.py --data chats.jsonl --model path/to/model \
        --max-length 131072 --capacity 16384 --tokens-per-step 1048576

TRL tokenises, applies chat templates, masks prompts and truncates as ever; two lines differ from a plain script: the mixin in
front of ``SFTTrainer``, and ``hdp=HdpConfig(...)`` in place of batch sizes. Packing is left off: short documents share
micro-batches anyway, without attending to each other, and long ones are spread over ranks.

--data is a .jsonl file of TRL's formats. Without it the functions of Python's standard library are learnt: signature and
docstring are the prompt, the body is the completion. With --lora only adapters are trained.
"""

from __future__ import annotations

import argparse
import ast
import sysconfig
from pathlib import Path

import peft
from datasets import Dataset
from finetune import build_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer

import hdp
import hdp.report
from hdp.parallel.adapters import HdpConfig, HdpTrainerMixin


class HdpSFTTrainer(HdpTrainerMixin, SFTTrainer):
    """TRL's trainer over planned global batches."""


def parse_arguments() -> argparse.Namespace:
    parser = hdp.report.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help=".jsonl file; default: functions of Python's standard library")
    parser.add_argument("--documents", type=int, default=2000, help="use so many at most (default: %(default)s)")
    parser.add_argument("--model", help="folder with model and tokenizer; default: a small Llama over bytes, untrained")
    parser.add_argument("--max-length", type=int, default=4096, help="in tokens (default: %(default)s)")
    parser.add_argument(
        "--capacity",
        type=hdp.report.tokens_or_auto,
        default="auto",
        help="tokens a rank holds at once; auto: what fits its memory (default: %(default)s)",
    )
    parser.add_argument("--tokens-per-step", type=int, default=12288, help="of all ranks (default: %(default)s)")
    parser.add_argument("--lora", type=int, default=0, help="rank of LoRA adapters; 0: all weights are trained")
    parser.add_argument("--steps", type=int, default=40, help="default: %(default)s")
    parser.add_argument("--lr", type=float, default=2e-3, help="highest learning rate (default: %(default)s)")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16, weights and optimizer in fp32")
    parser.add_argument("--output", default="runs/sft", help="default: %(default)s")
    parser.add_argument("--use-cpu", action="store_true", help="even if there is a GPU")
    return parser.parse_args()


def functions(limit: int) -> Dataset:
    """Documented functions of Python's standard library as prompts and completions."""
    rows = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        source = path.read_text(encoding="utf-8", errors="ignore")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) and len(node.body) > 1:
                lines = source.splitlines(keepends=True)
                start, body, end = node.lineno - 1, node.body[1].lineno - 1, node.end_lineno
                rows.append({"prompt": "".join(lines[start:body]), "completion": "".join(lines[body:end])})
                if len(rows) == limit:
                    return Dataset.from_list(rows)
    return Dataset.from_list(rows)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One id a byte, and one that ends a document."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: number for number, symbol in enumerate([*alphabet, "<end>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def main() -> None:
    args = parse_arguments()
    training = SFTConfig(
        output_dir=args.output,
        max_length=args.max_length,
        max_steps=args.steps,
        learning_rate=args.lr,
        warmup_steps=0.1,
        logging_steps=1,
        save_strategy="no",
        gradient_checkpointing=False,
        bf16=args.bf16,
        disable_tqdm=True,
        report_to="none",
        use_cpu=args.use_cpu,
    )
    world = hdp.init(device=training.device)
    set_seed(training.seed)  # the same weights on every rank
    tokenizer = AutoTokenizer.from_pretrained(args.model) if args.model else byte_tokenizer()
    rows = Dataset.from_json(args.data) if args.data else functions(args.documents)
    adapters = (
        peft.LoraConfig(r=args.lora, target_modules="all-linear", exclude_modules=["lm_head"]) if args.lora else None
    )
    trainer = HdpSFTTrainer(
        build_model(args.model, vocab_size=len(tokenizer), max_length=args.max_length),
        training,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=adapters,
        hdp=HdpConfig(tokens_per_step=args.tokens_per_step, capacity=args.capacity),
        world=world,
    )
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    world.close()


if __name__ == "__main__":
    hdp.report.launch(main)
