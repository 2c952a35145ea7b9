"""Mistakes that people type, and the answers, which come before anything is loaded or written."""

import importlib.util
import json
import shlex

import pytest

from skipwise import commands
from skipwise.cli import main
from skipwise.config.parse import describe_changes, load_recipe, parse_recipe
from skipwise.errors import SkipwiseError


@pytest.fixture
def nothing_is_touched(monkeypatch, tmp_path):
    """Loading weights or reading text is an AssertionError; the folder stays empty."""
    from transformers import PreTrainedModel

    from skipwise.evaluation import run
    from skipwise.pipeline import choose_separator
    from skipwise.training import inputs

    def touched(*arguments, **options):
        raise AssertionError("a model was loaded or a text was read")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", touched)
    monkeypatch.setattr(choose_separator, "read_documents", touched)
    monkeypatch.setattr(inputs, "tokenize_source", touched)
    monkeypatch.setattr(run, "tokenize_source", touched)
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.iterdir())


def answer(capsys, *arguments):
    """The lines on stderr of a command that ends with code 2."""
    assert main([str(argument) for argument in arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("skipwise: ") and len(lines) <= 3
    return "\n".join(lines)


SETTINGS = [
    ("eval.tasks=passkeey", "did you mean passkey?"),
    ("eval.tasks=perplexity,passkey,rulr", "no task 'rulr': did you mean ruler?"),
    ("eval.tasks=", "eval.tasks is None"),
    ("eval.tasks=''", "eval.tasks is ''"),
    ("eval.num_depths=0", "give 1 to 1,000"),
    ("eval.passkey_samples=many", "give a whole number"),
    ("eval.passkey_sample=3", "did you mean eval.passkey_samples?"),
    ("eval.context_lengths=64,1k", "1024 is beyond target_length 256"),
    ("eval.context_lengths=0", "not a length"),
    ("eval.task_folder=nowhere", "is not a folder"),
    ("eval.chat_template=true", "no chat template"),
    ("trainer.foo=1", "not an argument of transformers' TrainingArguments"),
    ("trainer.adam_beta=1", "did you mean adam_beta2 or adam_beta1?"),
    ("trainer.adam_beta1=high", "trainer.adam_beta1 is 'high': give a number"),
    ("trainer.adam_beta1=2", "Invalid beta parameter"),
    ("trainer.torch_empty_cache_steps=0", "bigger than 0"),
    ("trainer.eval_strategy=steps", "set by nothing: eval.tasks"),
    ("trainer.save_strategy=no", "set by training.save_steps"),
    ("trainer.report_to=wandbb", "did you mean wandb or swanlab?"),
    ("trainer.report_to=wandb", "wandb is not installed: pip install wandb"),
    ("trainer.report_to=trackio", "trackio is not installed: pip install trackio"),
    ("trainer.report_to=mlflow", "mlflow is not installed: pip install mlflow"),
    ("trainer.report_to=comet_ml", "comet_ml is not installed: pip install comet_ml"),
    ("trainer.report_to=tensorboard", "pip install '.[tensorboard]'"),
    ("trainer.report_to=swanlab,wandb", "swanlab is not installed"),
    ("trainer.optim=adamw_8bits", "did you mean adamw_8bit"),
    ("trainer.optim=adamw_bnb_8bit", "bitsandbytes"),
    ("trainer.optim=schedule_free_adamw", "schedulefree"),
    ("trainer.optim=galore_adamw", "need to install `galore_torch`"),
    ("trainer.use_liger_kernel=true", "pip install liger-kernel"),
    ("trainer.deepspeed=nowhere.json", "trainer.deepspeed: give a mapping"),
    ("training.lr_scheduler=lineer", "did you mean linear"),
    ("training.lr_scheduler=reduce_lr_on_plateau", "requires an eval strategy"),
    ("training.lr_scheduler=cosine_with_min_lr", "min_lr"),
    ("trainer.lr_scheduler_kwargs={cycles: 1}", "cycles"),
    ("load.attn_implementation=flash_attention_3", "FlashAttention"),
    ("load.device_map=gpu", "choose one of auto, balanced"),
    ("lora.target_modules=q_prj", "No modules were targeted"),
    ("lora.rank=0", "lora.rank is 0: give 1 to 65,536"),
    ("lora.quantization=nf4", "pip install '.[qlora]'"),
    ("engine=zero3", "pip install '.[deepspeed]'"),
    ("data.eval_sources=./nowhere.txt", "no such file or folder"),
    ("data.sources=me/books", "pip install '.[hub]'"),
    ("data.sources=./nowhere.txt,./books", "./nowhere.txt: no such file or folder"),
]
_PACKAGES = (
    "bitsandbytes",
    "deepspeed",
    "datasets",
    "tensorboard",
    "tensorboardX",
    "wandb",
    "trackio",
)


@pytest.fixture
def bare_machine(monkeypatch):
    """No optional package is installed, whatever is on this machine."""
    from transformers import trainer_optimizer
    from transformers.integrations import integration_utils

    found = importlib.util.find_spec
    hidden = lambda name, *more: None if name in _PACKAGES else found(name, *more)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hidden)
    monkeypatch.setattr(trainer_optimizer, "is_bitsandbytes_available", lambda: False)
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: False)


