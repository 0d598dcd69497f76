"""Layers that are hard to screen."""

from __future__ import annotations

import sae_fast as sf

LAYERS = (sf.GatedSAE, sf.ReluSAE, sf.JumpReluSAE)
