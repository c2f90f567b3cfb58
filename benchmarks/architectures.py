"""Which architectures go all the way: a small random model of each, compiled, trained, saved, loaded and exported.

    python benchmarks/architectures.py --out benchmarks/results/architectures.json

Each is compiled at half its FLOPs, trained for two steps where its data can be made up, saved as a student and with
merged weights, loaded, exported, and compared in ONNX Runtime; those that generate also do so. It has a process of
its own and a limit, since a failing export may not end. What is in the file already is not run again; `--only` names
some. The models say nothing about quality or speed: what is tried is their code.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import blora_compiler as blora
from blora_compiler.folders import write_text
from blora_compiler.report import versions

VOCABULARY = 128
SPECIAL = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PLAIN = {**SPECIAL, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 64}  # fmt: skip
GROUPED = {**PLAIN, "num_key_value_heads": 2}
GPT = {**SPECIAL, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
IMAGE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "image_size": 32, "patch_size": 8}  # fmt: skip
SIDES = {**SPECIAL, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
         "decoder_start_token_id": 2, "forced_eos_token_id": None}  # fmt: skip
T5 = {**SPECIAL, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
LIMIT_S = 900.0
STD = 0.15  # as initialised, random models say nearly nothing, and every difference would hide


@dataclass(frozen=True)
class Architecture:
    """One model: its class, the settings of its config, and what it is given.

    Attributes:
        kind: of transformers' registry.
        cls: an auto class, or a class of its own.
        settings: of the config.
        inputs: example inputs where they are not made up by the compiler.
    """

    kind: str
    cls: str
    settings: Mapping[str, Any]
    inputs: Callable[[], dict[str, torch.Tensor]] | None = None

    def build(self) -> Any:
        config = transformers.AutoConfig.for_model(self.kind, **self.settings)
        cls = getattr(transformers, self.cls)
        model = (cls.from_config(config) if self.cls.startswith("Auto") else cls(config)).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=STD)
        return model


def decoder(kind: str, **settings: Any) -> Architecture:
    return Architecture(kind, "AutoModelForCausalLM", settings)


def encoder(kind: str, cls: str = "AutoModel", **settings: Any) -> Architecture:
    return Architecture(kind, cls, settings)


def vision(kind: str, cls: str = "AutoModel", **settings: Any) -> Architecture:
    return Architecture(kind, cls, settings, lambda: {"pixel_values": torch.randn(2, 3, 32, 32)})


def ids(batch: int, tokens: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, tokens))


def scanned() -> dict[str, torch.Tensor]:
    return {"input_ids": ids(2, 32), "attention_mask": torch.ones(2, 32, dtype=torch.long)}


def captioned(tokens: int) -> dict[str, torch.Tensor]:
    text = ids(2, tokens)
    text[:, -1] = 2
    return {"input_ids": text, "pixel_values": torch.randn(2, 3, 32, 32)}


CLIP = {"text_config": {**PLAIN, "projection_dim": 16}, "vision_config": {**IMAGE, "projection_dim": 16},
        "projection_dim": 16}  # fmt: skip
WHISPER = {**SIDES, "max_source_positions": 50, "max_target_positions": 32, "num_mel_bins": 16}
ARCHITECTURES: dict[str, Architecture] = {
    "llama": decoder("llama", **GROUPED), "mistral": decoder("mistral", **GROUPED, sliding_window=8),
    "qwen2": decoder("qwen2", **GROUPED), "qwen3": decoder("qwen3", **GROUPED, head_dim=8),
    "phi": decoder("phi", **GROUPED), "phi3": decoder("phi3", **GROUPED),
    "gemma": decoder("gemma", **GROUPED, head_dim=8), "gemma2": decoder("gemma2", **GROUPED, head_dim=8),
    "gemma3_text": decoder("gemma3_text", **GROUPED, head_dim=8), "olmo2": decoder("olmo2", **GROUPED),
    "granite": decoder("granite", **GROUPED), "cohere2": decoder("cohere2", **GROUPED),
    "smollm3": decoder("smollm3", **GROUPED), "stablelm": decoder("stablelm", **GROUPED),
    "starcoder2": decoder("starcoder2", **GROUPED), "glm4": decoder("glm4", **GROUPED, head_dim=8),
    "nemotron": decoder("nemotron", **GROUPED), "exaone4": decoder("exaone4", **GROUPED),
    "persimmon": decoder("persimmon", **PLAIN), "gpt2": decoder("gpt2", **GPT),
    "gpt_neo": decoder(
        "gpt_neo", **SPECIAL, hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=64, window_size=16,
        attention_types=[[["global", "local"], 1]],
    ),
    "gpt_neox": decoder("gpt_neox", **PLAIN), "gptj": decoder("gptj", **GPT, rotary_dim=4),
    "codegen": decoder("codegen", **GPT, rotary_dim=4), "gpt_bigcode": decoder("gpt_bigcode", **GPT),
    "opt": decoder(
        "opt", **SPECIAL, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32,
    ),
    "bloom": decoder("bloom", **SPECIAL, hidden_size=32, n_layer=2, n_head=4),
    "falcon": decoder("falcon", **SPECIAL, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    "mpt": decoder("mpt", **SPECIAL, d_model=32, n_heads=4, n_layers=2, max_seq_len=64, expansion_ratio=2),
    "biogpt": decoder("biogpt", **PLAIN),
    "xglm": decoder(
        "xglm", **SPECIAL, d_model=32, ffn_dim=64, num_layers=2, attention_heads=4, max_position_embeddings=64
    ),
    "mixtral": decoder("mixtral", **GROUPED, num_local_experts=4),
    "qwen2_moe": decoder(
        "qwen2_moe", **GROUPED, num_experts=4, moe_intermediate_size=32, shared_expert_intermediate_size=32
    ),
    "deepseek_v3": decoder(
        "deepseek_v3", **PLAIN, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, moe_intermediate_size=32, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4,
        qk_nope_head_dim=4, v_head_dim=8, first_k_dense_replace=1,
    ),
    "mamba": Architecture(
        "mamba", "AutoModelForCausalLM", {**SPECIAL, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
        scanned,
    ),
    "rwkv": Architecture(
        "rwkv", "AutoModelForCausalLM", {**SPECIAL, "hidden_size": 32, "num_hidden_layers": 2}, scanned
    ),
    "bert": encoder("bert", **PLAIN), "bert, masked": encoder("bert", "AutoModelForMaskedLM", **PLAIN),
    "bert, classes": encoder("bert", "AutoModelForSequenceClassification", **PLAIN),
    "roberta": encoder("roberta", **{**PLAIN, "max_position_embeddings": 66}),
    "albert": encoder("albert", **PLAIN, embedding_size=16),
    "electra": encoder("electra", **PLAIN, embedding_size=16),
    "deberta": encoder("deberta", **PLAIN, relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "deberta-v2": encoder("deberta-v2", **PLAIN, relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "distilbert": encoder(
        "distilbert", **SPECIAL, dim=32, hidden_dim=64, n_layers=2, n_heads=4, max_position_embeddings=64
    ),
    "mpnet": encoder("mpnet", **{**PLAIN, "max_position_embeddings": 66}),
    "modernbert": encoder("modernbert", **PLAIN, local_attention=16, global_attn_every_n_layers=2),
    "xlnet": encoder("xlnet", **SPECIAL, d_model=32, n_layer=2, n_head=4, d_inner=64),
    "t5, encoder": encoder("t5", "T5EncoderModel", **T5), "t5": encoder("t5", "AutoModelForSeq2SeqLM", **T5),
    "bart": encoder("bart", "AutoModelForSeq2SeqLM", **SIDES),
    "vit": vision("vit", "AutoModelForImageClassification", **IMAGE), "deit": vision("deit", **IMAGE),
    "beit": vision("beit", **IMAGE),
    "dinov2": vision("dinov2", **{**IMAGE, "mlp_ratio": 2}),
    "swin": vision(
        "swin", image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4
    ),
    "convnext": vision("convnext", hidden_sizes=[16, 32], depths=[1, 1], num_stages=2, image_size=32),
    "segformer": vision(
        "segformer", "AutoModelForImageClassification", num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1],
        hidden_sizes=[16, 32], patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2],
        decoder_hidden_size=16,
    ),
    "clip": Architecture("clip", "AutoModel", CLIP, lambda: captioned(10)),
    "clip, vision": vision("clip_vision_model", **IMAGE),
    "siglip": Architecture(
        "siglip", "AutoModel", {"text_config": {**PLAIN, "projection_size": 32}, "vision_config": IMAGE},
        lambda: captioned(64),
    ),
    "wav2vec2": Architecture(
        "wav2vec2", "AutoModelForCTC",
        {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 64, "conv_dim": (16, 16), "conv_kernel": (10, 3), "conv_stride": (5, 2),
         "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2},
        lambda: {"input_values": torch.randn(2, 1000)},
    ),
    "whisper": Architecture(
        "whisper", "WhisperForConditionalGeneration", WHISPER,
        lambda: {"input_features": torch.randn(2, 16, 100), "decoder_input_ids": ids(2, 8)},
    ),
}  # fmt: skip


# ── One architecture ─────────────────────────────────────────────────────────────────────────────────────────────


def tried(name: str, export: bool = True) -> dict[str, Any]:
    """What became of one architecture: how far it went, and what was said where that is not the end."""
    torch.manual_seed(0)
    chosen, started = ARCHITECTURES[name], time.perf_counter()
    found: dict[str, Any] = {"class": "", "stage": "build"}
    try:
        model = chosen.build()
        found |= {"class": type(model).__name__, "stage": "compile"}
        given = None if chosen.inputs is None else chosen.inputs()
        compiled = blora.compile(model, 0.5, rank_multiple=2, inputs=given, **_data(model, given))
        forms = Counter(type(form).__name__ for form in compiled.plan.forms.values())
        found |= {"sites": len(compiled.program.sites), "forms": dict(forms), "kept": compiled.plan.fraction}
        found |= {"refusals": [str(refusal) for refusal in compiled.program.refusals], "stage": "save"}
        with tempfile.TemporaryDirectory() as folder:
            compiled.save(Path(folder) / "student")
            compiled.save(Path(folder) / "merged", merged=True)
            blora.load(Path(folder) / "student")
            if export:
                found["stage"] = "export"
                artifact = compiled.export(Path(folder) / "onnx")
                found |= {"graphs": sorted(artifact.manifest["graphs"]), "parity": artifact.parity.to_json()}
                if artifact.generation:
                    found["stage"] = "generate"
                    artifact.generate(ids(1, 5), max_new_tokens=3)
        found |= {"outcome": "passed", "message": ""}
    except blora.BadInput as error:
        found |= {"outcome": "refused", "message": str(error)}
    except Exception as error:  # of any type: what failed is the result
        found |= {"outcome": "failed", "message": f"{type(error).__name__}: {error}"[:2000]}
    return {**found, "seconds": time.perf_counter() - started}


def _data(model: Any, given: Mapping[str, torch.Tensor] | None) -> dict[str, Any]:
    """What to train on where it can be made up: token ids alone, or both sides of an encoder-decoder."""
    short = blora.DistillConfig(steps=2)
    if given is not None:
        return {}
    if model.config.is_encoder_decoder:
        mask = torch.ones(4, 9, dtype=torch.long)
        batches = [{"input_ids": ids(4, 9), "attention_mask": mask, "decoder_input_ids": ids(4, 6)} for _ in "12"]
        return {"calibration": batches, "train": batches, "distill": short}
    speaks = {"evaluation": ids(4, 32)} if model.can_generate() else {}
    return {"train": ids(16, 32), "distill": short, **speaks}


# ── All of them ──────────────────────────────────────────────────────────────────────────────────────────────────


def in_its_own_process(name: str) -> dict[str, Any]:
    """`tried` in a process that may fail, or not end."""
    started = time.perf_counter()
    try:
        run = subprocess.run(
            [sys.executable, __file__, "--one", name], capture_output=True, text=True, check=False, timeout=LIMIT_S
        )
    except subprocess.TimeoutExpired:
        message = f"did not end within {LIMIT_S:.0f} s"
    else:
        if run.returncode == 0:
            return dict(json.loads(run.stdout.splitlines()[-1]))
        message = f"the process ended with {run.returncode}: {run.stderr[-500:]}"
    seconds = time.perf_counter() - started
    return {
        "class": ARCHITECTURES[name].cls,
        "stage": "",
        "outcome": "failed",
        "message": message,
        "seconds": seconds,
    }


def report(result: Mapping[str, Any]) -> str:
    """A markdown table: one line an architecture, with what ran and what was left alone."""
    lines = [
        "| model | class | sites | left alone | exported as | largest error |",
        "| --- | --- | ---: | ---: | --- | ---: |",
    ]
    for name, found in result["models"].items():
        if found["outcome"] != "passed":
            stage = f" in {found['stage']}" if found["stage"] else ""
            lines.append(f"| {name} | {found['class']} | | | {found['outcome']}{stage}: {_first_line(found)} | |")
            continue
        graphs, error = ", ".join(found["graphs"]), max(found["parity"]["errors"].values())
        counts = f"{found['sites']} | {len(found['refusals'])}"
        lines.append(f"| {name} | {found['class']} | {counts} | {graphs} | {error:.1e} |")
    return "\n".join(lines)


def _first_line(found: Mapping[str, Any]) -> str:
    return (found["message"].splitlines() or [""])[0].replace("|", "\\|")[:200]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("architectures.json"))
    parser.add_argument("--only", nargs="*", default=list(ARCHITECTURES), choices=list(ARCHITECTURES))
    parser.add_argument("--one", choices=list(ARCHITECTURES), help="run one here and print its result as JSON")
    given = parser.parse_args()
    if given.one is not None:
        print(json.dumps(tried(given.one)))
        return
    models = json.loads(given.out.read_text())["models"] if given.out.exists() else {}
    for name in given.only:
        if name not in models:
            models[name] = in_its_own_process(name)
            ordered = {known: models[known] for known in ARCHITECTURES if known in models}
            write_text(given.out, json.dumps({"versions": versions(), "models": ordered}, indent=1) + "\n")
            print(
                f"{name}: {models[name]['outcome']} {models[name]['seconds']:.0f} s {_first_line(models[name])}",
                flush=True,
            )
    print(report({"models": {name: models[name] for name in ARCHITECTURES if name in models}}))


if __name__ == "__main__":
    main()