@pytest.mark.parametrize(("setting", "words"), SETTINGS)
def test_a_wrong_setting_is_found_before_a_model_is_loaded(
    setting, words, tiny, text_folder, capsys, nothing_is_touched, bare_machine
):
    verb = "train" if setting.startswith("engine") else "extend"
    given = [verb, tiny, "--to", 256, "--data", text_folder, setting]
    assert words in answer(capsys, *given)


@pytest.mark.parametrize("verb", ["check", "train", "extend"])
@pytest.mark.parametrize(
    ("setting", "words"),
    [
        pytest.param(
            "eval.tasks=a_task_of_nobody", "no task", marks=pytest.mark.extended
        ),  # needs lm-eval
        ("trainer.report_to=wandb", "pip install wandb"),
        ("eval.context_lengths=1k", "beyond target_length"),
    ],
)
def test_every_verb_that_takes_the_setting_finds_it(
    verb, setting, words, tiny, text_folder, capsys, nothing_is_touched
):
    assert words in answer(capsys, verb, tiny, "--to", 256, "--data", text_folder, setting)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tasks", "passkeey"], "did you mean passkey?"),
        (["--tasks", "passkey,"], "eval.tasks is ''"),
        (["eval.tasks=perplexity,passkey"], "perplexity need text: type --data PATH"),
        (["--tasks", "perplexity"], "perplexity need text: type --data PATH"),
        (["--data", "./nowhere.txt"], "no such file or folder"),
        (["load.attn_implementation=flash_attention_3"], "FlashAttention"),
        (["eval.chat_template=true"], "no chat template"),
        (["trainer.report_to=none"], "does not take effect on a model as it is"),
        (["--limits", "3"], "did you mean --limit"),
        (["--num_depths", "3"], "type eval.num_depths=3"),
    ],
)
def test_eval_answers_before_it_loads_or_writes(arguments, words, tiny, capsys, nothing_is_touched):
    given = ["eval", tiny, "--lengths", "64", *arguments]
    assert words.replace("type eval", "eval") in answer(capsys, *given)


