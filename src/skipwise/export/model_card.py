"""The model card: description, results, training settings, how to load the model.

The content comes from the run folder. License and language are copied from the base model's card.
huggingface_hub writes the metadata in the format that the Hub reads.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from skipwise.config.run_folder import RunFolder, write_text
from skipwise.models.convert.gguf import local_source
from skipwise.report import format_table
from skipwise.report.format import metric_name, short_value
from skipwise.report.headline import headline
from skipwise.report.rows import find, other_tasks

_COPIED_KEYS = ("license", "license_name", "license_link", "language")
_PAPERS = {  # BibTeX of the methods
    "pose": """@inproceedings{zhu2024pose,
  title={PoSE: Efficient Context Window Extension of LLMs via Positional Skip-wise Training},
  author={Zhu, Dawei and Yang, Nan and Wang, Liang and Song, Yifan and Wu, Wenhao and \
Wei, Furu and Li, Sujian},
  booktitle={International Conference on Learning Representations},
  year={2024}
}""",
    "yarn": """@inproceedings{peng2024yarn,
  title={YaRN: Efficient Context Window Extension of Large Language Models},
  author={Peng, Bowen and Quesnelle, Jeffrey and Fan, Honglu and Shippole, Enrico},
  booktitle={International Conference on Learning Representations},
  year={2024}
}""",
    "linear": """@article{chen2023extending,
  title={Extending Context Window of Large Language Models via Positional Interpolation},
  author={Chen, Shouyuan and Wong, Sherman and Chen, Liangjian and Tian, Yuandong},
  journal={arXiv preprint arXiv:2306.15595},
  year={2023}
}""",
}


def write_card(run: RunFolder, place: str = "FOLDER") -> Path:
    """Write README.md into the run's model folder and copy the base model's license files there.

    Args:
        place: folder or Hub name of the model, for the loading commands in the card.
    """
    recipe, metadata = run.recipe(), run.metadata()
    base = Path(recipe.model).expanduser()
    copied = base_metadata(local_source(recipe.model))
    if base.is_dir():
        for file in sorted(base.iterdir()):
            if file.is_file() and file.name.lower().startswith(("license", "licence", "notice")):
                shutil.copyfile(file, run.model / file.name)
    path = run.model / "README.md"
    text = f"---\n{card_metadata(run, copied)}\n---\n\n{_body(run, metadata, copied, place)}"
    write_text(path, text)
    return path


def base_metadata(model: str) -> dict[str, Any]:
    """License and language from the base model's card, in its folder or on the Hub."""
    folder = Path(model).expanduser()
    try:
        if folder.exists():
            card = ModelCard((folder / "README.md").read_text(encoding="utf-8"))
        else:
            card = ModelCard.load(model)
        found = card.data.to_dict()
    except Exception:  # no card, no network or broken YAML
        return {}
    return {key: found[key] for key in _COPIED_KEYS if found.get(key)}


def card_metadata(run: RunFolder, copied: dict[str, Any]) -> str:
    """The YAML at the top of the card."""
    recipe, metadata, rows = run.recipe(), run.metadata(), run.results()
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
        datasets=_hub_datasets(metadata) or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["long-context", "pose", "skipwise", recipe.method],
        model_name=recipe.run_name if results else None,
        eval_results=results or None,
        **copied,
    )
    return data.to_yaml(line_break="\n").strip()


