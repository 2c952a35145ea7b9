"""What vLLM, SGLang and llama.cpp's converter make of configs, by their own code.

    pip download --no-deps vllm==0.33.0 sglang==0.5.23, unzip both into WHEELS
    python benchmarks/serving_rules.py vllm WHEELS
    python benchmarks/serving_rules.py sglang WHEELS
    /tmp/old/bin/python benchmarks/serving_rules.py llama.cpp LLAMA_CPP   (its source folder)

Neither server is started, nor could be without a GPU: the functions that derive the length and the
modules that compute cos and sin are imported from their sources, with everything around them
replaced by stubs. The converter runs as it is, up to its tensors. Results are kept for
tests/test_verify.py, which compares `skipwise.export.runtimes` with them.
"""

import ast
import importlib.abc
import importlib.machinery
import json
import logging
import sys
import tempfile
import textwrap
import types
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import torch
from transformers import AutoConfig

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / name) for name in ("tests/helpers", "src", "benchmarks")]
from common import make_parser, write_result  # noqa: E402
from verify_cases import BASE, CASES  # noqa: E402

PAIRS = (0, 5, 8, 11, 15, 31)  # as in old_transformers.py
RUNTIMES = {"vllm": "vllm", "sglang": "sglang", "llama.cpp": "conversion"}  # and their folders
FUTURE = "from __future__ import annotations\n"


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("runtime", choices=RUNTIMES)
    parser.add_argument("source", type=Path, help="WHEELS or LLAMA_CPP")
    args = parser.parse_args()
    name, source = args.runtime, args.source
    if not (source / RUNTIMES[name]).exists():
        parser.error(f"{source} does not hold {RUNTIMES[name]}")
    logging.disable(logging.CRITICAL)
    read = {"vllm": Vllm, "sglang": Sglang, "llama.cpp": LlamaCpp}[name](source)
    cases = {}
    with tempfile.TemporaryDirectory() as folder:
        for case, changes in CASES.items():
            (Path(folder) / "config.json").write_text(json.dumps({**BASE, **changes}))
            try:
                length, inv_freq, attention = read(Path(folder))
            except Exception as error:
                cases[case] = {"error": f"{type(error).__name__}: {error}"[:100]}
                continue
            pairs = [float(inv_freq[k]) for k in PAIRS if k < len(inv_freq)]
            cases[case] = {"max_length": int(length), "inv_freq": pairs, "attention": attention}
    write_result(f"serving_rules_{name}", {"runtime": name, "pairs": PAIRS, "cases": cases})


