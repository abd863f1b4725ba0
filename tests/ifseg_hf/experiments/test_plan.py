"""Steps of a plan: their commands, their order, and which of them run."""

import pytest

from ifseg_hf.experiments.plan import ACCELERATE, Plan, Step, in_order, run_plan, shell, with_flag, write_text
from ifseg_hf.experiments.results import markdown_table, mean_and_deviation

COMMANDS = {
    "tuned": "train.py --model {ofa} --categories {words}",
    "labels": "pseudo_label.py --model {tuned} --dataset DATA",
    "self-trained": "train.py --model {tuned} --dataset {labels} --seed {seed}",
}


@pytest.fixture
def plan(tmp_path):
    return Plan(COMMANDS, {"ofa": "ofa-base", "words": "cat, sea grass", "seed": "3"}, tmp_path, "-3")


def test_a_command_names_values_and_folders(plan, tmp_path):
    step = plan.step("self-trained")
    folders = {name: str(tmp_path / f"{name}-3") for name in COMMANDS}
    inputs = ["--model", folders["tuned"], "--dataset", folders["labels"]]
    output = ["--output-dir", folders["self-trained"]]
    assert step.command == ["train.py", *inputs, "--seed", "3", "--resume", *output]
    assert plan.step("tuned").arguments[-2:] == ("cat, sea grass", "--resume")


def test_each_step_follows_the_steps_it_needs(plan):
    steps = in_order([plan.step("self-trained"), plan.step("labels")])
    assert steps == [plan.step(name) for name in COMMANDS]


def test_only_incomplete_steps_run(plan, tmp_path, capsys):
    commands = []
    (tmp_path / "tuned-3").mkdir()
    (tmp_path / "tuned-3" / "config.json").touch()
    run_plan([plan.step("self-trained")], commands.append)
    assert [command[0] for command in commands] == ["pseudo_label.py", "train.py"]
    assert capsys.readouterr().out.count("python scripts/") == 2


def test_a_step_without_a_marker_runs_every_time(tmp_path):
    commands = []
    for _ in range(2):
        run_plan([Step("eval.py", (), tmp_path)], commands.append)
    assert commands == [["eval.py", "--output-dir", str(tmp_path)]] * 2


def test_a_dry_run_prints_complete_steps_too(plan, tmp_path, capsys):
    (tmp_path / "tuned-3").mkdir()
    (tmp_path / "tuned-3" / "config.json").touch()
    commands = []
    run_plan([plan.step("labels")], commands.append, ACCELERATE, dry_run=True)
    assert commands == []
    lines = capsys.readouterr().out.splitlines()
    assert lines == [shell(plan.step(name).command, ACCELERATE) for name in ("tuned", "labels")]
    assert "--categories 'cat, sea grass'" in lines[0]


@pytest.mark.parametrize(
    ("command", "only_replace", "expected"),
    [
        ("train.py --steps 8 --model {ofa}", False, "train.py --steps 1 --model '{ofa}'"),
        ("train.py", False, "train.py --steps 1"),
        ("train.py", True, "train.py"),
    ],
)
def test_a_flag_is_replaced_or_added(command, only_replace, expected):
    assert with_flag(command, "--steps", "1", only_replace) == expected


def test_a_file_is_written_without_remains(tmp_path):
    for text in ("one", "two"):
        write_text(tmp_path / "file", text)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "two")]


def test_tables_have_mean_and_deviation():
    assert [mean_and_deviation(values) for values in ([], [2], [1, 2, 3])] == ["-", "2.0", "2.0 ± 1.0"]
    assert markdown_table(["", "ours"], [["row", "1"]]) == "| | ours |\n|---|---|\n| row | 1 |"
