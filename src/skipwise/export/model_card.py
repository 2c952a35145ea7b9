"""The model card: description, results, training settings, how to load the model.

The content comes from the run folder. License and language are copied from the base model's card.
huggingface_hub writes the metadata in the format that the Hub reads.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from skipwise.config.lengths import format_length
from skipwise.config.run_folder import RunFolder, write_text
from skipwise.models.convert.gguf import local_source
from skipwise.models.hf_config import stays_inside
from skipwise.report import format_table
from skipwise.report.area import ends_of
from skipwise.report.figures.alt_text import describe_grid
from skipwise.report.figures.heatmaps import plot_grid
from skipwise.report.figures.style import to_png
from skipwise.report.format import metric_name, short_value
from skipwise.report.headline import headline
from skipwise.report.page.usage import loading_code, serving_commands
from skipwise.report.rows import Rows, find, is_benchmark, is_ruler, other_tasks

# lm-eval's task: data set, task and questions of the Hub's benchmark, and the metric to report.
# Source: huggingface.co/docs/hub/eval-results, which takes results of such data sets alone.
_HUB_BENCHMARKS = {
    "gsm8k": ("openai/gsm8k", "gsm8k", 1319, "exact_match,strict-match"),
    "mmlu_pro": ("TIGER-Lab/MMLU-Pro", "mmlu_pro", 12032, "exact_match,custom-extract"),
    "gpqa_diamond_zeroshot": ("Idavidrein/gpqa", "gpqa_diamond", 198, "acc_norm"),
}
_PICTURE = "passkey.png"
_COPIED_KEYS = ("license", "license_name", "license_link", "language")
_HOW = {
    "pose": "with [PoSE](https://arxiv.org/abs/2309.10400) (positional skip-wise training)",
    "full": "with training at full length",
    "none": "without training",
}
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
    """Write README.md, its picture and `.eval_results` into the run's model folder.

    The base model's license files are copied there.

    Args:
        place: folder or Hub name of the model, for the loading commands in the card.
    """
    recipe, metadata = run.recipe(), _plain(run.metadata())
    base = Path(recipe.model).expanduser()
    on_hub, written = (metadata.get("model") or {}).get("hub"), ["README.md"]
    known = recipe.model if on_hub else local_source(recipe.model) if base.exists() else None
    copied = base_metadata(known) if known else {}  # a local name that is gone is not the Hub's
    if base.is_dir():
        for file in sorted(base.iterdir()):
            is_text = file.name.lower().startswith(("license", "licence", "notice"))
            if is_text and file.is_file() and stays_inside(file):
                (run.model / file.name).unlink(missing_ok=True)  # a link would be followed
                shutil.copyfile(file, run.model / file.name)
                written.append(file.name)
    rows = run.results()
    (run.model / _PICTURE).unlink(missing_ok=True)
    if (figure := plot_grid(rows, "passkey")) is not None:
        (run.model / _PICTURE).write_bytes(to_png(figure))
        written.append(_PICTURE)
    shutil.rmtree(run.model / ".eval_results", ignore_errors=True)
    for name, text in hub_results(rows).items():
        (run.model / ".eval_results").mkdir(exist_ok=True)
        write_text(run.model / ".eval_results" / name, text)
        written.append(f".eval_results/{name}")
    run.update(card_files=written)  # publish uploads these, and what export wrote
    path = run.model / "README.md"
    text = f"---\n{card_metadata(run, copied)}\n---\n\n{_body(run, metadata, copied, place)}"
    write_text(path, text)
    return path


def relation(base: str, kind: str, metadata: dict[str, Any]) -> dict[str, Any]:
    """Base model and what this is to it, `finetune` or `adapter`; nothing for a local folder.

    Args:
        metadata: of the run, which knows whether the base was on the Hub when it began.
    """
    on_hub = metadata.get("model", {}).get("hub", False)
    return {"base_model": base, "base_model_relation": kind} if on_hub else {}


def base_metadata(model: str) -> dict[str, Any]:
    """License and language from the base model's card, in its folder or on the Hub."""
    folder = Path(model).expanduser()
    try:
        if folder.exists():
            if not (folder / "README.md").is_file():
                return {}
            card = ModelCard((folder / "README.md").read_text(encoding="utf-8"))
        else:
            card = ModelCard.load(model)
        found = card.data.to_dict()
    except Exception:  # no card, no network or broken YAML
        return {}
    return {key: found[key] for key in _COPIED_KEYS if _is_plain(found.get(key))}


def _is_plain(value: Any) -> bool:
    """Whether a value of the base's card is one line without HTML, or a list of such."""
    values = value if isinstance(value, list) else [value]
    return bool(value) and all(
        isinstance(v, str) and len(v) < 300 and re.fullmatch(r"[\w.:/#?=&%+ -]+", v) for v in values
    )


def public_name(run: RunFolder) -> str:
    """The run's name, if its user gave one; else from the base's name on the Hub or its family."""
    recipe, model = run.recipe(), run.metadata().get("model", {})
    base = recipe.model if model.get("hub") else _plain(model.get("family", "model"))
    return recipe.name or f"{Path(base).name}-{format_length(recipe.target_length)}"


