import importlib.util
from pathlib import Path

import pytest

from ifseg_hf.hub.conversion import ConversionError, ConversionReport

SCRIPT = Path(__file__).parents[2] / "scripts" / "convert_ofa.py"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("convert_ofa", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def report(**changes):
    fields = {
        "output_dir": Path("out"),
        "architecture": "IFSegForConditionalGeneration",
        "size": "base",
        "parameters": 182_000_000,
        "has_words": False,
        "used": {"encoder.embed_tokens.weight": "encoder.embed_tokens.weight"},
        "accounted": {f"decoder.copy{i}": "a copy" for i in range(5)} | {"encoder.version": "a number"},
        "ignored": ["args"],
        "notes": ["one row was left out"],
    }
    return ConversionReport(**(fields | changes))


def test_arguments_reach_the_conversion_and_the_summary_says_what_became_of_every_tensor(script, monkeypatch, capsys):
    calls = []

    def convert(*args, **kwargs):
        calls.append((args, kwargs))
        return report()

    monkeypatch.setattr(script, "convert_ofa_checkpoint", convert)
    arguments = ["ifseg.pt", "out", "--tokenizer", "bpe", "--categories", "cat, dining table", "--prompt", "what?"]
    assert script.main(arguments) == 0
    expected = {"tokenizer": "bpe", "categories": ["cat", "dining table"], "prompt": "what?", "max_shard_size": "1GB"}
    assert calls == [(("ifseg.pt", "out"), expected)]
    printed = capsys.readouterr().out
    for text in (
        "size base, 182,000,000 parameters",
        "1 tensors used, 6 accounted for",
        "5 x a copy: decoder.copy0, decoder.copy1, decoder.copy2 and 2 more",
        "1 x a number: encoder.version",
        "not read: args",
        "Note: one row was left out.",
        "scripts/train.py --model out",
    ):
        assert text in printed


def test_next_step_of_a_released_checkpoint(script):
    segmentation = {"architecture": "IFSegForSemanticSegmentation"}
    assert "segment.py PHOTO --model out --categories" in script.summary(report(**segmentation))
    assert "segment.py PHOTO --model out --output-dir" in script.summary(report(**segmentation, has_words=True))


def test_errors_are_one_line_without_traceback(script, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise ConversionError("The checkpoint is damaged.")

    monkeypatch.setattr(script, "convert_ofa_checkpoint", fail)
    assert script.main(["ofa.pt", "out"]) == 1
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "error: The checkpoint is damaged.\n")


@pytest.mark.parametrize(
    "arguments", [[], ["ofa.pt"], ["ofa.pt", "out", "--prompt", "what?"], ["ofa.pt", "out", "--no"]]
)
def test_usage_errors(script, arguments):
    with pytest.raises(SystemExit) as exit_info:
        script.main(arguments)
    assert exit_info.value.code == 2