class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Every module of a package is a mock, but for one subpackage, which is imported."""

    def __init__(self, package: str, root: Path, kept: str, **values) -> None:
        self.package, self.kept, self.values = package, f"{package}.{kept}", values
        parts = self.kept.split(".")
        for k in range(1, len(parts)):
            module = types.ModuleType(".".join(parts[:k]))
            module.__path__ = [str(root.joinpath(*parts[:k]))]
            sys.modules[module.__name__] = module
        sys.meta_path.insert(0, self)

    def find_spec(self, fullname, path=None, target=None):
        if fullname.startswith(f"{self.package}.") and not fullname.startswith(self.kept):
            return importlib.machinery.ModuleSpec(fullname, self)
        return None

    def create_module(self, spec):
        module = MagicMock(name=spec.name)
        module.__path__, module.__spec__ = [], spec
        for name, value in self.values.items():
            setattr(module, name, value)
        return module

    def exec_module(self, module):
        pass


class Op(torch.nn.Module):
    """Stands for the base classes of their layers."""

    def __init__(self, *args, **kwargs):
        super().__init__()

    @classmethod
    def register(cls, name, **kwargs):
        return lambda decorated: decorated

    @classmethod
    def enabled(cls):
        return False


def functions(file: Path, *names: str, within: str | None = None) -> str:
    """The source of functions of a module, or of a class in it."""
    source = file.read_text(encoding="utf-8")
    tree: ast.AST = ast.parse(source)
    if within:
        tree = next(n for n in ast.walk(tree) if getattr(n, "name", "") == within)
    found = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name in names]
    lines = source.splitlines()
    return FUTURE + "\n".join(
        textwrap.dedent("\n".join(lines[n.lineno - 1 : n.end_lineno])) for n in found[: len(names)]
    )


def parameters(config) -> dict:
    p = config.rope_parameters
    return p.get("full_attention", p)


def head_dim(config) -> int:
    given = getattr(config, "head_dim", None)
    return given or config.hidden_size // config.num_attention_heads


def unwound(table: np.ndarray) -> tuple[np.ndarray, float]:
    """(inv_freq, attention factor) from a table of cos and sin, by its first rows."""
    half = table.shape[1] // 2
    cos, sin = table[1, :half], table[1, half:]
    return np.arctan2(sin, cos), float(np.hypot(cos, sin).mean())


class Vllm:
    def __init__(self, root: Path) -> None:
        self.root = root / "vllm"
        platform = MagicMock()
        platform.is_cpu.return_value = True
        ops = MagicMock()
        ops.is_triton_rotary_embed_enabled.return_value = False
        serving = MagicMock()
        serving.model_config.max_model_len = 10**9  # so that longrope shows its long list
        Stubs(
            "vllm",
            root,
            "model_executor.layers.rotary_embedding",
            CustomOp=Op,
            current_platform=platform,
            rocm_aiter_ops=ops,
            get_current_vllm_config=lambda: serving,
        )

    def __call__(self, folder: Path):
        from transformers.configuration_utils import ALLOWED_LAYER_TYPES

        config = AutoConfig.from_pretrained(folder)
        space = {"logger": MagicMock(), "ALLOWED_LAYER_TYPES": ALLOWED_LAYER_TYPES}
        platform = types.SimpleNamespace(check_max_model_len=lambda length: length)
        space["current_platform"] = platform
        exec(functions(self.root / "config/utils.py", "getattr_iter"), space)
        sys.modules["vllm.config.utils"] = types.SimpleNamespace(**space)  # type: ignore[assignment]
        names = ("is_rope_parameters_nested", "patch_legacy_rope_type", "patch_rope_parameters")
        names += ("iter_rope_parameters",)
        exec(functions(self.root / "transformers_utils/config.py", *names), space)
        arch = self.root / "transformers_utils/model_arch_config_convertor.py"
        method, base = "derive_max_model_len_and_key", "ModelArchConfigConvertorBase"
        exec(functions(arch, method, within=base), space)
        exec(functions(self.root / "config/model.py", "_get_and_verify_max_len"), space)
        space["patch_rope_parameters"](config)
        derived = space[method](types.SimpleNamespace(hf_text_config=config))
        length = space["_get_and_verify_max_len"](
            hf_config=config,
            model_arch_config=types.SimpleNamespace(derived_max_model_len_and_key=derived),
            tokenizer_config=None,
            max_model_len=None,
            disable_sliding_window=False,
            sliding_window=None,
        )
        from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT, get_rope

        _ROPE_DICT.clear()  # to it, a factor of 8 is the 8.0 of another case
        rope = get_rope(
            head_dim(config),
            max_position=config.max_position_embeddings,
            rope_parameters=parameters(config),
            dtype=torch.float32,
        )
        if hasattr(rope, "cos_sin_cache"):
            table = rope.cos_sin_cache
        else:
            table = rope.long_short_cos_sin_cache[rope.original_max_position_embeddings :]
        return length, *unwound(table.double().numpy())


class Sglang:
    def __init__(self, root: Path) -> None:
        self.root = root / "sglang"
        off = dict.fromkeys(
            ("is_cuda", "is_hip", "is_cpu", "is_npu", "is_xpu", "is_musa", "get_bool_env_var"),
            lambda *args, **kwargs: False,
        )
        bases = dict.fromkeys(("BaseFusedOp", "MultiPlatformOp", "CustomOp"), Op)
        Stubs("sglang", root, "srt.layers.rotary_embedding", **off, **bases)
        torch.Tensor.cuda = lambda self, *args, **kwargs: self

    def __call__(self, folder: Path):
        config = AutoConfig.from_pretrained(folder)
        file = self.root / "srt/utils/hf_transformers/common.py"
        source = file.read_text(encoding="utf-8")
        keys = next(
            n
            for n in ast.parse(source).body
            if isinstance(n, ast.Assign) and n.targets[0].id == "CONTEXT_LENGTH_KEYS"  # type: ignore[attr-defined]
        )
        space = {"CONTEXT_LENGTH_KEYS": ast.literal_eval(keys.value)}
        exec(functions(file, "get_context_length"), space)
        length = space["get_context_length"](config)
        p = parameters(config)
        top = getattr(config, "original_max_position_embeddings", None)
        if top:  # as srt/models/llama.py does
            p["original_max_position_embeddings"] = top
        from sglang.srt.layers.rotary_embedding.factory import _ROPE_DICT, get_rope

        _ROPE_DICT.clear()
        rope = get_rope(
            head_dim(config),
            head_dim(config),
            max_position=config.max_position_embeddings,
            base=p.get("rope_theta", 10000),
            rope_scaling=p,
            dtype=torch.float32,
            partial_rotary_factor=p.get("partial_rotary_factor", 1.0),
        )
        table = rope.long_cos_sin_cache if hasattr(rope, "long_cos_sin_cache") else None
        table = rope.cos_sin_cache if table is None else table
        return length, *unwound(table.double().numpy())


class LlamaCpp:
    """conversion/base.py and its classes; what the keys mean at run time is src/llama-context.cpp:
    yarn with the default attention factor, times rope.scaling.attn_factor."""

    def __init__(self, root: Path) -> None:
        sys.path[:0] = [str(root), str(root / "gguf-py")]

    def __call__(self, folder: Path):
        import gguf
        from conversion import get_model_class
        from conversion.base import ModelBase
        from transformers import AutoModelForCausalLM

        from skipwise.pose.rope import YaRN

        asked = (folder / "config.json").read_text()
        if not (folder / "model.safetensors").exists():  # any weights will do
            (folder / "config.json").write_text(json.dumps(BASE))
            config = AutoConfig.from_pretrained(folder)
            AutoModelForCausalLM.from_config(config).save_pretrained(folder)
            (folder / "config.json").write_text(asked)
        hparams = ModelBase.load_hparams(folder, False)
        converter = get_model_class(json.loads(asked)["architectures"][0])(
            folder, gguf.LlamaFileType.MOSTLY_F16, folder / "out.gguf", hparams=hparams
        )
        converter.set_gguf_parameters()
        tensors = list(converter.generate_extra_tensors())  # Phi-3 adds keys here
        keys = {k: v.value for part in converter.gguf_writer.kv_data for k, v in part.items()}
        arch = gguf.MODEL_ARCH_NAMES[converter.model_arch]
        dim = keys.get(f"{arch}.rope.dimension_count", 64)
        theta = keys.get(f"{arch}.rope.freq_base", 10000.0)
        kind, factor = (keys.get(f"{arch}.rope.scaling.{k}") for k in ("type", "factor"))
        attention = float(keys.get(f"{arch}.rope.scaling.attn_factor", 1.0))
        inv_freq = theta ** -(np.arange(0, dim, 2) / dim)
        if str(kind) == "linear":
            inv_freq = inv_freq / factor
        elif str(kind) == "yarn":
            L = keys[f"{arch}.rope.scaling.original_context_length"]
            yarn = YaRN(factor=factor, original_length=L)  # beta_fast, beta_slow are not read
            inv_freq, attention = yarn.inv_freq(theta, dim), attention * yarn.attention_factor
        for name, values in tensors:
            if "rope_freqs" in name or "rope_factors_long" in name:
                inv_freq = inv_freq / values.double().numpy()
        return keys[f"{arch}.context_length"], inv_freq, attention


if __name__ == "__main__":
    main()
