"""A server for scripts that import trainers, a corpus, a tiny model, and what plain training makes of them."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "examples"))
from ranks import Outcome, Server  # noqa: E402

IMPORTS = ("transformers.trainer", "trl.trainer.sft_trainer", "peft", "datasets", "accelerate")
IMPORTS += ("hdp.parallel.adapters.trainer", "hdp.parallel.ddp")
SETTINGS = {
    "max_length": 200, "tokens_per_step": 640, "lr": 2e-3,
    "sft_documents": 24, "sft_length": 300, "sft_tokens_per_step": 1500,
}  # fmt: skip


class AdapterServer(Server):
    """Has imported the trainers, too."""

    def __init__(self) -> None:
        paths = [str(ROOT / "tests" / "examples"), str(ROOT / "examples")]
        code = f"import sys; sys.path[:0] = {paths}; import ranks; ranks.IMPORTS += {IMPORTS}; ranks._serve()"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )


@pytest.fixture(scope="session")
def server() -> Iterator[AdapterServer]:
    missing = [name for name in ("accelerate", "datasets", "peft", "trl") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{missing[0]} is not installed: pip install '.[adapters]'")
    server = AdapterServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``corpus/`` and ``model/``."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("adapters")
    (folder / "corpus").mkdir()
    for number in range(24):
        text = f"def f{number}(x):\n    return x + {number}\n" * (1 + number % 9)
        (folder / "corpus" / f"{number:02}.txt").write_text(text)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.1, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="session")
def run(server: AdapterServer, base: Path) -> Callable[..., Outcome]:
    """``run("lora.py", *arguments, ranks=2)``: runs an example on the corpus, with the tiny model, in ``base``."""

    def run(script: str, *arguments: object, ranks: int = 2, data: bool = True) -> Outcome:
        chosen = ("--data", base / "corpus", "--max-length", SETTINGS["max_length"]) if data else ()
        common = (*chosen, "--model", base / "model", "--lr", SETTINGS["lr"])
        return server.run(
            ROOT / "examples" / script, *common, *arguments, ranks=ranks, folder=base, HDP_CACHE=str(base / "cache")
        ).check()

    return run


@pytest.fixture(scope="session")
def reference(server: AdapterServer, base: Path) -> dict[str, list[float]]:
    """Losses of plain training, by example."""
    path = base / "settings.json"
    path.write_text(
        json.dumps(SETTINGS | {"data": str(base / "corpus"), "model": str(base / "model"), "folder": str(base)})
    )
    script = Path(__file__).with_name("reference.py")
    server.run(script, path, ranks=1, folder=base, HDP_CACHE=str(base / "cache")).check()
    return json.loads((base / "reference.json").read_text())
