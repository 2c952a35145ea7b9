"""The model card: what the model is, what was measured, how it was made, how to load it.

Everything in it comes from the run folder and the base model's own card, of which the licence and
the language are carried over. The metadata is written by huggingface_hub, in the form that the
Hub reads.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from skipwise.config.run_folder import RunFolder, write_text
from skipwise.report import format_table
from skipwise.report.format import metric_name, short_value
from skipwise.report.headline import headline
from skipwise.report.rows import find, other_tasks

_CARRIED = ("license", "license_name", "license_link", "language")
_PAPERS = {  # BibTeX of what was used
    "pose": (
        "@inproceedings{zhu2024pose,\n"
        "  title={PoSE: Efficient Context Window Extension of LLMs via Positional Skip-wise "
        "Training},\n"
        "  author={Zhu, Dawei and Yang, Nan and Wang, Liang and Song, Yifan and Wu, Wenhao and "
        "Wei, Furu and Li, Sujian},\n"
        "  booktitle={International Conference on Learning Representations},\n"
        "  year={2024}\n}"
    ),
    "yarn": (
        "@inproceedings{peng2024yarn,\n"
        "  title={YaRN: Efficient Context Window Extension of Large Language Models},\n"
        "  author={Peng, Bowen and Quesnelle, Jeffrey and Fan, Honglu and Shippole, Enrico},\n"
        "  booktitle={International Conference on Learning Representations},\n"
        "  year={2024}\n}"
    ),
    "linear": (
        "@article{chen2023extending,\n"
        "  title={Extending Context Window of Large Language Models via Positional "
        "Interpolation},\n"
        "  author={Chen, Shouyuan and Wong, Sherman and Chen, Liangjian and Tian, Yuandong},\n"
        "  journal={arXiv preprint arXiv:2306.15595},\n"
        "  year={2023}\n}"
    ),
}


def write_card(run: RunFolder, place: str = "FOLDER") -> Path:
    """README.md in the run's model folder, and the base's licence files beside it.

    Args:
        place: where a reader will find the model, for the commands that load it.
    """
    recipe, facts = run.recipe(), run.metadata()
    base = Path(recipe.model).expanduser()
    carried = base_metadata(recipe.model)
    if base.is_dir():
        for file in sorted(base.iterdir()):
            if file.is_file() and file.name.lower().startswith(("license", "licence", "notice")):
                shutil.copyfile(file, run.model / file.name)
    path = run.model / "README.md"
    text = f"---\n{metadata(run, carried)}\n---\n\n{_body(run, facts, carried, place)}"
    write_text(path, text)
    return path


def base_metadata(model: str) -> dict[str, Any]:
    """The base model's licence and language, from its card in its folder or on the hub."""
    folder = Path(model).expanduser()
    try:
        if folder.exists():
            card = ModelCard((folder / "README.md").read_text(encoding="utf-8"))
        else:
            card = ModelCard.load(model)
        found = card.data.to_dict()
    except Exception:  # no card, no network, broken YAML: then nothing is known of it
        return {}
    return {key: found[key] for key in _CARRIED if found.get(key)}


def metadata(run: RunFolder, carried: dict[str, Any]) -> str:
    """The YAML at the top of the card."""
    recipe, facts, rows = run.recipe(), run.metadata(), run.results()
    is_folder = Path(recipe.model).expanduser().exists()
    T = recipe.target_length
    results = []
    for task in ("passkey", "needle", "perplexity", *other_tasks(rows)):
        row = find(rows, "after", task, T)
        if row is None or row.get("value") is None:
            continue
        results.append(
            EvalResult(
                task_type="text-generation",
                task_name="Text Generation",
                dataset_type=f"skipwise-{task}",
                dataset_name=f"{task} at {T:,} tokens",
                metric_type=row["metric"],
                metric_name=metric_name(row),
                metric_value=round(float(row["value"]), 4),
            )
        )
    data = ModelCardData(
        base_model=None if is_folder else recipe.model,
        datasets=_hub_datasets(facts) or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["long-context", "pose", "skipwise", recipe.method],
        model_name=recipe.run_name if results else None,
        eval_results=results or None,
        **carried,
    )
    return data.to_yaml(line_break="\n").strip()


