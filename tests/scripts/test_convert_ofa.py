"""Arguments, summary and errors of `scripts/convert_ofa.py`."""

from pathlib import Path

import pytest

from ifseg_hf.cli.convert import summary
from ifseg_hf.hub import conversion
from ifseg_hf.hub.conversion import ConversionError, ConversionReport
from scripts import load_script


@pytest.fixture(scope="module")
def script():
    return load_script("convert_ofa")


def report(**changes):
    fields = {
        "output_dir": Path("out"),
        "architecture": "OFAForConditionalGeneration",
        "size": "base",
        "parameters": 182_000_000,
        "has_words": False,
        "used": {"encoder.embed_tokens.weight": "encoder.embed_tokens.weight"},
        "accounted": {f"decoder.copy{i}": "a copy" for i in range(5)} | {"encoder.version": "a number"},
        "ignored": ["args"],
        "notes": ["one row was left out"],
    }
    return ConversionReport(**(fields | changes))


def test_arguments_are_passed_on_and_summary_lists_all_tensors(script, monkeypatch, capsys):
    calls = []

    def convert(*args, **kwargs):
        calls.append((args, kwargs))
        return report()

    monkeypatch.setattr(conversion, "convert_ofa_checkpoint", convert)
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
        "not used: args",
        "Note: one row was left out.",
        'ifseg segment IMAGE "cat, grass, sky" --model out',
    ):
        assert text in printed


def test_next_step_of_a_released_checkpoint():
    segmentation = {"architecture": "IFSegForSemanticSegmentation"}
    assert "segment IMAGE --model out --no-tune --categories" in summary(report(**segmentation))
    assert "segment IMAGE --model out" in summary(report(**segmentation, has_words=True)).splitlines()[-1]


def test_errors_are_one_line_without_traceback(script, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise ConversionError("The checkpoint is damaged.")

    monkeypatch.setattr(conversion, "convert_ofa_checkpoint", fail)
    assert script.main(["ofa.pt", "out"]) == 1
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "convert_ofa.py: The checkpoint is damaged.\n")


@pytest.mark.parametrize(
    "arguments", [[], ["ofa.pt"], ["ofa.pt", "out", "--prompt", "what?"], ["ofa.pt", "out", "--no"]]
)
def test_usage_errors(script, arguments):
    with pytest.raises(SystemExit) as exit_info:
        script.main(arguments)
    assert exit_info.value.code == 2