def _plain(value: Any) -> Any:
    """Values of run.json and results.json without what Markdown and HTML give a meaning."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return re.sub(r"[^\w .,:;/+()=±%-]", "", value)[:200] if isinstance(value, str) else value


def hub_results(rows: Rows) -> dict[str, str]:
    """File names and YAML of `.eval_results`: the Hub's benchmarks, measured on all questions."""
    files = {}
    for row in rows:
        dataset, task, size, metric = _HUB_BENCHMARKS.get(row["task"], ("", "", 0, ""))
        measured = row["model"] == "after" and is_benchmark(row) and row.get("num_samples") == size
        if measured and row["metric"] == metric and row.get("value") is not None:
            shots = f"{row['num_fewshot']}-shot, " if row.get("num_fewshot") is not None else ""
            entry = {
                "dataset": {"id": dataset, "task_id": task},
                "value": round(100 * row["value"], 2),  # percent, as on the leaderboards
                "notes": f"{shots}{metric} of lm-evaluation-harness's {row['task']}, by Skipwise",
            }
            files[f"{task}.yaml"] = yaml.safe_dump([entry], sort_keys=False)
    return files


def card_metadata(run: RunFolder, copied: dict[str, Any]) -> str:
    """The YAML at the top of the card."""
    recipe, metadata, rows = run.recipe(), run.metadata(), _plain(run.results())
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
                dataset_name=f"{task} at {T:,} tokens"
                + (f", {_evaluation_text(run)}" if task == "perplexity" else ""),
                metric_type=row["metric"],
                metric_name=metric_name(row),
                metric_value=round(float(row["value"]), 4),
            )
        )
    data = ModelCardData(
        datasets=_hub_datasets(metadata) or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["long-context", "skipwise", *({_plain(_method(recipe, metadata))} - {"none"})],
        model_name=public_name(run) if results else None,
        eval_results=results or None,
        **relation(recipe.model, "finetune", metadata),
        **copied,
    )
    return data.to_yaml(line_break="\n").strip()


def _body(run: RunFolder, metadata: dict[str, Any], copied: dict[str, Any], place: str) -> str:
    recipe, rows = run.recipe(), _plain(run.results())
    L, T = metadata.get("original_length") or 0, recipe.target_length
    scaling, model = metadata.get("scaling", recipe.rope.type), metadata.get("model", {})
    base = f"A {model.get('family', 'RoPE')} model"  # the name of a folder is private
    base = f"`{_plain(recipe.model)}`" if model.get("hub") else base
    metadata = {**metadata, "model": {**model, "name": base.strip("`")}}
    method = _method(recipe, metadata)
    own = [] if method in ("full", "none") else [_PAPERS["pose"]]
    papers = [*own, *([_PAPERS[scaling]] if scaling in _PAPERS else [])]
    license_id = copied.get("license")
    return f"""# {_plain(public_name(run))}

{base} with its context window extended from {L:,} to {T:,} tokens by Skipwise, with `{scaling}`
RoPE scaling and {_HOW.get(method, f"with method `{method}`")}.

{headline(metadata, rows)}

## Measured before and after training

{format_table(rows, brief=True, ends=ends_of(metadata))}

95 % intervals are in brackets. Perplexity is measured on the same target tokens at every context
length, of {_evaluation_text(run)}. Passkey and needle are exact match over all depths.

{_figure_and_ruler(run, rows)}
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
{loading_code(place)}
```

```
{serving_commands(place, T)}
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


def _figure_and_ruler(run: RunFolder, rows: Rows) -> str:
    """The passkeys by depth, and the RULER tasks, folded: many lines."""
    parts = []
    if (run.model / _PICTURE).exists():
        parts.append(f"![{describe_grid(rows, 'passkey')}]({_PICTURE})\n")
    if tasks := [row for row in rows if is_ruler(row)]:
        summary = "<summary>RULER task by task</summary>"
        parts.append(f"<details>\n{summary}\n\n{format_table(tasks)}\n\n</details>\n")
    return "\n".join(parts)


def _evaluation_text(run: RunFolder) -> str:
    """Which text is measured on, without the folders of this machine: `8 documents of books`."""
    data, count = run.recipe().data, run.metadata().get("data", {}).get("num_eval_documents")
    sources = data.eval_sources or data.sources
    paths = [str(s["path"] if isinstance(s, dict) else s) for s in sources]
    on_hub = _hub_datasets(run.metadata())
    other = "given text" if data.eval_sources else "local text"  # its name stays private
    names = dict.fromkeys(path if path in on_hub else other for path in paths)
    held_out = not data.eval_sources and run.recipe().method != "none"
    number = "documents" if count is None else f"{count:,} documents"
    return f"{number} {'held out of' if held_out else 'of'} {', '.join(names) or 'its text'}"


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
        known = "Rescaled without training."
        if recipe.method != "none":
            known = f"Trained by method `{recipe.method}`; the run's record of it was lost."
        return "\n\n".join([known, *temperature])
    mode = {"full": "all weights", "lora": "LoRA", "qlora": "QLoRA"}[training["mode"]]
    lines = [
        f"- method `{_method(recipe, metadata)}`, {mode}, {training['num_steps']:,} steps of "
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


def _method(recipe: Any, metadata: dict[str, Any]) -> str:
    """The method that trained; `train_length: auto` may have chosen full length."""
    return (metadata.get("training") or {}).get("method", recipe.method)


def _full_length_lines(recipe: Any, finish: dict[str, Any]) -> list[str]:
    if finish.get("seconds") is None:
        return []
    return [
        f"- then at full length: {finish['num_steps']:,} steps of {finish['batch_size']:,} examples"
        f" of {recipe.target_length:,} tokens ({finish['num_tokens']:,} in all), learning rate "
        f"{finish['learning_rate']:g}"
    ]


def _hub_datasets(metadata: dict[str, Any]) -> list[str]:
    """Sources that were data sets on the Hub when the run began. Local names stay private."""
    return [str(name) for name in metadata.get("data", {}).get("hub_sources", [])]
