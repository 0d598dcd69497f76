"""Runs: what `sae-fast train`, `encode` and `report` do, one file each, and the folder that they share."""
