"""What attacks on one model score, what their directions see, and what an SAE of the same place adds."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

import sae_fast as sf
from benchmarks.claims import _attacks, _backdoors
from benchmarks.claims._auroc import auroc
from benchmarks.claims._backdoors import Classifier, World
from sae_fast.analysis.perturbation import nearest_rows
from sae_fast.data import sites
from sae_fast.nn.scale import scale_

RADII, HEADLINE = (0.25, 0.5, 1.0, 2.0), 1.0
TEXTS, HELD_OUT = 16, 512
ROWS = (1, 3)  # decoder rows that a direction may be made of
FEATURES, L1 = 192, 2.0


def attacked(model: Classifier, kind: str | None, of: World, seed: int, quick: bool) -> dict[str, Any]:
    """Scores of all attacks on a model, their counted passes, and with a backdoor what the monitors see."""
    random = torch.Generator().manual_seed(2000 + seed)
    tokens, _ = _backdoors.texts(TEXTS, of, random)
    clean = at_source(model, tokens)
    norm = clean.norm(dim=-1).mean().item()
    search = _attacks.Search(model, tokens, *((2, 8) if quick else (6, 20)), seed)
    runs: dict[str, _attacks.Found] = {}
    for r in RADII:
        for name in ("latent", "random"):
            runs[f"{name} R={r:g}"] = getattr(search, name)(False, r * norm)
    for known in (False, True):
        target = "known" if known else "unknown"
        runs[f"LAT {target}"] = search.per_example(known, HEADLINE * norm)
        runs[f"HotFlip {target}"] = search.hotflip(known)
        runs[f"HotFlip per text {target}"] = search.hotflip_per_example(known)
        for name in ("latent", "random"):
            at = getattr(search, name)(True, HEADLINE * norm) if known else runs[f"{name} R={HEADLINE:g}"]
            runs[f"{name} {target}"] = at
    plain = {f"none {'known' if known else 'unknown'}": _attacks.score(model(tokens), known) for known in (False, True)}
    sae, about = trained_sae(model, kind, of, seed, quick)
    features: dict[str, int] = {}
    for s in ROWS:
        runs[f"rows s={s}"], chosen = search.decoder_rows(HEADLINE * norm, sae, s)
        features[f"s={s}"] = int(chosen[0])
    theta = runs["latent unknown"].theta
    assert theta is not None
    (nearest, cosine), *_ = nearest_rows(sae, theta, 1)
    features["nearest"] = nearest
    found: dict[str, Any] = {
        "norm": norm,
        "scores": plain | {name: run.score for name, run in runs.items()},
        "passes": {name: run.passes for name, run in runs.items()},
        "sae": about | {"cosine": cosine},
    }
    if kind is not None:
        held, _ = _backdoors.texts(64 if quick else HELD_OUT, of, random)
        groups = [held] + [_backdoors.triggered(held, kind, of, random, near) for near in (True, False)]
        activations = [at_source(model, each) for each in groups]
        found["monitor"] = {}
        for name in ("latent unknown", "latent known", "random unknown", "HotFlip unknown", "HotFlip known"):
            run = runs[name]
            direction = run.theta if run.tokens is None else (at_source(model, run.tokens) - clean).mean((0, 1))
            found["monitor"][name] = seen([(h @ direction).mean(1) for h in activations])
        found["fires"] = fires(sae, features, activations)
    return found


def at_source(model: Classifier, tokens: Tensor) -> Tensor:
    """[n, LENGTH, d]: what the perturbations are added to."""
    return sites.run_until(model, sites.find(model, _attacks.SOURCE), tokens)


def trained_sae(model: Classifier, kind: str | None, of: World, seed: int, quick: bool) -> tuple[sf.GatedSAE, dict]:
    """A Gated SAE of the source, trained on the texts that the model was trained on, and its L0 and FVU on others."""
    random = torch.Generator().manual_seed(3000 + seed)

    def batch() -> Tensor:
        return at_source(model, _backdoors.training_texts(64, kind, of, random)[0]).flatten(0, 1)

    sample = torch.cat([batch() for _ in range(8)])
    mean = sample.mean(0)
    scale = float((sample - mean).square().mean().sqrt())
    steps = 20 if quick else 300
    sae = sf.GatedSAE(sample.shape[1], FEATURES, seed=seed)
    with torch.enable_grad():
        sae.b_dec.data.copy_(mean / scale)
        trainer = sf.Trainer(sae, lr=4e-3, l1_coefficient=L1, init_l0=16, lr_decay_start=steps * 4 // 5, total_steps=steps)
        for _ in range(steps):
            trainer.step(batch() / scale)
    scale_(sae, scale)
    x = torch.cat([batch() for _ in range(4)])
    code = sae.encode_sparse(x)
    fvu = float((x - sae.decode(code)).square().sum() / (x - x.mean(0)).square().sum())
    return sae, {"l0": code.l0().double().mean().item(), "fvu": fvu}


def seen(values: list[Tensor]) -> dict[str, float]:
    """AUROC of triggered texts against clean ones, and against near misses; of [n] each of clean, near, triggered."""
    clean, near, triggered = values
    return {"clean": auroc(triggered, clean), "near": auroc(triggered, near)}


def fires(sae: sf.GatedSAE, features: dict[str, int], activations: list[Tensor]) -> dict[str, Any]:
    """Of features, on which share of clean, near and triggered texts they fire, and the AUROC of their largest activation;
    beside them, AUROCs of all features: the mean of those that fire at all, and the best."""
    largest = [sae.encode(h).amax(1) for h in activations]  # [n, F] each
    every = [
        seen([each[:, i] for each in largest])["clean"]
        for i in range(sae.d_sae)
        if any(each[:, i].any() for each in largest)
    ]
    found: dict[str, Any] = {"mean feature": float(np.mean(every)), "best feature": float(np.max(every))}
    for name, feature in features.items():
        of = [each[:, feature] for each in largest]
        shares = dict(zip(("clean", "near", "triggered"), ((each > 0).double().mean().item() for each in of), strict=True))
        found[name] = {"shares": shares, "auroc": seen(of)}
    return found