def _body(run: RunFolder, facts: dict[str, Any], carried: dict[str, Any], place: str) -> str:
    recipe, rows = run.recipe(), run.results()
    L, T = facts.get("original_length") or 0, recipe.target_length
    scaling = facts.get("scaling", recipe.rope.type)
    name = facts.get("model", {}).get("name", recipe.model)
    papers = [_PAPERS["pose"], *([_PAPERS[scaling]] if scaling in _PAPERS else [])]
    licence = carried.get("license")
    return f"""# {recipe.run_name}

`{name}` with its context window extended from {L:,} to {T:,} tokens by Skipwise, with
[PoSE](https://arxiv.org/abs/2309.10400) (positional skip-wise training) and `{scaling}` RoPE
scaling.

{headline(facts, rows)}

## Measured before and after

{format_table(rows)}

95 % intervals in brackets. Perplexity is on the same target tokens at every context length;
passkey and needle are exact matches over all depths.

{_short(rows, L)}

## How it was made

{_made(recipe, facts)}

## Limits

- Finding a passkey and a low perplexity show that the window works, not that the model reasons
  over all of it: test it on your task.
- What was not measured above is not known; beyond {T:,} tokens nothing is promised.
- Knowledge, biases and safety are the base model's.

## How to load it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{place}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{place}")
```

```
vllm serve {place} --max-model-len {T}
python -m sglang.launch_server --model-path {place} --context-length {T}
llama-server -m MODEL.gguf -c {T}
```

No code of Skipwise is needed: the scaling is in `config.json`, in the spellings of transformers 5
and 4. The recipe is in `skipwise_recipe.yaml`.

## Licence

{f"`{licence}`, that of the base model." if licence else "That of the base model."}

## Citation

```bibtex
{chr(10).join(papers)}
```
"""


def _short(rows: list[dict[str, Any]], L: int) -> str:
    """What the extension did to contexts that the base could read already."""
    said = []
    for task in ("perplexity", "passkey", "needle", *other_tasks(rows)):
        before, after = find(rows, "before", task, L), find(rows, "after", task, L)
        if not before or not after or before.get("value") is None or after.get("value") is None:
            continue
        old, new = float(before["value"]), float(after["value"])
        if task == "perplexity":
            said.append(f"perplexity {old:.2f} before, {new:.2f} after ({new / old - 1:+.1%})")
        else:
            said.append(f"{task} {short_value(before)} before, {short_value(after)} after")
    if not said:
        return "What the extension costs at short length was not measured."
    return f"At the original length of {L:,} tokens: {'; '.join(said)}."


def _made(recipe: Any, facts: dict[str, Any]) -> str:
    training, data = facts.get("training", {}), facts.get("data", {})
    value = facts.get("temperature", {}).get("value", 1)
    sharper = [f"- attention temperature {value:g}, in the query weights"] if value != 1 else []
    if not training:
        return "\n".join(["Rescaled without training.", *(["", *sharper] if sharper else [])])
    mode = {"full": "all weights", "lora": "LoRA", "qlora": "QLoRA"}[training["mode"]]
    lines = [
        f"- method `{recipe.method}`, {mode}, {training['num_steps']:,} steps of "
        f"{training['tokens_per_step']:,} tokens ({training['num_tokens']:,} in all), learning "
        f"rate {recipe.training.learning_rate:g}",
        f"- trained on examples of {facts.get('train_length', 0):,} tokens with position indices "
        f"up to {recipe.target_length:,}",
        *_finish(recipe, facts.get("finish", {})),
        f"- {data.get('num_documents', 0):,} documents, {data.get('num_tokens', 0):,} tokens"
        + (f", from {', '.join(names)}" if (names := _hub_datasets(facts)) else ""),
    ]
    if (chosen := facts.get("selection", {}).get("chosen")) is not None:
        lines.append(f"- the checkpoint of step {chosen:,}, chosen by {facts['selection']['by']}")
    lines += sharper
    versions = facts.get("versions", {})
    told = [f"{k} {versions[k]}" for k in ("skipwise", "transformers", "torch") if k in versions]
    return "\n".join([*lines, f"- {', '.join(told)}"])


def _finish(recipe: Any, finish: dict[str, Any]) -> list[str]:
    if finish.get("seconds") is None:
        return []
    return [
        f"- then at full length: {finish['num_steps']:,} steps of {finish['batch_size']:,} examples"
        f" of {recipe.target_length:,} tokens ({finish['num_tokens']:,} in all), learning rate "
        f"{finish['learning_rate']:g}"
    ]


def _hub_datasets(facts: dict[str, Any]) -> list[str]:
    """Sources that are data sets of the hub; local paths are nobody's business."""
    sources = facts.get("data", {}).get("sources", [])
    return [s for s in sources if s.count("/") == 1 and not Path(s).expanduser().exists()]


def read_metadata(card: Path) -> dict[str, Any]:
    """The YAML at the top of a card."""
    _, head, _ = card.read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(head)
