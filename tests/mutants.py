"""Small planted faults, each of which tests have to see.

    python tests/mutants.py [NAME or GROUP ...] [--list] [--jobs N]

Each is a text in a file, another in its place, and the tests that must go red: the tree is copied, the fault planted, and
those tests run.  Exit status 1 if one survives; a text that does not stand in its file exactly once is an error.  The
group "native" compiles, "peers" needs the peers' environment: they run when they are asked for, or with "all".
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

for name, value in {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "TRITON_INTERPRET": "1"}.items():
    os.environ[name] = value

import hypothesis  # noqa: E402, F401
import pytest  # noqa: E402
import torch  # noqa: E402, F401

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / ".venv-peers/bin/python"
OPTIONS = ("-x", "-q", "-n", "0", "-p", "no:cacheprovider")
SKIPPED = shutil.ignore_patterns(".git", ".venv*", "out", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis", "temp.*")


class Mutant(NamedTuple):
    """``tests``: arguments of pytest, files by their names alone."""

    name: str
    file: str
    old: str
    new: str
    tests: str


GROUPS: dict[str, list[Mutant]] = {}

GROUPS["encode"] = [
    Mutant("the screen's bound forgets what sums round", "sae_fast/ops/encode/screen.py",
           "gamma = (K + 8) * 2.0**-23", "gamma = 0.0",
           "test_screen.py::test_each_term_of_the_bound_alone_keeps_its_members"),
    Mutant("no column is an outlier", "sae_fast/ops/encode/screen.py",
           "FAR_MORE * energy.median()", "FAR_MORE * energy.amax()",
           "test_screen.py::test_each_term_of_the_bound_alone_keeps_its_members"),
    Mutant("rows with few positive ones are not filled up", "sae_fast/ops/encode/largest.py",
           'if choice.support != "topk_any":', "if True:",
           "test_topk.py::test_rows_with_few_positive_ones_are_filled_up_and_the_others_stay"),
    Mutant("a tile takes the first features' shadow", "sae_fast/ops/encode/screen.py",
           "(part[first:last] for part in self.shadow)", "(part[: last - first] for part in self.shadow)",
           "test_screen.py::test_routes_chunks_threads_and_shadows_change_no_bit"),
    Mutant("a tile takes the first features' cut", "sae_fast/ops/encode/screen.py",
           "else self.cut[first:last]", "else self.cut",
           "test_screen.py::test_routes_chunks_threads_and_shadows_change_no_bit"),
    Mutant("a screened bound is above by less than is said", "sae_fast/ops/encode/screen.py",
           "EXCESS = 2.0", "EXCESS = 0.25", "test_topk.py::test_the_largest_are_chosen_whatever_the_way"),
    Mutant("the fp32 bound takes features of any size", "sae_fast/ops/encode/bound.py",
           "sound = (norms <= 2.0**40) & (sizes <= 2.0**100)", "sound = torch.ones_like(norms, dtype=torch.bool)",
           "test_screen.py::test_norms_at_the_ends_of_fp32s_range_lose_nothing"),
    Mutant("the fp32 bound takes rows of any size", "sae_fast/ops/encode/bound.py",
           "torch.where(norms <= 2.0**40, norms, torch.nan)", "norms",
           "test_screen.py::test_norms_at_the_ends_of_fp32s_range_lose_nothing"),
    Mutant("over a floor the fp32 bound has no margin", "sae_fast/ops/encode/largest.py",
           "margins=margins.float()", "margins=margins.float() * 0",
           "test_topk.py::test_a_floor_from_bounds_alone_needs_twice_their_margins "
           "test_topk.py::test_a_float_product_without_its_margin_loses_the_best"),
    Mutant("a batch that grows dense is dotted from its last tile on again", "sae_fast/ops/encode/cpu.py",
           "return _dotted(compactor, layer, x, bound.W, last)",
           "return _dotted(compactor, layer, x, bound.W, first)",
           "test_screen.py::test_of_a_dense_batch_the_product_is_taken_of_one_tile_only"),
    Mutant("of equal entries one too few", "sae_fast/ops/encode/dense.py",
           "equal.cumsum(1, dtype=torch.int32) <= left", "equal.cumsum(1, dtype=torch.int32) < left",
           "test_topk.py::test_of_equal_ones_the_first_are_chosen"),
    Mutant("of equal entries of a batch the last are chosen", "csrc/host/floors.hpp",
           "at_floor(e) && stay-- <= 0", "at_floor(e) && stay-- > 0",
           "test_topk.py::test_ties_across_tiles_and_row_blocks"),
    Mutant("a row's candidates begin where those of its run do", "kernels/compact.py",
           "+ _sum(rows_ptr, n // RUN * RUN, n, RUN)", "+ 0",
           "test_triton_encode.py::test_rows_of_many_runs_are_one_after_the_other"),
    Mutant("of the values the last stay as they were", "kernels/compact.py",
           "inside = (at < share) &", "inside = (at < share - 1) &",
           "test_triton_encode.py::test_compaction_is_ascending_and_what_does_not_fit_is_flagged"),
    Mutant("a GPU's floor is not lowered", "kernels/round.py", "(1 - 2.0**-16)", "1.0",
           "test_triton_largest.py::test_a_floor_is_lowered_for_what_its_sum_with_the_bias_loses"),
    Mutant("rows of zeros meet floors at their own scale", "kernels/round.py",
           "scale = tl.where(zeros, 1.0, scale)", "scale = scale * 1.0",
           "test_triton_largest.py::test_a_floor_is_lowered_for_what_its_sum_with_the_bias_loses"),
    Mutant("a floor that hid some of the largest is not noticed", "kernels/largest.py",
           "tl.where(floor > 0, _key(floor), 0)", "0",
           "test_triton_largest.py::test_a_floor_that_hid_some_of_the_largest_is_noticed"),
    Mutant("of ties in a batch those of each row count from its start", "kernels/largest.py",
           "left -= _ties_before(pi_ptr, ties_ptr, begin, last, ENTRIES, BLOCK)", "left -= 0",
           "test_triton_largest.py::test_of_ties_in_a_batch_the_lower_rows_win_whatever_run_they_are_in"),
    Mutant("a row that came short of its floor stays empty", "sae_fast/ops/encode/gpu.py",
           "begin[short], end[short] = again.begin + total, again.end + total", "pass",
           "test_triton_largest.py::test_every_floor_gives_the_same_bits"),
    Mutant("a negative threshold opens closed gates", "sae_fast/activations/jumprelu.py",
           "return vectors[0].clamp(min=0)", "return vectors[0]",
           "test_encode.py::test_codes_are_as_near_to_float64_as_torchs -k 'jumprelu and cpu'"),
    Mutant("slack narrows", "sae_fast/code.py",
           "if self.cut is None else self.cut) - slack", "if self.cut is None else self.cut) + slack",
           "test_encode.py -k 'ties_are_not_members and reference'"),
    Mutant("a magnitude without its gate", "sae_fast/activations/gated.py",
           "(pi > 0) * torch.relu(scale * u + b_mag)", "torch.relu(scale * u + b_mag)",
           "test_encode.py -k 'ties_are_not_members and reference'"),
    Mutant("at its threshold a feature fires", "sae_fast/activations/jumprelu.py",
           "((pi > vectors[0]) * torch.relu(pi))[None]", "((pi >= vectors[0]) * torch.relu(pi))[None]",
           "test_encode.py -k 'ties_are_not_members and reference'"),
    Mutant("a changed weight has its old shadow", "sae_fast/ops/encode/shadow.py",
           "(W.shape, W.stride(), W._version) != (memory.shape, memory.stride(), version)",
           "(W.shape, W.stride()) != (memory.shape, memory.stride())",
           "test_shadow.py::test_frozen_notices_a_change"),
    Mutant("the last columns are never compared", "sae_fast/ops/encode/shadow.py",
           "16 * (turn % -(-W.shape[1] // 16))", "16 * (turn % max(1, W.shape[1] // 16))",
           "test_trainer_state.py::test_columns_take_turns_and_subnormals_and_nans_are_no_change"),
]  # fmt: skip

GROUPS["objectives"] = [
    Mutant(
        "the threshold's estimate has another sign",
        "sae_fast/objectives/l0.py",
        "near.at, -estimate)",
        "near.at, estimate)",
        "test_gradients.py -k 'step and 57'",
    ),
    Mutant(
        "the window has one side",
        "sae_fast/objectives/l0.py",
        "return (z > -0.5) & (z < 0.5)",
        "return z < 0.5",
        "test_gradients.py -k 'quadratic and 57'",
    ),
    Mutant(
        "no entry below the threshold is kept",
        "sae_fast/objectives/l0.py",
        "self.bandwidth / 2 * (1 + 2**-10)",
        "0 * self.bandwidth",
        "test_gradients.py -k 'target and 57'",
    ),
    Mutant(
        "a threshold below 0 counts as others",
        "sae_fast/objectives/l0.py",
        "+ below.sum()",
        "+ 0 * below.sum()",
        "test_gradients.py -k 'target and 57'",
    ),
    Mutant(
        "what does not fire is looked for below the thresholds alone",
        "sae_fast/objectives/l0.py",
        "near = (f < reach) | (f == 0)",
        "near = f < reach",
        "test_gradients.py -k negative",
    ),
    Mutant(
        "a dense step has the constants of its last rows",
        "sae_fast/ops/dense_step.py",
        "constants.get(name, 0) + constant",
        "constant",
        "test_gradients.py -k 'dense and target and engine'",
    ),
    Mutant(
        "a dense step has the loss of the mean's tangent",
        "sae_fast/gradients.py",
        "float(rest)",
        "0.0",
        "test_gradients.py -k 'dense and target and engine'",
    ),
    Mutant(
        "a dense step revives no bias",
        "sae_fast/gradients.py",
        "(out.parameters[0], alive.bias), ",
        "",
        "test_gradients.py -k 'dense and aux and engine'",
    ),
    Mutant(
        "Lp has the slope of L1 times a power",
        "sae_fast/objectives/lp.py",
        "p * a.pow(p - 1)",
        "a.pow(p - 1)",
        "test_gradients.py -k 'relu and 57'",
    ),
    Mutant(
        "AuxK is not normalised",
        "sae_fast/objectives/auxk.py",
        "self.coefficient / spread, 0)",
        "self.coefficient, 0)",
        "test_gradients.py -k 'topk and 57'",
    ),
    Mutant(
        "AuxK touches every dead feature",
        "sae_fast/objectives/auxk.py",
        "ids[ops.touched(csc)], replace(csc, colptr=csc.colptr.unique_consecutive())",
        "ids, csc",
        "test_kinds.py::test_an_aid_touches_the_dead_features_that_it_has_chosen",
    ),
    Mutant(
        "dead features reconstruct the opposite of the error",
        "sae_fast/gradients.py",
        "revived(-entries.error)",
        "revived(entries.error)",
        "test_gradients.py -k 'topk and 57'",
    ),
    Mutant(
        "with prefixes dead features' residuals are the first prefix's",
        "sae_fast/gradients.py",
        "csc.rows + n * (len(entries.ends) - 1)",
        "csc.rows",
        "test_gradients.py -k 'matryoshka and 57'",
    ),
    Mutant(
        "an error of prefixes is that of their sum",
        "sae_fast/gradients.py",
        "out.residual[-1] / costs[-1]",
        "out.residual[0]",
        "test_gradients.py -k 'matryoshka and 57'",
    ),
    Mutant(
        "the threshold moves a step too early",
        "sae_fast/objectives/topk.py",
        "moved if step > self.threshold_start",
        "moved if step >= self.threshold_start",
        "test_kinds.py::test_the_threshold_follows_the_smallest_that_each_batch_keeps",
    ),
    Mutant(
        "features are dead before the batch is counted",
        "sae_fast/train/state.py",
        "since = self.since_fired + code.batch",
        "since = self.since_fired.clone()",
        "test_kinds.py::test_a_feature_is_dead_after_so_many_examples_without_firing",
    ),
    Mutant(
        "gradients are clipped before they are projected",
        "sae_fast/train/steps.py",
        "project=name in projected",
        "project=False",
        "test_kinds.py::test_gradients_are_clipped_as_projected",
    ),
    Mutant(
        "counts are not saved",
        "sae_fast/train/resume.py",
        "state.since_fired = since.to(want.device)",
        "pass",
        "test_kinds.py::test_a_training_goes_on_bit_for_bit_from_its_checkpoint",
    ),
    Mutant(
        "a guess has no margin and rows that miss it stay short",
        "sae_fast/ops/encode/largest.py",
        "for given in (guess, None):",
        "for given in (guess,):",
        "test_topk.py::test_a_guess_changes_no_bit",
    ),
]

GROUPS["gradients"] = [
    Mutant("r_mag's gradient without u", "sae_fast/activations/gated.py",
           "return g_gate + scaled, g_gate, scaled * u, g_mag", "return g_gate + scaled, g_gate, scaled, g_mag",
           "test_functional.py::test_value_gradients_go_through_the_activation "
           "test_nn.py::test_the_loss_and_its_gradients_are_the_references_within_twice_torchs_own_error"),
    Mutant("a silent entry passes its gradient on", "sae_fast/functional.py",
           "grads = torch.where(values != 0, grad_values, 0)", "grads = grad_values",
           "test_functional.py::test_encode_is_differentiable_in_its_values_and_in_u"),
    Mutant("u's gradient without the gate's", "sae_fast/activations/gated.py",
           "return g_gate + scaled, g_gate,", "return scaled, g_gate,",
           "test_nn.py::test_the_loss_and_its_gradients_are_the_references_within_twice_torchs_own_error"),
    Mutant("b_dec's gradient without the encoder's", "sae_fast/gradients.py",
           "- weighted_rows(delta, layer.W) if decoder.centred else", "if decoder.centred else",
           "test_trainer.py::test_sixty_steps_are_those_of_autograd_and_torchs_adam_in_float64"),
    Mutant("the auxiliary gradient stops in saelens too", "sae_fast/gradients.py",
           "if objective.stops_auxiliary:", "if True:",
           "test_trainer.py::test_saelens_settings_with_clipping_are_those_of_autograd_and_torchs_adam"),
    Mutant("a dead decoder row has a NaN for a gradient", "sae_fast/objectives/objective.py",
           "torch.where(norm > 0, sums * (self.coefficient / n) / norm, 0)", "sums * (self.coefficient / n) / norm",
           "test_trainer.py::test_a_zero_decoder_row_trains_in_the_saelens_dialect"),
    Mutant("the norms' cost is of the magnitudes", "sae_fast/objectives/objective.py",
           "norms=code.values[-1]", "norms=code.values[0]",
           "test_trainer.py::test_saelens_settings_with_clipping_are_those_of_autograd_and_torchs_adam"),
    Mutant("of a dense code the auxiliary gradient never stops", "sae_fast/gradients.py",
           "weight, objective.stops_auxiliary,", "weight, False,",
           "test_dense_step.py::test_gradients_are_as_near_to_float64_as_torchs"),
    Mutant("of a dense code the penalty has no gradient", "sae_fast/ops/dense_step.py",
           "grads[-1] += weight", "pass",
           "test_dense_step.py::test_gradients_are_as_near_to_float64_as_torchs"),
    Mutant("a group's first feature has no gradient", "sae_fast/functional.py",
           "inside = (indices >= first)", "inside = (indices > first)",
           "test_functional.py::test_decode_is_differentiable_in_values_and_weights"),
    Mutant("losses weighted apart: the sparsity's sign", "sae_fast/functional.py",
           "grad_values[-1] += (sparse - per_set[-1]) * penalty",
           "grad_values[-1] -= (sparse - per_set[-1]) * penalty",
           "test_functional.py::test_each_term_has_a_gradient_of_its_own"),
    Mutant("a target has no gradient of the auxiliary loss", "sae_fast/functional.py",
           "grad_target = grad_target - residual_aux[0] * (2 / n * aux)", "pass",
           "test_functional.py::test_a_target_gets_the_gradient_that_x_then_lacks "
           "test_functional.py::test_decode_loss_is_differentiable_in_everything"),
    Mutant("a weighted sum drops the ragged rest", "sae_fast/gradients.py",
           "return blocks.sum((0, 1)) + weights[n:] @ W[n:]", "return blocks.sum((0, 1))",
           "test_trainer.py::test_sixty_steps_are_those_of_autograd_and_torchs_adam_in_float64"),
    Mutant("the saelens weight without the norms", "sae_fast/objectives/objective.py",
           "W_dec.norm(dim=1) if self.costs_norm else", "W_dec.norm(dim=1).detach() if self.costs_norm else",
           "test_functional.py::test_sparsity_weight_is_lambda_or_lambda_times_the_rows_norm "
           "test_functional.py::test_each_term_has_a_gradient_of_its_own"),
]  # fmt: skip

GROUPS["prefixes"] = [
    Mutant("the first entry of a group has the residual of the one before", "sae_fast/ops/decode_loss.py",
           "right=True, out_int32=True", "right=False, out_int32=True",
           "test_composition.py::test_matryoshka_prefixes_fused"),
    Mutant("the shortest prefix reaches nothing", "sae_fast/ops/decode_loss.py",
           "for g in reversed(range(residuals.shape[1] - 1)):", "for g in reversed(range(1, residuals.shape[1] - 1)):",
           "test_decode_loss.py::test_every_feature_may_end_a_prefix -k reference"),
    Mutant("b_dec has the longest prefix's gradient alone", "sae_fast/functional.py",
           "grad_b = residual[0].sum(0)", "grad_b = residual[-1].sum(0)",
           "test_functional.py::test_decode_loss_is_differentiable_in_everything"),
    Mutant("in Triton a group begins where it ends", "kernels/decode_loss.py",
           "tl.load(ends_ptr + g - 1)", "tl.load(ends_ptr + g)",
           "test_decode_loss.py::test_every_feature_may_end_a_prefix -k triton"),
    Mutant("in Triton a group has the residual of its own prefix alone", "kernels/decode_loss.py",
           "r += cost * tl.load(residuals_ptr,", "r = cost * tl.load(residuals_ptr,",
           "test_device_entries.py::test_gradients_are_autograds -k 'triton and prefixes'"),
    Mutant("on a device the first entry of a group has the residual of the one before", "sae_fast/ops/decode_loss.py",
           "starts = csc.colptr[prefixes[:-1]]", "starts = csc.colptr[prefixes[:-1]] + 1",
           "test_device_entries.py::test_gradients_are_autograds -k 'triton and prefixes'"),
    Mutant("a value of 0 has a penalty", "sae_fast/ops/decode_loss.py",
           "torch.where(off[-1], 0, weight / p.normaliser)", "weight / p.normaliser",
           "test_decode_loss.py::test_prefixes_and_zeros_are_as_near_to_float64_as_torchs -k reference"),
]  # fmt: skip

GROUPS["layers"] = [
    Mutant("calibration forgets the threshold", "sae_fast/activations/jumprelu.py",
           "bias += parameters[\"threshold\"].clamp(min=0)", "pass",
           "test_calibration.py::test_a_jumprelu_layer_with_thresholds_fires_as_often_as_asked"),
    Mutant("calibration with one count for all", "sae_fast/nn/base.py",
           "(features * 0.6180339887498949) % 1.0", "0.0",
           "test_calibration.py::test_the_firings_are_spread_evenly_over_the_features "
           "test_calibration.py::test_a_batch_smaller_than_one_firing_per_feature_works_too"),
    Mutant("to_jumprelu shifts the wrong way", "sae_fast/nn/gated.py",
           "b_enc + shift if centred else b_enc - shift", "b_enc - shift if centred else b_enc + shift",
           "test_nn.py::test_the_jumprelu_form_computes_the_same_function"),
    Mutant("the first feature of an inactive group is on", "sae_fast/nn/grouped.py",
           "code.indices < self.active_features", "code.indices <= self.active_features",
           "test_topk_layers.py::test_groups_that_are_off_take_part_in_the_choice"),
    Mutant("a threshold goes through a narrower dtype", "sae_fast/nn/batchtopk.py",
           "else before.to(after.device)", "else after.float()",
           "test_topk_layers.py::test_the_threshold_stays_float32_and_exact"),
    Mutant("the path around the features takes its rows for its columns", "sae_fast/nn/base.py",
           "@ self.W_skip.T).reshape", "@ self.W_skip.reshape(self.d_in, -1)).reshape",
           "test_transcoders.py::test_what_it_gives_is_the_formula_within_twice_torchs_own_error"),
    Mutant("the way back of a layer norm adds eps, too", "sae_fast/nn/normalize.py",
           "Affine(deviation[:, 0], mean[:, 0])", "Affine(deviation[:, 0] + self.eps, mean[:, 0])",
           "test_normalize.py::test_encode_and_decode_are_the_formulas_within_twice_torchs_own_error"),
    Mutant("rows of a code keep the way back of the first", "sae_fast/code.py",
           "self.affine.of_rows(slice(first, last))", "self.affine.of_rows(slice(0, last - first))",
           "test_normalize.py::test_the_way_back_goes_with_the_rows_of_a_code"),
    Mutant("a frozen layer keeps the shadow after its block", "sae_fast/nn/base.py",
           "self._frozen = outer\n", "pass\n", "test_shadow.py::test_frozen_nests_and_ends_with_its_block"),
]  # fmt: skip

GROUPS["optimizer"] = [
    Mutant("a row that rested decays once", "sae_fast/ops/weight_step.py",
           "(beta2 ** (step - last_step).double())", "(beta2 ** (step - last_step).clamp(max=1).double())",
           "test_weight_step.py::test_as_near_to_float64_as_torchs "
           "test_weight_step.py::test_a_trajectory_with_idle_rows_is_torch_optim_adams -k reference"),
    Mutant("the reference forgets the scale of a clipped gradient", "sae_fast/ops/weight_step.py",
           "    if grad_scale is not None:\n        grad = grad * grad_scale\n    if unit_rows:\n        grad = "
           "project_rows(grad, W)\n",
           "    if unit_rows:\n        grad = project_rows(grad, W)\n",
           "test_optim.py::test_grad_scale_multiplies_every_gradient"),
    Mutant("another β2 finds v as it was", "sae_fast/optim.py",
           "self._catch_up(p, state, state[\"step\"])\n            state", "state",
           "test_optim.py::test_a_change_of_beta2_midway_catches_up_with_the_old_one_first"),
    Mutant("v is caught up twice", "sae_fast/optim.py",
           "state[\"last_step\"].clamp_(min=step)", "pass",
           "test_optim.py::test_catching_up_is_repeatable_and_does_not_disturb_the_run "
           "test_optim.py::test_a_change_of_beta2_midway_catches_up_with_the_old_one_first"),
    Mutant("at an eps of 0 idle rows are left out", "sae_fast/optim.py",
           "if as_it_is or group[\"eps\"] == 0:", "if as_it_is:",
           "test_optim.py::test_at_an_eps_of_0_a_row_that_never_had_a_gradient_is_nan_as_torchs"),
    Mutant("rows of any start are made unit where they are touched only", "sae_fast/optim.py",
           "group[\"unit_rows\"] and not group.get(\"unit_start\", True)  #", "group[\"unit_rows\"] and False  #",
           "test_optim.py::test_rows_that_start_at_any_norm_are_brought_to_unit_norm_even_if_they_never_fire"),
    Mutant("the first step leaves the shadow of idle rows behind", "sae_fast/optim.py",
           "if shadow is not None and group[\"unit_rows\"]:", "if False:",
           "test_shadow.py::test_row_adam_keeps_a_shadow_from_its_first_step"),
    Mutant("at β1 = 0 momentum is not kept up", "sae_fast/optim.py",
           "m=_as_rows(state[\"exp_avg\"]) if \"exp_avg\" in state else None",
           "m=_as_rows(state[\"exp_avg\"]) if beta1 > 0 else None",
           "test_optim.py::test_beta1_changes_midway_to_0_and_back_as_in_adam_and_through_a_state_dict"),
    Mutant("momentum begins at 0 after a start without", "sae_fast/optim.py",
           "_check_momentum(self.state.get(p, {}), group[\"betas\"])", "pass",
           "test_optim.py::test_momentum_after_a_start_without_is_refused_as_the_last_gradient_is_not_kept"),
    Mutant("the reference lets rows with momentum rest", "sae_fast/ops/weight_step.py",
           "touched if state.m is None else touched | (state.m != 0).any(1)", "touched",
           "test_weight_step.py::test_a_trajectory_with_momentum_is_torch_optim_adams -k reference"),
    Mutant("the reference gives an idle row its own coefficient's gradient", "sae_fast/ops/weight_step.py",
           "grad[at].masked_fill_(~touched[at, None], 0)", "grad[at]",
           "test_weight_step.py::test_momentum_is_as_near_to_float64_as_torchs -k reference"),
    Mutant("the first moment is not corrected", "sae_fast/ops/weight_step.py",
           "value=-lr / (1 - beta1**step)", "value=-lr",
           "test_weight_step.py::test_momentum_is_as_near_to_float64_as_torchs -k reference"),
    Mutant("last steps come back as floats", "sae_fast/optim.py",
           "to(p.device, torch.int64, copy=True)", "to(p.device, p.dtype, copy=True)",
           "test_optim.py::test_the_row_counters_stay_exact_integers_beyond_what_a_float_holds"),
]  # fmt: skip

GROUPS["trainer"] = [
    Mutant("the norm to clip is squared", "sae_fast/gradients.py",
           ".sqrt() + 1e-6)", " + 1e-6)", "test_trainer.py::test_grad_clip_is_torchs_clipping_of_the_global_norm"),
    Mutant("vectors do not count in the norm to clip", "sae_fast/gradients.py",
           "g.double().pow(2).sum() if isinstance(g, Tensor)", "g.double().sum() * 0 if isinstance(g, Tensor)",
           "test_trainer.py::test_grad_clip_is_torchs_clipping_of_the_global_norm"),
    Mutant("a failed first step leaves its calibration", "sae_fast/train/steps.py",
           "sae.load_state_dict(undo, strict=False)", "pass",
           "test_trainer.py -k 'fails or refused or overflow or names or nan'"),
    Mutant("a frozen parameter thaws on loading", "sae_fast/train/resume.py",
           "parameters[name].requires_grad_(False)", "parameters[name].requires_grad_(True)",
           "test_trainer_state.py::test_frozen_parameters_and_changed_groups_resume_bit_for_bit test_old_checkpoints.py"),
    Mutant("groups that changed in mid-run are not restored", "sae_fast/train/resume.py",
           "group.update(saved | {\"betas\": tuple(saved[\"betas\"])})", "pass",
           "test_trainer_state.py::test_frozen_parameters_and_changed_groups_resume_bit_for_bit"),
    Mutant("the same sixteenth of the rows is compared in each step", "sae_fast/train/steps.py",
           "return W.shape[0] * (index % 16) // 16, W.shape[0] * (index % 16 + 1) // 16",
           "return 0, W.shape[0] // 16", "test_shadow.py::test_a_change_of_one_row_is_noticed_within_16_steps"),
    Mutant("a save writes over the tensors that the manifest names", "sae_fast/train/checkpoint.py",
           "token = Path(path), secrets.token_hex(4)", "token = Path(path), \"0\" * 8",
           "test_checkpoint.py::test_a_save_that_fails_at_any_moment_leaves_the_old_checkpoint_or_the_new"),
    Mutant("a save deletes another program's tensors", "sae_fast/train/checkpoint.py",
           "if ours and (file.name in replaced or _marked(file)):", "if ours:",
           "test_trainer_state.py::test_beside_a_checkpoint_only_our_own_tensor_files_go"),
    Mutant("the warm-up begins a step late", "sae_fast/train/schedules.py",
           "min(step / steps, 1.0)", "min(max(step - 1, 0) / steps, 1.0)",
           "test_trainer.py::test_warmup_rises_linearly_from_zero_at_the_first_step"),
    Mutant("the decay ends a step early", "sae_fast/train/schedules.py",
           "max(total - step, 0)", "max(total - step - 1, 0)",
           "test_trainer.py::test_decay_falls_linearly_to_zero_at_the_last_step"),
]  # fmt: skip

GROUPS["device"] = [
    Mutant("the device's saelens step stops the auxiliary gradient", "sae_fast/gradients.py",
           "values.append(code.values[1] * (2 / n))", "residuals = residuals[:1]",
           "test_device_runner.py::test_steps_are_as_close_to_float64_as_torchs_own_and_logged_as_the_cpu_engine_does"),
    Mutant("the device's vectors change while the flag is set", "sae_fast/train/device_step.py",
           "self.adam, False, scale, self.flag)", "self.adam, False, scale, None)",
           "test_device_runner.py::test_a_step_that_found_too_little_room_is_repeated_with_more"),
    Mutant("the device counts gaps for L0", "sae_fast/train/device_step.py",
           "fired = (code.values[0] != 0).sum()", "fired = (code.values[0] >= 0).sum()",
           "test_device_runner.py::test_steps_are_as_close_to_float64_as_torchs_own_and_logged_as_the_cpu_engine_does"),
    Mutant("the device's norm to clip is of the vectors only", "sae_fast/train/device_step.py",
           "return squares.sum()", "return 0 * squares.sum()",
           "test_device_runner.py::test_steps_are_as_close_to_float64_as_torchs_own_and_logged_as_the_cpu_engine_does"),
    Mutant("the device's b_dec without the encoder's part", "sae_fast/train/device_step.py",
           "Decoder(sae.W_dec, sae.b_dec, shift is not None)", "Decoder(sae.W_dec, sae.b_dec, False)",
           "test_device_runner.py::test_steps_are_as_close_to_float64_as_torchs_own_and_logged_as_the_cpu_engine_does"),
    Mutant("residuals have the batch's 16 bits", "kernels/decode_loss.py",
           "values.new_empty(V, *groups, B, d)", "target.new_empty(V, *groups, B, d)",
           "test_device_runner.py::test_a_batch_in_16_bits_trains_like_its_numbers"),
    Mutant("the device watches the rows of the step before", "kernels/round.py",
           "index = tl.load(step_ptr) - 1", "index = tl.load(step_ptr) - 2",
           "test_device_runner.py::test_every_row_is_compared_within_16_steps_and_16_columns_of_all_at_once"),
    Mutant("a replayed step does not see that moments have moved", "sae_fast/train/device_steps.py",
           "seen += [t.data_ptr() for t in held.values() if isinstance(t, Tensor)]", "pass",
           "test_device_cost.py::test_a_step_is_prepared_anew_where_anything_has_changed"),
    Mutant("the device counts a step that did not happen", "sae_fast/train/device_after.py",
           "torch.where(flag == 0, since, state.since_fired)", "since",
           "test_device_runner.py::test_dead_features_are_counted_as_on_the_host"),
    Mutant("a floor that hid entries is kept", "sae_fast/train/device_steps.py",
           "self.floors.lower()", "pass",
           "test_device_kinds.py::test_a_floor_that_hides_some_of_the_largest_is_found_and_lowered"),
    Mutant("a device's random prefixes are the first step's", "sae_fast/train/device_step.py",
           "prefixes.drawn(features, index)", "prefixes.drawn(features, 0)",
           "test_device_kinds.py::test_every_kind_trains_as_close_to_float64_as_on_the_cpu_engine -k random"),
    Mutant("a device's squared error is of all prefixes", "sae_fast/train/device_step.py",
           "squared = step.losses[0] if self.prefixes is None else", "squared = step.losses[0] if True else",
           "test_device_kinds.py::test_every_kind_trains_as_close_to_float64_as_on_the_cpu_engine -k L1"),
    Mutant("a replayed step does not see that a forced backend is gone", "sae_fast/train/device_steps.py",
           "seen.append(id(native.module))", "pass",
           "test_triton_weight_step.py::test_a_trainer_follows_the_forced_backend"),
    Mutant("a step under way is lost when one before it is repeated", "sae_fast/train/device_steps.py",
           "for again in rest:", "for again in rest[:1]:",
           "test_device_runner.py::test_a_step_that_found_too_little_room_is_repeated_with_more "
           "test_device_runner.py::test_a_change_behind_torchs_back_is_found_and_said_and_what_followed_is_repeated"),
]  # fmt: skip

GROUPS["triton"] = [
    Mutant("Triton's decode: a group has its neighbour's first feature", "kernels/decode.py",
           "(feature < last).to(tl.int32)", "(feature <= last).to(tl.int32)",
           "test_decode.py::test_groups_of_every_value_set -k triton"),
    Mutant("Triton's decode_loss: a silent magnitude has a gradient", "kernels/decode_loss.py",
           "g_mag = tl.where(magnitude == 0, 0.0, g_mag)", "g_mag = g_mag * 1.0",
           "test_decode_loss.py::test_as_near_to_float64_as_torchs -k triton"),
    Mutant("Triton's decode_loss: the penalty is of the magnitudes", "kernels/decode_loss.py",
           "of_entries(PENALTY, ZEROS, last, g,", "of_entries(PENALTY, ZEROS, magnitude, g,",
           "test_decode_loss.py::test_as_near_to_float64_as_torchs -k triton"),
    Mutant("Triton's penalties: a root has the slope of its power", "kernels/_penalty.py",
           "c * power(total, exponent - 1) * exponent", "c + 0 * total",
           "test_device_entries.py::test_gradients_are_autograds -k triton"),
    Mutant("Triton's penalties: the window of f counts what the constant has", "kernels/_penalty.py",
           "- (fires & (rest > -0.5) & (rest < 0.5)).to(tl.float32)", "",
           "test_device_entries.py::test_gradients_are_autograds -k triton"),
    Mutant("Triton's jump keeps the ReLU", "kernels/jump.py",
           "tl.where(fires, pi, 0.0)", "tl.where(fires & (pi > 0), pi, 0.0)",
           "test_device_entries.py::test_gradients_where_all_thresholds_are_negative_are_autograds -k triton"),
    Mutant("L0's reach leaves out the window", "sae_fast/objectives/l0.py",
           "return threshold - self._margin(threshold)", "return threshold",
           "test_device_entries.py::test_gradients_are_autograds -k triton"),
    Mutant("Triton's decode_loss: b_mag's gradient is scaled", "kernels/_activation.py",
           "g_gate + scaled, g_gate, scaled * u, g_mag", "g_gate + scaled, g_gate, scaled * u, scaled",
           "test_triton_rows.py::test_what_a_training_step_needs"),
    Mutant("Triton's transpose: an entry counts itself", "kernels/transpose.py",
           "before = _bit_of(b) - 1", "before = _bit_of(b) * 2 - 1",
           "test_transpose.py::test_orders_entries_by_feature -k triton"),
    Mutant("Triton's offsets: a block of features begins with nothing", "kernels/offsets.py",
           "entries += tl.sum(count, axis=0)", "entries += 0",
           "test_triton_offsets.py"),
    Mutant("Triton's offsets: runs past the last have the last one's owner", "kernels/offsets.py",
           "tl.zeros((BLOCK,), tl.int64) + features,", "tl.zeros((BLOCK,), tl.int64) + features - 1,",
           "test_triton_offsets.py"),
    Mutant("Triton's outer: a long feature is summed twice", "kernels/outer.py",
           "begin = tl.where(p < last, end, begin)", "begin = tl.where(p < last, begin, begin)",
           "test_outer.py::test_as_near_to_float64_as_torchs -k triton"),
    Mutant("Triton's weight_step: a row that rested decays once", "kernels/weight_step.py",
           "tl.exp2(rate * idle.to(tl.float64)).to(tl.float32)", "tl.exp2(rate).to(tl.float32)",
           "test_weight_step.py::test_as_near_to_float64_as_torchs -k triton"),
    Mutant("Triton's weight_step: rows with momentum rest", "kernels/weight_step.py",
           "rests & (tl.max((moment != 0).to(tl.int32), axis=1) == 0)", "rests",
           "test_weight_step.py::test_a_row_without_entries_moves_while_it_has_momentum_and_else_rests_bit_for_bit "
           "-k triton"),
    Mutant("Triton's weight_step: momentum ends where its first elements do", "kernels/weight_step.py",
           "            k += COLUMNS\n", "            k += d\n",
           "test_weight_step.py::test_one_last_element_of_momentum_moves_its_row -k triton"),
    Mutant("Triton's weight_step: an idle row has a gradient of its own coefficient", "kernels/weight_step.py",
           "tl.load(own_ptr + i, mask=touched, other=0.0)", "tl.load(own_ptr + i, mask=live, other=0.0)",
           "test_weight_step.py::test_momentum_is_as_near_to_float64_as_torchs -k triton"),
    Mutant("Triton's weight_step: an idle row has the gradient that a dense one holds", "kernels/weight_step.py",
           "mask=inside & touched, other=0.0", "mask=inside, other=0.0",
           "test_triton_weight_step.py::test_row_step_with_offsets_takes_no_gradient_of_rows_without_entries"),
    Mutant("Triton's weight_step: the first moment is not corrected", "kernels/weight_step.py",
           "lr / (1.0 - beta1**step)", "float(lr)",
           "test_weight_step.py::test_momentum_is_as_near_to_float64_as_torchs -k triton"),
    Mutant("Triton's weight_step: momentum never runs out", "kernels/weight_step.py",
           "tl.where(tl.abs(first) < 2.0**-126, 0.0, first)", "first",
           "test_weight_step.py::test_momentum_runs_out_in_the_engines_and_its_row_rests -k triton"),
    Mutant("Triton's sums: what is between the rows is summed", "kernels/vectors.py",
           "mask=(at < end)[None, :], other=0.0", "mask=(at < end + 1)[None, :], other=0.0",
           "test_triton_vectors.py::test_sums_by_feature"),
    Mutant("Triton's check takes rows for shorter than they are", "kernels/vectors.py",
           "tl.load(longest_ptr).to(tl.float64) * rows", "tl.load(longest_ptr).to(tl.float64)",
           "test_triton_vectors.py::test_a_weights_gradient_that_might_overflow_sets_the_flag"),
    Mutant("Triton's check drops a NaN among the rows", "kernels/vectors.py",
           "tl.where(length < float(\"inf\"), length, float(\"inf\"))", "length",
           "test_triton_vectors.py::test_whatever_is_not_finite_sets_the_flag"),
    Mutant("Triton's vectors step at their gradients' full size", "kernels/vectors.py",
           "g *= tl.load(scale_ptr).to(tl.float32)", "g *= 1.0",
           "test_triton_vectors.py::test_vectors_step_and_visits_are_noted_as_by_a_launch_for_each"),
    Mutant("Triton's weight_step: the shadow says that rounding took nothing", "kernels/weight_step.py",
           "tl.sum(lost * lost, axis=1, keep_dims=True)", "tl.sum(lost * 0, axis=1, keep_dims=True)",
           "test_triton_weight_step.py::test_a_shadow_follows_the_rows_that_change"),
    Mutant("Triton's weight_step: unit rows in slices keep another norm", "kernels/weight_step.py",
           "square = tl.sum(W * W, axis=1", "square = tl.sum(W, axis=1",
           "test_triton_weight_step.py::test_wide_unit_rows_go_by_slices_where_the_gradient_along_them_is_known"),
    Mutant("Triton's decode_loss: the gradient along a row has no second residual", "kernels/decode_loss.py",
           "along += last * g", "along += 0 * g",
           "test_triton_rows.py::test_what_a_training_step_needs"),
    Mutant("Triton's projection divides by nothing", "kernels/outer.py",
           "g - tl.where(norm2 > 0, tl.div_rn(along, norm2), 0.0) * W", "g - tl.div_rn(along, norm2) * W",
           "test_weight_step.py::test_a_zero_row_with_unit_rows_stays_finite"),
    Mutant("Triton's screen drops a NaN", "kernels/_mask.py",
           "tl.where(values <= 0, 0, bit)", "tl.where(values > 0, bit, 0)",
           "test_encode.py::test_what_is_not_finite_does_not_vanish -k triton"),
    Mutant("Triton's bound forgets what sums round", "kernels/round.py",
           "lost + gamma * rounded", "lost",
           "test_triton_encode.py::test_each_term_of_the_bound_alone_keeps_its_members "
           "test_triton_encode.py::test_the_margin_covers_the_error_of_the_product"),
    Mutant("Triton's bound rounds its margins down", "kernels/round.py",
           "tl.int32, bitcast=True) + 65535)", "tl.int32, bitcast=True) + 0)",
           "test_triton_encode.py::test_the_bias_is_whole_in_its_pieces_and_the_margins_are_rounded_up"),
    Mutant("Triton's bound rounds its margins to the nearest", "kernels/round.py",
           "tl.int32, bitcast=True) + 65535)", "tl.int32, bitcast=True) + 32767)",
           "test_triton_encode.py::test_the_bias_is_whole_in_its_pieces_and_the_margins_are_rounded_up"),
    Mutant("Triton's screen has the bias without its middle piece", "kernels/round.py",
           "tl.where(column == 1, _truncated(middle)[:, None], 0.0)", "0.0",
           "test_triton_encode.py::test_each_term_of_the_bound_alone_keeps_its_members"),
    Mutant("Triton's screen has the bias without its low piece", "kernels/round.py",
           "low = middle - _truncated(middle)", "low = middle - middle",
           "test_triton_encode.py::test_each_term_of_the_bound_alone_keeps_its_members"),
    Mutant("a feature that is switched off is infinity less infinity", "kernels/round.py",
           'tl.where(tl.abs(high) < float("inf"), high - _truncated(high), 0.0)', "high - _truncated(high)",
           "test_triton_encode.py::test_a_feature_that_is_switched_off_has_no_candidates"),
    Mutant("a bias that is just above the cut vanishes at the feature's scale", "kernels/round.py",
           "tl.maximum(high, 2.0**-80)", "high", "test_triton_encode.py::test_any_bias_and_cut"),
    Mutant("in bf16 a row out of range has a margin", "kernels/encode.py",
           "exact or floor is not None, exact, floor", "True, exact, floor",
           "test_triton_encode.py::test_in_bf16_rows_out_of_range_are_decided_by_the_product_too"),
    Mutant("Triton's bound trusts rows of any size", "kernels/round.py",
           "usual = (true_norm >= 2.0**-40) & (true_norm <= 2.0**40)", "usual = (true_norm >= 0.0)",
           "test_triton_encode.py::test_no_member_is_missed_however_near_the_threshold"),
    Mutant("Triton's verify takes a tie for a member", "kernels/compact.py",
           "member = member & ((pi <= 0) == 0)", "member = member & ((pi < 0) == 0)",
           "test_encode.py -k 'ties_are_not_members and triton'"),
    Mutant("Triton's compact loses the last feature of a full word", "kernels/_mask.py",
           "tl.where(left >= 32, -1,", "tl.where(left > 32, -1,",
           "test_triton_encode.py::test_compaction_of_any_width"),
    Mutant("Triton's compact transposes half of the mask's bits", "kernels/_mask.py",
           "(word ^ word >> 12) & 0x0000F0F0", "(word ^ word >> 12) & 0x0000F000",
           "test_triton_encode.py::test_compaction_of_any_width"),
    Mutant("Triton's screen writes a word's pairs by their halves", "kernels/_mask.py",
           "2 * tl.arange(0, PAIRS)[:, None, None] + tl.arange(0, 2)",
           "tl.arange(0, PAIRS)[:, None, None] + PAIRS * tl.arange(0, 2)",
           "test_triton_encode.py::test_in_the_accumulators_order_each_bit_is_the_plain_one"),
    Mutant("Triton's narrow tiles of the screen write one part of a word", "kernels/_mask.py",
           "* SHARE + n % SHARE", "* SHARE",
           "test_triton_encode.py::test_in_the_accumulators_order_each_bit_is_the_plain_one"),
]  # fmt: skip

GROUPS["gpu runner"] = [
    Mutant(
        "a kernel that is called through an op is no source of its test",
        "benchmarks/gpu/sources.py",
        "_follow([*_asked(path), *named])",
        "_follow([*_asked(path)])",
        "test_gpu_record.py::test_a_test_hangs_on_what_it_imports_and_on_the_ops_it_names",
    ),
    Mutant(
        "a package's own files are no sources",
        "benchmarks/gpu/sources.py",
        "part = _part(*given) if given and given != (module, name) else _part(module, name)",
        "part = None",
        "test_gpu_record.py",
    ),
    Mutant(
        "a hash forgets the compiler",
        "benchmarks/gpu/sources.py",
        '"\\0".join(more).encode()',
        'b""',
        "test_gpu_record.py::test_a_hash_changes_with_a_name_a_content_and_a_version",
    ),
    Mutant(
        "a state holds for any sources",
        "benchmarks/gpu/record.py",
        'if it and it["sources"] == sources else None',
        "if it else None",
        "test_gpu_record.py",
    ),
    Mutant(
        "what hung comes first again",
        "benchmarks/gpu/record.py",
        "rank = 0 if state is None else 2 if state == DONE else 1",
        "rank = 2 if state == DONE else 0 if state else 1",
        "test_gpu_record.py::test_what_was_not_begun_comes_first_and_what_is_done_last_the_oldest_first",
    ),
    Mutant(
        "a folder that was kept for long wins",
        "benchmarks/gpu/record.py",
        'by_time = sorted((*lines(into / ROWS), *lines(folder / ROWS)), key=lambda row: row["time"])',
        "by_time = (*lines(into / ROWS), *lines(folder / ROWS))",
        "test_gpu_record.py::test_a_new_row_takes_the_place_of_an_old_one_and_the_others_stay",
    ),
    Mutant(
        "a merge drops what was not measured again",
        "benchmarks/gpu/record.py",
        "(*lines(into / ROWS), *lines(folder / ROWS))",
        "(*lines(folder / ROWS),)",
        "test_gpu_record.py::test_a_new_row_takes_the_place_of_an_old_one_and_the_others_stay",
    ),
    Mutant(
        "a fault stays for ever",
        "benchmarks/gpu/record.py",
        'or row["metric"] == last[_place(row)]]',
        'or row["metric"] == "fault"]',
        "test_gpu_record.py::test_a_fault_goes_with_a_later_time_and_a_time_with_a_later_fault",
    ),
    Mutant(
        "a job that cannot begin ends the benchmark",
        "benchmarks/gpu/measure.py",
        "        except Exception as error:\n            state = reason(error)\n        record.note",
        "        except ValueError as error:\n            state = reason(error)\n        record.note",
        "test_gpu_runner.py::test_a_job_s_end_keeps_no_other_from_beginning",
    ),
    Mutant(
        "a job begins without the time that it needs",
        "benchmarks/gpu/measure.py",
        "if job.needs <= end - time.monotonic()",
        "if job.needs",
        "test_gpu_runner.py::test_a_run_goes_on_where_the_last_one_ended",
    ),
    Mutant(
        "a faulty contender leaves its job done",
        "benchmarks/gpu/measure.py",
        '    if wrong:\n        return f"wrong:',
        '    if not wrong:\n        return f"wrong:',
        "test_gpu_runner.py::test_a_run_goes_on_where_the_last_one_ended",
    ),
    Mutant(
        "a part has all the time that is left",
        "benchmarks/gpu/budget.py",
        "return free if last else free * SHARES[part]",
        "return free",
        "test_gpu_runner.py::test_every_part_has_a_share_and_the_last_one_what_is_left",
    ),
    Mutant(
        "a failed test passes unseen",
        "benchmarks/gpu/__main__.py",
        "bad |= {part} if failed else set()",
        "bad |= set()",
        "test_gpu_runner.py::test_the_summary_and_the_exit_code",
    ),
    Mutant(
        "the first part that fails is the last",
        "benchmarks/gpu/__main__.py",
        "            record.merge(out, home)\n    except",
        "            record.merge(out, home)\n            if states[part]:\n                break\n    except",
        "test_gpu_rehearsal.py",
    ),
    Mutant(
        "what is cut is not merged",
        "benchmarks/gpu/__main__.py",
        "            record.merge(out, home)\n    except",
        "    except",
        "test_gpu_rehearsal.py",
    ),
    Mutant(
        "a miss is shown as met",
        "benchmarks/gpu/goals.py",
        '"met" if self.goal.reached(self.got) else "not met"',
        '"met"',
        "test_gpu_model.py::test_the_printed_goals_show_a_miss_as_a_miss",
    ),
    Mutant(
        "a prediction has cuts that nobody made",
        "benchmarks/gpu/predict.py",
        "for cut in cuts.CUTS if cut.made)",
        "for cut in cuts.CUTS)",
        "test_gpu_model.py::test_a_prediction_is_what_was_measured_less_the_cuts_that_are_made",
    ),
]

GROUPS["formats"] = [
    Mutant("folding scales r_mag too", "sae_fast/activations/gated.py",
           "(\"b_mag\",)", "(\"r_mag\", \"b_mag\")",
           "test_interop.py::test_folding_decoder_norms_keeps_the_function_and_unfolding_restores_the_bits"),
    Mutant("a scale leaves the path around the features", "sae_fast/nn/scale.py",
           "sae.W_skip.mul_(scale / (out or scale))", "sae.W_skip.mul_(1.0)",
           "test_transcoders.py::test_a_scale_of_its_input_is_one_of_the_path_around_the_features_too"),
    Mutant("a model card that was changed is taken for ours", "sae_fast/interop/card.py",
           "and _digest(card[: end.start()].removesuffix(\"\\n\")) == end[1]", "",
           "test_hub.py::test_a_model_card_goes_along_and_one_of_others_stays"),
    Mutant("Gemma Scope's embeddings are not scaled", "sae_fast/interop/formats/gemma_scope.py",
           """embedding = "embedding" in""", """embedding = "embeddings" in""",
           "test_published_formats.py::test_published_files_give_what_their_format_says"),
    Mutant("a gate counts the decoder's norm the other way", "sae_fast/interop/formats/_openmoss.py",
           "threshold.double() / W_dec", "threshold.double() * W_dec",
           "test_published_formats.py::test_published_files_give_what_their_format_says"),
    Mutant("an array may claim more than its archive holds", "sae_fast/interop/_npz.py",
           "or needed != held", "or needed < held",
           "test_published_formats.py::test_an_array_that_is_not_what_its_header_says_is_named_and_takes_no_memory"),
    Mutant("the Hub gives every file of the folder", "sae_fast/interop/hub.py",
           "if file in weights or any(", "if True or any(",
           "test_hub.py::test_published_saes_are_fetched_by_their_places_and_nothing_else_is"),
    Mutant("an activation scale leaves the decoder", "sae_fast/nn/scale.py",
           "sae.W_dec.div_(out or scale)", "pass", "test_interop.py::test_a_scale_is_folded"),
    Mutant("a scaled training leaves thresholds", "sae_fast/nn/scale.py", 'or (name == "threshold" and not unset)', "",
           "test_demo.py::test_scaling_an_sae_scales_its_reconstruction"),
]  # fmt: skip

GROUPS["peers"] = [
    Mutant("a transcoder of sparsify subtracts b_dec", "sae_fast/interop/formats/sparsify.py",
           "not transcode  # b_dec", "True  # b_dec", "test_formats.py -k transcod"),
    Mutant("SAELens' drop-in: the norms' cost is not a mean", "sae_fast/objectives/objective.py",
           "sums * (self.coefficient / n) / norm", "sums * self.coefficient / norm", "test_saelens.py -k 'step or loss'"),
    Mutant("SAELens' drop-in: a scaled loss has the gradient of the plain one", "sae_fast/interop/saelens/step.py",
           "taken = [g.mul_(grads[0]) for g in taken]", "pass", "test_saelens.py -k 'gradient or loss or scal'"),
    Mutant("SAELens' drop-in: the auxiliary decoder gradient is left out",
           "sae_fast/interop/saelens/penalised.py",
           "l1, \"saelens\")", "l1, \"saelens\" if l1 < 0 else \"paper\")", "test_saelens.py -k 'step or loss'"),
    Mutant("SAELens' drop-in: features are revived by π alone", "sae_fast/objectives/auxk.py",
           "if norms is None else (u + bias) * norms", "", "test_saelens.py -k near_to"),
    Mutant("SAELens' drop-in: a fractional k is rounded up", "sae_fast/interop/saelens/topk.py",
           "k=self.k if self.whole else ceil(self.k)", "k=ceil(self.k)", "test_saelens.py -k near_to"),
    Mutant("SAELens' drop-in: thresholds stay below zero", "sae_fast/interop/saelens/jumprelu.py",
           "self.threshold.data.clamp_(min=0.0)", "pass", "test_saelens.py -k thresholds_below"),
    Mutant("SAELens' drop-in: the topk threshold does not move", "sae_fast/interop/saelens/topk.py",
           "self.update_topk_threshold(acts.values() if acts.is_sparse else acts)", "pass", "test_saelens.py -k near_to"),
    Mutant("dictionary_learning's drop-in forgets the sparsity warm-up", "sae_fast/interop/dictionary_learning/gated.py",
           "self.l1_penalty * self.sparsity_warmup_fn(step)", "self.l1_penalty", "test_dictionary_learning.py -k gated"),
    Mutant("dictionary_learning's drop-in trains what is frozen", "sae_fast/interop/dictionary_learning/_engine.py",
           "requires_grad_(self.ae.get_parameter(theirs).requires_grad)", "requires_grad_(True)",
           "test_dictionary_learning.py -k frozen"),
    Mutant("dictionary_learning's drop-in: a write to a flipped weight goes unnoticed",
           "sae_fast/interop/dictionary_learning/_engine.py", "_version) != self.version:", "_version) < 0:",
           "test_dictionary_learning.py -k 'what_is_done and jumprelu'"),
    Mutant("dictionary_learning's drop-in: TopK's threshold follows the batch's smallest",
           "sae_fast/interop/dictionary_learning/topk.py",
           "return torch.segment_reduce(positive, \"min\", offsets=code.indptr, initial=torch.inf)[:, None]",
           "return positive.amin()[None, None]", "test_dictionary_learning.py -k 'thresholds_dead and topk'"),
    Mutant("dictionary_learning's drop-in: Matryoshka's groups are not a mean",
           "sae_fast/interop/dictionary_learning/topk.py", "weight / on for weight", "weight for weight",
           "test_dictionary_learning.py -k 'two_times and matryoshka'"),
    Mutant("dictionary_learning's drop-in: an evaluation is not counted", "sae_fast/interop/dictionary_learning/_engine.py",
           "state.since_fired = state.fired(code)", "pass", "test_dictionary_learning.py -k 'thresholds_dead'"),
    Mutant("dictionary_learning's drop-in: p falls without its coefficient",
           "sae_fast/interop/dictionary_learning/annealed.py", "* (now / then).item()", "* 1.0",
           "test_dictionary_learning.py -k p_its_queue"),
]  # fmt: skip

GROUPS["native"] = [
    Mutant("C++ largest: a magnitude's bound forgets what the product is above", "csrc/host/keys.hpp",
           "difference = excess - bound;", "difference = -bound;",
           "test_topk.py::test_a_magnitude_is_bounded_from_below_by_twice_the_margins"),
    Mutant("C++ largest: of dots the negative ones are forgotten", "csrc/host/largest.hpp",
           "if (signs_) take_negative(a, s, u + r * a.width, b + r);", "",
           "test_topk.py::test_the_largest_are_chosen_whatever_the_way"),
    Mutant("C++ entries: a run ends among entries that are summed together", "csrc/include/sae_fast/entries.hpp",
           "begin) / 4 * 4 : end", "begin) : end", "test_walks.py"),
    Mutant("C++ outer: the sources take turns in each run", "csrc/cpu/outer.cpp",
           "{a.sources.of + s, 1}", "a.sources", "test_walks.py::test_outer"),
    Mutant("C++ decode_loss: a prefix begins anew", "csrc/cpu/decode_loss.cpp",
           "if (g > 0) axpy(r, r - sets.stride, 1.0f, d);", "", "test_decode_loss.py -k prefix"),
    Mutant("C++ weight_step: a row that rested decays once", "csrc/cpu/weight_step.cpp",
           "idle == 1 ? adam.beta2 : ::pow(adam.beta2, static_cast<double>(idle))", "adam.beta2",
           "test_weight_step.py::test_as_near_to_float64_as_torchs"),
    Mutant("C++ weight_step: momentum ends where its first elements do", "csrc/cpu/weight_step.cpp",
           "for (int64_t first = 0; first < d; first += 64)", "for (int64_t first = 0; first < d - 64; first += 64)",
           "test_weight_step.py::test_one_last_element_of_momentum_moves_its_row"),
    Mutant("C++ weight_step: an idle row has a gradient of its own coefficient", "csrc/cpu/weight_step.cpp",
           "if (touched && a.self_coefficient)", "if (a.self_coefficient)",
           "test_weight_step.py::test_momentum_is_as_near_to_float64_as_torchs"),
    Mutant("C++ weight_step: rows with momentum rest", "csrc/cpu/weight_step.cpp",
           "for_gradient_rows(a, nullptr, a.m != nullptr,", "for_gradient_rows(a, nullptr, false,",
           "test_weight_step.py::test_a_row_without_entries_moves_while_it_has_momentum_and_else_rests_bit_for_bit"),
    Mutant("C++ weight_step: momentum never runs out", "csrc/cpu/weight_step.cpp",
           "__builtin_fabsf(first) < FLT_MIN ? 0.0f : first", "first",
           "test_weight_step.py::test_momentum_runs_out_in_the_engines_and_its_row_rests"),
    Mutant("C++ weight_step: the first moment is not corrected", "csrc/host/arguments.hpp",
           "lr / correction(beta1)", "lr",
           "test_weight_step.py::test_momentum_is_as_near_to_float64_as_torchs"),
    Mutant("C++ decode_loss: a closed gate has a penalty", "csrc/cpu/decode_loss.cpp",
           "gates[at] == 0.0f ? (kZeros ? two * dot_aux : 0.0f) :", "",
           "test_decode_loss.py"),
    Mutant("C++ decode_loss: a prefix begins with nothing", "csrc/cpu/decode_loss.cpp",
           "if (g > 0) axpy", "if (false) axpy", "test_decode_loss.py -k 'prefix and plain'"),
    Mutant("C++ decode_loss: a longer prefix does not reach a shorter one", "csrc/cpu/decode_loss.cpp",
           "r[k] = c * r[k] + next[k];", "r[k] = c * r[k];", "test_decode_loss.py -k 'prefix and plain'"),
    Mutant("C++ decode_loss: a group's first feature is the last of the one before", "csrc/include/sae_fast/entries.hpp",
           "indices[middle] < feature", "indices[middle] <= feature",
           "test_decode_loss.py -k 'prefix and plain'"),
    Mutant("C++ decode_loss: a value of 0 has a penalty", "csrc/cpu/decode_loss.cpp",
           "g_gate[at] = magnitudes[at] == 0.0f ?", "g_gate[at] = !kZeros && magnitudes[at] == 0.0f ?",
           "test_decode_loss.py -k 'prefix and plain'"),
    Mutant("C++ screen: the outliers' residual is left out", "csrc/cpu/screen.cpp",
           "s.terms[Screen::w_outliers] * ::sqrt(outlier2)", "s.terms[Screen::w_outliers] * 0.0",
           "test_screen.py::test_each_term_of_the_bound_alone_keeps_its_members"),
    Mutant("C++ JumpReLU: at its threshold a feature fires", "csrc/include/sae_fast/activation.hpp",
           "pi <= first() ? 0.0f", "pi < first() ? 0.0f",
           "test_encode.py -k 'ties_are_not_members and jumprelu and cpu'"),
    Mutant("CUDA weight_step: a zero row is divided by nothing", "csrc/include/sae_fast/cuda/weight_step.cuh",
           "dots[0] > 0.0f ? __fdiv_rn(dots[1], dots[0]) : 0.0f", "__fdiv_rn(dots[1], dots[0])",
           "test_weight_step.py::test_a_zero_row_with_unit_rows_stays_finite -k cuda"),
    Mutant("CUDA weight_step: rows with momentum rest", "csrc/include/sae_fast/cuda/weight_step.cuh",
           "if (decay < 0.0f) return;", "if (decay < 0.0f || begin == end) return;",
           "test_weight_step.py::test_a_row_without_entries_moves_while_it_has_momentum_and_else_rests_bit_for_bit "
           "-k cuda"),
    Mutant("CUDA weight_step: an idle row has a gradient of its own coefficient",
           "csrc/include/sae_fast/cuda/weight_step.cuh", "a.own && touched ? a.own[i]", "a.own ? a.own[i]",
           "test_weight_step.py::test_momentum_is_as_near_to_float64_as_torchs -k cuda"),
    Mutant("CUDA weight_step: unit rows in slices keep what is along them", "csrc/include/sae_fast/cuda/weight_step.cuh",
           "own = -warp_sum(sum)", "own = 0.0f", "test_triton_weight_step.py::test_wide_unit_rows_by_slices"),
    Mutant("C++ ReLU: NaN counts as nothing", "csrc/include/sae_fast/activation.hpp",
           "return a <= 0.0f ? 0.0f : a; }", "return a > 0.0f ? a : 0.0f; }",
           "test_encode.py::test_what_is_not_finite_does_not_vanish -k cpu"),
]  # fmt: skip
ON_REQUEST = ("peers", "native")


def mutate(mutant: Mutant, root: Path) -> None:
    """Plants the fault."""
    file = root / mutant.file
    text = file.read_text() if file.is_file() else ""
    if (n := text.count(mutant.old)) != 1:
        raise LookupError(f"{mutant.name}: its text stands {n} times in {mutant.file}: adapt the mutant")
    file.write_text(text.replace(mutant.old, mutant.new))


def name_in(root: Path, argument: str) -> str:
    """The argument with the place of its file, wherever in tests/ that is."""
    file, *rest = argument.split("::")
    if not file.endswith(".py"):
        return argument
    return "::".join([str(next((root / "tests").glob(f"*/{file}")).relative_to(root)), *rest])


def build(root: Path) -> str:
    """Compiles the C++ engine of one instruction set, which is enough; what the compiler complained of, or nothing."""
    setup = root / "setup.py"
    setup.write_text(setup.read_text().replace('"avx2": X86,', "").replace('"avx512": [', '"plain": [] and ['))
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    return done.stderr if done.returncode else ""


def run(root: Path, arguments: list[str], out: Path) -> int:
    """pytest's exit status in a copy of the tree, in a fork of this process: what takes long to import is there already."""
    if arguments[0].startswith("tests/peers"):
        environment = {**os.environ, "PYTHONPATH": str(root)}
        command = [PEERS, "-m", "pytest", *OPTIONS, *arguments]
        with out.open("w") as said:
            return subprocess.run(command, cwd=root, env=environment, stdout=said, stderr=said).returncode
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.chdir(root)
    with out.open("w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    os.environ["PYTHONPATH"] = str(root)  # of what tests start
    here = [path for path in sys.path if path and Path(path).resolve() not in (ROOT, ROOT / "tests")]
    sys.path[:] = [str(root), *here]
    code = 3
    try:
        code = int(pytest.main([*OPTIONS, *arguments]))
    finally:
        sys.stdout.flush()
        os._exit(code)


def verdict(mutant: Mutant) -> tuple[str, str, float]:
    """("red", "SURVIVED" or "error", the last line that was said, seconds)."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-") as temporary:
        root, out = Path(temporary) / "tree", Path(temporary) / "said"
        shutil.copytree(ROOT, root, symlinks=True, ignore=SKIPPED)
        mutate(mutant, root)
        of_engine = mutant.file.startswith("csrc") and "cuda" not in mutant.file
        said = build(root) if of_engine else ""
        code = None if said else run(root, [name_in(root, argument) for argument in shlex.split(mutant.tests)], out)
        said = said or out.read_text(errors="replace")
    lines = [line for line in said.splitlines() if line.startswith(("FAILED", "ERROR"))] or said.splitlines() or [""]
    return {0: "SURVIVED", 1: "red"}.get(code, "error"), lines[-1], time.monotonic() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    every = {m.name: (group, m) for group, mutants in GROUPS.items() for m in mutants}
    if unknown := set(options.names) - set(every) - set(GROUPS) - {"all"}:
        parser.error(f"no mutant or group is called {sorted(unknown)}")
    asked = "all" in options.names
    chosen = [
        mutant for name, (group, mutant) in every.items()
        if asked or name in options.names or group in options.names or (not options.names and group not in ON_REQUEST)
    ]  # fmt: skip
    for mutant in chosen:  # before anything runs
        if (ROOT / mutant.file).read_text().count(mutant.old) != 1:
            print(f"{mutant.name}: its text does not stand in {mutant.file} exactly once: adapt the mutant")
            return 2
    if options.list:
        print(*(f"{every[m.name][0]:<10}  {m.name}" for m in chosen), sep="\n")
        return 0
    survived = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for mutant, (how, said, seconds) in zip(chosen, pool.map(verdict, chosen), strict=True):
            survived += how != "red"
            print(f"{how:<8}  {seconds:5.0f} s  {mutant.name}  [{said[:110]}]", flush=True)
    print(f"{len(chosen) - survived} of {len(chosen)} are red")
    return survived > 0


if __name__ == "__main__":
    sys.exit(main())
