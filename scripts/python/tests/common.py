"""What the tests share: the runs that `run.sh` made, and the models of the nano pair."""

import json
import os
import sys
from functools import cache
from pathlib import Path

import torch
from transformers.utils import logging

ROOT = Path(__file__).resolve().parents[3]
RUNS = Path(os.environ["PKV_RUNS"])
os.chdir(ROOT)
sys.path.insert(0, str(ROOT / "scripts/python"))
torch.set_num_threads(1)
logging.set_verbosity_error()
logging.disable_progress_bar()

import proxykv  # noqa: E402

TARGET, PROXY = "recipes/nano-llama/target", "recipes/nano-llama/proxy"


def export(run: str) -> Path:
    return RUNS / run / "export"


@cache
def kept(run: str) -> dict[str, torch.Tensor]:
    """`eval --kept`: what the Rust side made of some contexts."""
    return proxykv.read_tensors(RUNS / run / "eval/kept.safetensors")


def contexts(run: str) -> list[int]:
    return sorted(int(name.split(".")[0]) for name in kept(run) if name.endswith(".tokens"))


@cache
def opened(run: str) -> proxykv.ProxyKV:
    return proxykv.ProxyKV.from_pretrained(export(run))


@cache
def pipe():
    import kvpress  # noqa: F401
    from transformers import pipeline

    return pipeline("kv-press-text-generation", model=TARGET, dtype=torch.float32, device="cpu")


def target(run: str):
    """The model that `features`, `scores` and `keep` need for this run's export, if it reads the target."""
    return pipe().model if "target" in opened(run).sources else None


def frame() -> proxykv.Frame:
    return proxykv.Frame.of(pipe().tokenizer)


def results(run: str) -> dict:
    return json.loads((RUNS / run / "eval/results.json").read_text())