def test_the_quickstart_answers_before_it_writes_its_text(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("SKIPWISE_CACHE", str(tmp_path / "cache"))
    said = answer(capsys, "quickstart", "trainer.foo=1", "--out", tmp_path / "run")
    assert "trainer.foo is not an argument" in said and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("exten ./m --to 32k", "did you mean extend?"),
        ("./my-model --to 32k", "is not a verb: choose from quickstart, extend"),
        ("extend ./m --to 32k --dta books", "did you mean --data"),
        ("extend ./m --to 32k --num_steps 20", "key=value: training.num_steps=20"),
        ("extend ./m --to 32k --num-steps=20", "key=value: training.num_steps=20"),
        ("extend --training.num_steps 20 ./m", "key=value: training.num_steps=20"),
        ("extend ./m --to 32k --tasks passkey,needle", "key=value: eval.tasks=passkey,needle"),
        ("extend ./m --to 32k --tasks [passkey]", "key=value: 'eval.tasks=[passkey]'"),
        ("extend ./m --to 32k training.num_step=20", "did you mean training.num_steps?"),
        ("extend ./m --to 32k num_steps=20", "did you mean training.num_steps?"),
        ("extend ./m --to 32k trainig.num_steps=20", "did you mean training or trainer?"),
        ("extend ./m --to 32k rope.type=yarm", "did you mean yarn?"),
        ("extend ./m --to 32k method=pos", "did you mean pose or randpos?"),
        ("extend ./m --to 32k --engine fsdp", "did you mean fsdp2?"),
        ("extend ./m --to 32k --gpus two", "invalid int value: 'two'"),
        ("extend ./m --to", "expected one argument"),
        ("check", "are required: MODEL|RECIPE|RUN"),
        ("check ./m 32k", "unrecognized arguments: 32k"),
        ("positions num_chunk=3", "did you mean positions.num_chunks?"),
        ("plan ./m --to 32k --gpu RTX309", "did you mean RTX3090"),
        ("export runs/x --to ggf", "did you mean gguf?"),
        ("export runs/x rope.type=yarn", "export accepts no key=value settings"),
        ("plan recipes/a.yaml eval.context_lengths=64k", "No such file"),
    ],
)
def test_a_misspelled_word_gets_a_suggestion(line, words, capsys):
    assert words in answer(capsys, *shlex.split(line))


def test_plan_finds_lengths_beyond_the_target(tiny, capsys):
    said = answer(capsys, "plan", tiny, "--to", 256, "eval.context_lengths=64..1k")
    assert "1024 is beyond target_length 256" in said


def test_a_list_may_be_written_with_commas(tmp_path, monkeypatch):
    def sources(*settings):
        tree = {"model": "m", "target_length": 1024}
        return parse_recipe(tree, list(settings))

    assert sources("eval.tasks=a,b").eval.tasks == ("a", "b")
    assert sources("eval.tasks=[a, b]") == sources("eval.tasks=a, b")
    assert sources("eval.context_lengths=64,1k").eval.context_lengths == (64, 1024)
    assert sources("eval.context_lengths=64..256").eval.context_lengths == (64, 128, 256)
    assert sources("eval.context_lengths=64").eval.context_lengths == (64,)
    recipe = sources("lora.target_modules=q_proj,v_proj")
    assert recipe.lora.target_modules == ("q_proj", "v_proj")
    assert sources("data.sources=a.txt,b.txt").data.sources == ("a.txt", "b.txt")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a,b.txt").write_text("one file")
    assert sources("data.sources=a,b.txt").data.sources == ("a,b.txt",)
    assert sources("data.sources=[a,b.txt]").data.sources == ("a", "b.txt")
    assert sources("data.sources=['a,b', c]").data.sources == ("a,b", "c")
    (tmp_path / "r.yaml").write_text("model: m\ntarget_length: 1k\neval: {tasks: 'x, y'}\n")
    assert load_recipe(tmp_path / "r.yaml").eval.tasks == ("x", "y")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (["training.num_steps=1000"], ["training.num_steps=20"], "num_steps: 1000 -> 20"),
        (["data.sources=a"], ["data.sources=b"], "data.sources: a -> b"),
        (["data.sources=a"], ["data.sources=a,b"], "data.sources: a -> a, b"),
        (["data.sources=a,b"], ["data.sources=a,c"], "data.sources[1]: b -> c"),
        (
            ["data.sources=[{path: a, weight: 1}, b]"],
            ["data.sources=[{path: a, weight: 3}, b]"],
            "data.sources[0].weight: 1 -> 3",
        ),
        (["trainer.optim=sgd"], [], "trainer.optim: sgd -> not set"),
        ([], ["lora={}", "lora.rank=3"], "lora: not set -> {rank: 3, alpha: 32"),
        ([], ["eval.context_lengths=64"], "eval.context_lengths: none -> 64"),
        (["rope.type=yarn"], ["rope.type=ntk", "seed=3"], "seed: 0 -> 3; rope.type: yarn -> ntk"),
    ],
)
def test_recipes_are_compared_field_by_field(old, new, said, tmp_path):
    from skipwise.config.run_folder import open_run

    tree = {"model": "m", "target_length": 1024}
    old, new = parse_recipe(tree, old), parse_recipe(tree, new)
    changes = describe_changes(old, new)
    assert said in changes and "\n" not in changes and not describe_changes(old, old)
    open_run(tmp_path / "run", old, "skipwise train")
    with pytest.raises(SkipwiseError, match="holds a run of another recipe: ") as caught:
        open_run(tmp_path / "run", new, "skipwise train")
    assert said in str(caught.value) and len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    "line",
    [
        "check MODEL --to 512 --lora --data 'my books/c.jsonl' data.text_field=b rope.type=yarn",
        "check eval.tasks=[passkey,needle] MODEL data.sources=a.txt,b.txt target_length=1k",
        "check mine.yaml training.num_steps=3",
    ],
)
def test_the_next_line_of_check_is_the_same_job(line, tiny, capsys, monkeypatch, tmp_path):
    from skipwise.cli import _parse
    from skipwise.errors import Check
    from skipwise.pipeline import checks

    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(f"model: {tiny}\ntarget_length: 256\ndata: {{sources: x}}")
    given = []
    passed = [Check(name="all", passed=True, detail="well")]
    monkeypatch.setattr(checks, "check", lambda recipe: given.append(recipe) or passed)
    words = [str(tiny) if word == "MODEL" else word for word in shlex.split(line)]
    assert main(words) == 0
    (typed,) = [s for s in capsys.readouterr().out.splitlines() if s.startswith("next: ")]
    again = shlex.split(typed.removeprefix("next: "))
    assert again[:2] == ["skipwise", "extend"]
    assert commands._load_recipe(_parse(again[1:])) == given[0]


