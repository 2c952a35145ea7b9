"""Configs as they are found, good and faulty: what our `export.runtimes` and each runtime read.

Used by tests/test_verify.py, benchmarks/old_transformers.py and benchmarks/serving_rules.py.
"""

L, T = 4096, 32768
ORIGINAL = "original_max_position_embeddings"
BASE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "max_position_embeddings": T,
}
THETA = {"rope_theta": 5e5}
YARN = {"rope_type": "yarn", "factor": 8.0, ORIGINAL: L}
LINEAR = {"rope_type": "linear", "factor": 8.0}
RAMP = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, ORIGINAL: L, **RAMP}
LISTS = {"short_factor": [1.0] * 32, "long_factor": [4.0] * 32}
LONGROPE = {"rope_type": "longrope", "factor": 8.0, ORIGINAL: L, **LISTS}


def newer(parameters, **rest):
    return {"rope_parameters": {**parameters, **THETA}, **rest}


def older(scaling, **rest):
    return {"rope_scaling": scaling, **THETA, **rest}


def both(parameters, **rest):
    return {**newer(parameters), **older(parameters), **rest}


def without(parameters, *keys):
    return {key: value for key, value in parameters.items() if key not in keys}


def of(family, architecture):
    return {"model_type": family, "architectures": [architecture]}


AT_L = {"max_position_embeddings": L}
QWEN2, NEOX = of("qwen2", "Qwen2ForCausalLM"), of("gpt_neox", "GPTNeoXForCausalLM")
MISTRAL = of("mistral", "MistralForCausalLM")
MIXTRAL = {**of("mixtral", "MixtralForCausalLM"), "num_local_experts": 2}

