"""The ten lines of the README run as they stand, alone and over two ranks."""

import json
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "examples"))
from ranks import Outcome, Server

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What the lines expect beside them: ``corpus.jsonl``, and a ``model`` with its tokenizer."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("readme")
    rows = [{"text": "to be or not to be " * (1 + 30 * (number % 7))} for number in range(40)]
    rows.append({"text": "to be or not to be " * 1700})  # longer than the capacity of one rank
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    vocabulary = {word: i for i, word in enumerate(["<unk>", "</s>", "to", "be", "or", "not"])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>")
    made.save_pretrained(folder / "model")
    config = transformers.LlamaConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    code = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert code is not None, "the README shows no python"
    (folder / "train.py").write_text(code[1] + "\nprint(f'ended with loss {result.loss:.3f}', flush=True)\n")
    return folder


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.close()


def run(server: Server, folder: Path, ranks: int) -> Outcome:
    return server.run(folder / "train.py", ranks=ranks, folder=folder, HDP_CACHE=str(folder / "cache"))


def test_the_ten_lines_run_over_two_ranks(server, folder):
    outcome = run(server, folder, 2).check()
    assert all("ended with loss" in output for output in outcome.outputs)


def test_alone_the_long_document_trains_where_memory_holds_it(server, folder):
    assert "ended with loss" in run(server, folder, 1).check().outputs[0]
    lines = (folder / "train.py").read_text()
    (folder / "train.py").write_text(lines.replace("steps=2)", "steps=2, memory=3e6)"))
    refused = run(server, folder, 1)
    assert refused.codes == [1] and "document 40 of 10" in refused.outputs[0]
    assert "is what the memory of a rank was found to hold" in refused.outputs[0]