def _body(run: RunFolder, metadata: dict[str, Any], copied: dict[str, Any], place: str) -> str:
    recipe, rows = run.recipe(), run.results()
    L, T = metadata.get("original_length") or 0, recipe.target_length
    scaling = metadata.get("scaling", recipe.rope.type)
    name = metadata.get("model", {}).get("name", recipe.model)
    papers = [_PAPERS["pose"], *([_PAPERS[scaling]] if scaling in _PAPERS else [])]
    license_id = copied.get("license")
    return f"""# {recipe.run_name}

`{name}` with its context window extended from {L:,} to {T:,} tokens by Skipwise, with
[PoSE](https://arxiv.org/abs/2309.10400) (positional skip-wise training) and `{scaling}` RoPE
scaling.

{headline(metadata, rows)}

## Measured before and after training

{format_table(rows)}

95 % intervals are in brackets. Perplexity is measured on the same target tokens at every context
length. Passkey and needle are exact match over all depths.

{_short_context_results(rows, L)}

## How it was made

{_training_summary(recipe, metadata)}

## Limits

- Passkey retrieval and low perplexity show that the model uses the window, not that it can reason
  over all of it. Test it on your task.
- Nothing is claimed beyond {T:,} tokens, or for tasks that are not listed above.
- Knowledge, biases and safety are those of the base model.

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

Skipwise is not needed to load it: `config.json` holds the scaling, with the keys of transformers 5
and of transformers 4. The recipe is in `skipwise_recipe.yaml`.

## License

{f"`{license_id}`, the" if license_id else "The"} license of the base model.

## Citation

```bibtex
{chr(10).join(papers)}
```
"""


def _short_context_results(rows: list[dict[str, Any]], L: int) -> str:
    """Results at the original context length L, before and after."""
    results = []
    for task in ("perplexity", "passkey", "needle", *other_tasks(rows)):
        before, after = find(rows, "before", task, L), find(rows, "after", task, L)
        if not before or not after or before.get("value") is None or after.get("value") is None:
            continue
        old, new = float(before["value"]), float(after["value"])
        if task == "perplexity":
            results.append(f"perplexity {old:.2f} before, {new:.2f} after ({new / old - 1:+.1%})")
        else:
            results.append(f"{task} {short_value(before)} before, {short_value(after)} after")
    if not results:
        return "The effect on short contexts was not measured."
    return f"At the original length of {L:,} tokens: {'; '.join(results)}."


def _training_summary(recipe: Any, metadata: dict[str, Any]) -> str:
    training, data = metadata.get("training", {}), metadata.get("data", {})
    selection, L = metadata.get("selection", {}), metadata.get("train_length", 0)
    value = metadata.get("temperature", {}).get("value", 1)
    temperature = [f"- attention temperature {value:g}, in the query weights"] if value != 1 else []
    if not training:
        return "\n\n".join(["Rescaled without training.", *temperature])
    mode = {"full": "all weights", "lora": "LoRA", "qlora": "QLoRA"}[training["mode"]]
    lines = [
        f"- method `{recipe.method}`, {mode}, {training['num_steps']:,} steps of "
        f"{training['tokens_per_step']:,} tokens ({training['num_tokens']:,} in all), learning "
        f"rate {recipe.training.learning_rate:g}",
        f"- trained on examples of {L:,} tokens with position ids up to {recipe.target_length:,}",
        *_full_length_lines(recipe, metadata.get("finish", {})),
        f"- {data.get('num_documents', 0):,} documents, {data.get('num_tokens', 0):,} tokens"
        + (f", from {', '.join(names)}" if (names := _hub_datasets(metadata)) else ""),
    ]
    if (chosen := selection.get("chosen")) is not None:
        lines.append(f"- the checkpoint of step {chosen:,}, chosen by {selection['by']}")
    lines += temperature
    versions = metadata.get("versions", {})
    used = [f"{k} {versions[k]}" for k in ("skipwise", "transformers", "torch") if k in versions]
    return "\n".join([*lines, f"- {', '.join(used)}"])


def _full_length_lines(recipe: Any, finish: dict[str, Any]) -> list[str]:
    if finish.get("seconds") is None:
        return []
    return [
        f"- then at full length: {finish['num_steps']:,} steps of {finish['batch_size']:,} examples"
        f" of {recipe.target_length:,} tokens ({finish['num_tokens']:,} in all), learning rate "
        f"{finish['learning_rate']:g}"
    ]


def _hub_datasets(metadata: dict[str, Any]) -> list[str]:
    """Sources that are data sets on the Hub. Local paths stay private."""
    sources = metadata.get("data", {}).get("sources", [])
    return [s for s in sources if s.count("/") == 1 and not Path(s).expanduser().exists()]


def read_metadata(card: Path) -> dict[str, Any]:
    """The YAML at the top of a card."""
    _, head, _ = card.read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(head)