CASES = {  # name: changes to BASE
    "unscaled": THETA,
    "theta raised, both": both({"rope_type": "default"}),
    "theta raised, newer only": newer({"rope_type": "default"}),
    "linear": both(LINEAR, **AT_L),
    "yarn": both(YARN),
    "llama3": both(LLAMA3),
    "yarn, newer only": newer(YARN),
    "linear, newer only": newer(LINEAR, **AT_L),
    "llama3, newer only": newer(LLAMA3),
    "yarn, older only": older(YARN),
    "yarn, older only, by type": older({"type": "yarn", **without(YARN, "rope_type")}),
    "yarn, newer by type": newer({"type": "yarn", **without(YARN, "rope_type")}),
    "two types": {**newer(YARN), **older({**LINEAR, "factor": 4.0})},
    "two factors": {**newer(YARN), **older({**YARN, "factor": 4.0})},
    "two thetas": {**newer(YARN), "rope_scaling": YARN, "rope_theta": 1e6},
    "two thetas, newer only": newer(YARN, rope_theta=1e6),
    "older without theta": newer(YARN, rope_scaling=YARN),
    "newer without theta": {"rope_parameters": YARN, **THETA},
    "no theta at all": {"rope_parameters": YARN},
    "type and rope_type": {**newer(YARN), **older({**YARN, "type": "linear"})},
    "no rope_type, newer": newer({"factor": 8.0}),
    "no rope_type, older": older({"factor": 8.0}),
    "yarn without L": older(without(YARN, ORIGINAL)),
    "yarn, L at the top": older(without(YARN, ORIGINAL), **{ORIGINAL: L // 2}),
    "yarn, two L": older(YARN, **{ORIGINAL: L // 2}),
    "llama3, L at the top": older(without(LLAMA3, ORIGINAL), **{ORIGINAL: L // 2}),
    "llama3 without L, newer": newer(without(LLAMA3, ORIGINAL)),
    "llama3 without factor": older(without(LLAMA3, "factor")),
    "yarn without factor": older(without(YARN, "factor")),
    "yarn, factor null": older({**YARN, "factor": None}),
    "linear without factor": older({"rope_type": "linear"}),
    "linear, whole factor": older({**LINEAR, "factor": 8}, **AT_L),
    "linear at T": older(LINEAR),
    "linear with L": older({**LINEAR, ORIGINAL: L}, **AT_L),
    "yarn at L": older(YARN, **AT_L),
    "yarn beyond T": older(YARN, max_position_embeddings=2 * T),
    "attention_factor": both({**YARN, "attention_factor": 1.5}),
    "attn_factor": both({**YARN, "attn_factor": 1.5}),
    "mscale": both({**YARN, "mscale": 0.7, "mscale_all_dim": 0.5}),
    "truncate": both({**YARN, "truncate": False}),
    "betas": both({**YARN, "beta_fast": 16.0, "beta_slow": 2.0}),
    "ntk": both({"rope_type": "ntk", "factor": 8.0}),
    "ntk, newer only": newer({"rope_type": "ntk", "factor": 8.0}),
    "dynamic": both({"rope_type": "dynamic", "factor": 8.0}, **AT_L),
    "longrope": both(LONGROPE, **{ORIGINAL: L}),
    "longrope, L inside": both(LONGROPE),
    "longrope, L at the top": older(without(LONGROPE, ORIGINAL, "factor"), **{ORIGINAL: L}),
    "longrope, attention_factor": older({**LONGROPE, "attention_factor": 1.3}, **{ORIGINAL: L}),
    "su": older({"type": "su", **LISTS}, **{ORIGINAL: L}),
    "model_max_length": both(YARN, model_max_length=L),
    "linear, model_max_length": both(LINEAR, **AT_L, model_max_length=T),
    "seq_length": {**THETA, "seq_length": 2048},
    "max_sequence_length": {**THETA, "max_sequence_length": 2 * T},
    "qwen2 yarn": {**QWEN2, **both(YARN)},
    "qwen2 llama3": {**QWEN2, **both(LLAMA3)},
    "gpt_neox yarn": {**NEOX, **both(YARN), "rotary_emb_base": 5e5, "rotary_pct": 0.5},
    "gpt_neox, newer only": {
        **NEOX,
        "rope_parameters": {**YARN, **THETA, "partial_rotary_factor": 0.5},
    },
    "gemma yarn": {**of("gemma", "GemmaForCausalLM"), **both(YARN), "head_dim": 64},
    "phi yarn": {**of("phi", "PhiForCausalLM"), **both(YARN), "partial_rotary_factor": 0.5},
    "stablelm yarn": {**of("stablelm", "StableLmForCausalLM"), **both(YARN)},
    "phi3 longrope": {
        **of("phi3", "Phi3ForCausalLM"),
        **older({"type": "longrope", **LISTS}, **{ORIGINAL: L}),
        "pad_token_id": 0,
    },
    "phi3 longrope, L by default": {
        **of("phi3", "Phi3ForCausalLM"),
        **older({"type": "longrope", **LISTS}),
        "pad_token_id": 0,
    },
    "phi3 unscaled": {**of("phi3", "Phi3ForCausalLM"), **THETA, "pad_token_id": 0},
    "phi3 su": {
        **of("phi3", "Phi3ForCausalLM"),
        **older({"type": "su", **LISTS}, **{ORIGINAL: L}),
        "pad_token_id": 0,
    },
    "a class with a scaling of its own": of("apertus", "ApertusForCausalLM"),
    "gemma3 without thetas": {
        **of("gemma3_text", "Gemma3ForCausalLM"),
        "head_dim": 64,
        "layer_types": ["full_attention"],
        "rope_parameters": {"full_attention": YARN, "sliding_attention": {"rope_type": "default"}},
    },
    "gemma3 yarn": {
        **of("gemma3_text", "Gemma3ForCausalLM"),
        "head_dim": 64,
        "layer_types": ["full_attention"],
        "rope_parameters": {
            "full_attention": {**YARN, **THETA},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        "rope_scaling": YARN,
        "rope_local_base_freq": 1e4,
        **THETA,
    },
    "mistral yarn": {**MISTRAL, **both(YARN), "sliding_window": None, "head_dim": 64},
    "mistral yarn without head_dim": {**MISTRAL, **both(YARN), "sliding_window": None},
    "mixtral yarn without head_dim": {**MIXTRAL, **both(YARN)},
    "mixtral linear without head_dim": {**MIXTRAL, **both(LINEAR, **AT_L)},
}

RUNTIMES = ("transformers 5", "transformers 4", "vLLM", "SGLang", "llama.cpp")
FAULTS = {  # name: (changes, name of the fault, whom it hits, words of it and of its fix)
    "newer only": (
        newer(YARN),
        "older spelling missing",
        ["transformers 4"],
        ["yarn x8 of 4,096, theta 500,000", "no scaling, theta 10,000", '"rope_theta": 500000.0'],
    ),
    "newer only, theta alone": (
        newer({"rope_type": "default"}),
        "older spelling missing",
        ["transformers 4"],
        ["theta 10,000: rope_theta is missing", 'add to config.json "rope_theta": 500000.0'],
    ),
    "two factors": (
        CASES["two factors"],
        "two spellings",
        RUNTIMES,
        ["rope_scaling says yarn (factor 4.0)", "rope_parameters says yarn (factor 8.0)"],
    ),
    "two types": (CASES["two types"], "two spellings", RUNTIMES, ["says linear", "says yarn"]),
    "two thetas": (CASES["two thetas"], "two spellings", ["transformers 4"], ["1,000,000"]),
    "stale rope_scaling": (
        {**newer(YARN), "rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5e5},
        "two spellings",
        RUNTIMES,
        ["transformers, vLLM and SGLang take rope_scaling, llama.cpp's converter rope_parameters"],
    ),
    "older without theta": (
        CASES["older without theta"],
        "two spellings",
        RUNTIMES,
        ["take theta 10,000 and not the 500,000", 'add "rope_theta": 500000.0'],
    ),
    "type and rope_type": (
        CASES["type and rope_type"],
        "rope_type",
        ["transformers 4", "vLLM"],
        ["type is linear and rope_type yarn"],
    ),
    "yarn at L": (
        both(YARN, **AT_L),
        "length",
        ["vLLM", "SGLang", "llama.cpp"],
        ["max_position_embeddings is 4,096", "to 32768"],
    ),
    "yarn beyond": (
        both(YARN, max_position_embeddings=2 * T),
        "length",
        ["vLLM", "SGLang", "llama.cpp"],
        ["no angles beyond 32,768", "to 32768"],
    ),
    "linear at T": (both(LINEAR), "length", ["vLLM", "SGLang"], ["serve 262,144", "to 4096"]),
    "L missing": (
        older(without(YARN, ORIGINAL)),
        "original length",
        RUNTIMES,
        ["count from 32,768", f'"{ORIGINAL}": 4096'],
    ),
    "L missing, llama3": (
        newer(without(LLAMA3, ORIGINAL)),
        "original length",
        RUNTIMES,
        ["transformers 4: fails, llama.cpp: 8,192"],
    ),
    "two L": (
        CASES["yarn, two L"],
        "original length",
        ["transformers 4", "llama.cpp"],
        ["2,048 at the top level", "4,096 inside"],
    ),
    "longrope, L inside": (
        CASES["longrope, L inside"],
        "original length",
        ["transformers 4"],
        ["counts from 32,768", f'"{ORIGINAL}": 4096'],
    ),
    "attention_factor": (
        both({**YARN, "attention_factor": 1.5}),
        "attention factor",
        ["SGLang", "llama.cpp"],
        ["1.5000", "compute 1.2079", "attn_factor = 1.241779 (", "SGLang attn_factor = 1.241779"],
    ),
    "attn_factor": (CASES["attn_factor"], "attention factor", ["SGLang"], ["attn_factor 1.5"]),
    "mscale": (CASES["mscale"], "attention factor", ["llama.cpp"], ["mscale"]),
    "truncate": (CASES["truncate"], "ramp", ["llama.cpp"], ["truncate False", "rounded to pairs"]),
    "betas": (CASES["betas"], "ramp", ["llama.cpp"], ["beta_fast 16.0", "from 32 rotations to 1"]),
    "ntk": (
        both({"rope_type": "ntk", "factor": 8.0}),
        "rope_type",
        RUNTIMES,
        ["only vLLM knows", f"rope_theta to {5e5 * 8 ** (64 / 62)!r}"],
    ),
    "su": (CASES["su"], "rope_type", ["transformers 5", "transformers 4", "SGLang"], ["longrope"]),
    "Phi-3's su": (
        CASES["phi3 su"],
        "does not load",
        ["transformers 5", "vLLM", "SGLang"],
        [f"longrope has no {ORIGINAL}"],
    ),
    "factor missing": (
        CASES["yarn without factor"],
        "does not load",
        ["transformers 5", "transformers 4", "vLLM", "SGLang"],
        ["yarn has no factor"],
    ),
    "whole factor": (
        both({**LINEAR, "factor": 8}, **AT_L),
        "does not load",
        ["vLLM", "SGLang"],
        ["only 8.0 is taken", "write 8.0"],
    ),
    "factor below 1": (both({**LINEAR, "factor": 0.5}), "does not load", RUNTIMES, ["1 or more"]),
    "head_dim": (
        CASES["mistral yarn without head_dim"],
        "does not load",
        ["transformers 4"],
        ["needs head_dim in the config of mistral", 'add "head_dim": 64'],
    ),
    "sliding window": (
        {**MISTRAL, **both(YARN), "head_dim": 64, "sliding_window": L},
        "sliding window",
        ["transformers 5", "transformers 4", "vLLM", "SGLang"],
        ["sliding_window is 4,096 in every layer", "null"],
    ),
    "sliding window by default": (
        {**MISTRAL, **both(YARN), "head_dim": 64},
        "sliding window",
        ["transformers 5", "transformers 4", "vLLM", "SGLang"],
        ["4,096 (the class's default)"],
    ),
    "model_max_length": (
        both(YARN, model_max_length=L),
        "other length",
        ["vLLM"],
        ["model_max_length 4,096", "serves 4,096 tokens", "remove model_max_length"],
    ),
    "seq_length": ({**THETA, "seq_length": 2048}, "other length", ["SGLang"], ["seq_length 2,048"]),
    "seq_length in vLLM": (
        {**THETA, "seq_length": 2048},
        "other length",
        ["vLLM"],
        ["vLLM takes seq_length 2,048"],
    ),
    "a longer key": (
        {**THETA, "max_sequence_length": 2 * T},
        "other length",
        ["SGLang"],
        ["SGLang takes max_sequence_length 65,536"],
    ),
    "dynamic": (
        CASES["dynamic"],
        "not portable",
        ["vLLM", "SGLang", "llama.cpp"],
        ["stays unscaled in vLLM", "rope.type=yarn"],
    ),
    "longrope": (CASES["longrope"], "not portable", ["llama.cpp"], ["drops longrope for llama"]),
    "longrope attention": (
        CASES["longrope, attention_factor"],
        "not portable",
        ["vLLM"],
        ["1.1180", "1.3000"],
    ),
    "llama3 elsewhere": (
        CASES["qwen2 llama3"],
        "not portable",
        ["llama.cpp"],
        ["drops llama3 for qwen2"],
    ),
    "use_cache": (both(YARN, use_cache=False), "use_cache", RUNTIMES[:2], ["set it to true"]),
}