def test_check_without_text_says_where_the_text_goes(tiny, capsys, monkeypatch):
    from skipwise.pipeline import checks

    monkeypatch.setattr(checks, "check", lambda recipe: [])
    assert main(["check", str(tiny), "--to", "256", "seed=3"]) == 0
    said = capsys.readouterr().out
    assert f"next: skipwise extend {tiny} --to 256 seed=3 --data FOLDER" in said


def _failed_run(folder):
    """A run whose passkey is not found at the target."""
    from skipwise.config.run_folder import RunFolder, open_run

    recipe = parse_recipe({"model": "tiny", "target_length": 256})
    run: RunFolder = open_run(folder, recipe, "skipwise extend")
    run.update(model={"name": "tiny"}, original_length=64, target_length=256, exported=True)
    row = {"task": "passkey", "metric": "accuracy", "num_samples": 50, "low": 0.0, "high": 0.1}
    run.write_results(
        [
            {**row, "model": "before", "context_length": 64, "value": 1.0},
            {**row, "model": "after", "context_length": 64, "value": 1.0},
            {**row, "model": "after", "context_length": 256, "value": 0.02},
        ]
    )
    run.model.mkdir()
    (run.model / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return run


def test_the_terminal_ends_with_the_verdict_of_the_page(tmp_path, capsys):
    from skipwise.report import verdict, write_report

    run = _failed_run(tmp_path / "run")
    said = verdict(run.path)
    assert said.startswith("Extending tiny from 64 to 256 tokens did not work: passkey below 90 %")
    commands.print_summary(run)
    assert capsys.readouterr().out.rstrip().endswith(said)
    page = write_report(run.path).read_text()
    assert "Extending tiny from 64 to 256 tokens did not work" in page
    assert main(["report", str(run.path)]) == 0
    assert capsys.readouterr().out.rstrip().endswith(said)


def test_publish_repeats_the_verdict_before_it_asks(tmp_path, capsys, monkeypatch):
    from skipwise.export import hub, model_card

    run, asked = _failed_run(tmp_path / "run"), []
    monkeypatch.setattr(model_card, "write_card", lambda *arguments: None)
    monkeypatch.setattr(hub, "confirm", lambda upload: asked.append(capsys.readouterr().err))
    assert main(["publish", str(run.path), "me/tiny"]) == 0
    assert "Extending tiny from 64 to 256 tokens did not work" in asked[0]
    assert "nothing uploaded" in capsys.readouterr().out
