"""Bugs of our own choosing, in the newest and the most dangerous code: the fold of scoring, the
two-level weight gradient, the power-of-two scale, compaction, padding, the upstream gradient,
metrics, aggregation, advantages, the trainer.

The thirty historical ones: `mutations.py`.
"""

from mutation_table import Mutation

NUMBERS, NUMBERS_2 = "tests/test_numbers.py::", "tests/test_numbers_2.py::"
NUMBERS_3, SCORE = "tests/test_numbers_3.py::", "tests/test_score_rows.py::"
TRAINER, AUTOGRAD = "tests/test_trainer.py::", "tests/test_autograd.py::"
AGGREGATE, ADVANTAGES = "tests/test_aggregate.py::", "tests/test_advantages.py::"
BORDERS = SCORE + "test_every_output_equals_the_row_pass_at_every_border_of_a_panel"
OPTIONS = NUMBERS + "test_N1_every_output_within_the_error_of_pytorch"
FORTY = NUMBERS + "test_N1_fp16_with_weights_of_1e_minus_7_over_forty_chunks[cpu]"
CHUNKS = NUMBERS + "test_N8_dweight_error_does_not_grow_with_the_number_of_chunks"
SHAPES = NUMBERS + "test_N1_shapes_and_seeds[200-32-33-1-float32-cpu]"


def one(number, name, file, old, new, *tests) -> Mutation:
    """A mutation of one edit."""
    return Mutation(number, name, file, ((old, new),), tests)


FOLD, SCORING = "csrc/cpu/row_fold.h", "csrc/cpu/score.cpp"
LOOP, ROWS = "pyoffline/chunk_loop.py", "csrc/row_pass.h"

MORE = (
    one(
        101,
        "fold: entropy's shift between two maxima is dropped",
        FOLD,
        "factor * (low.s + shift * low_d)",
        "factor * low.s",
        BORDERS + "[float32-8192]",
    ),
    one(
        102,
        "fold: the gap's shift between two maxima is dropped",
        FOLD,
        "low.sum_ut + (low_u == 0.0 ? 0.0 : shift * low_u)",
        "low.sum_ut",
        BORDERS + "[float32-8192]",
    ),
    one(
        103,
        "fold: the label is taken against another panel's maximum",
        FOLD,
        "static_cast<float>((label_m_ - out.m) + t_label_)",
        "static_cast<float>(t_label_)",
        BORDERS + "[float32-8192]",
    ),
    one(
        104,
        "scoring: every panel adds the first panel's bias",
        SCORING,
        "  if (in.bias) in.bias += panel.begin;\n",
        "",
        BORDERS + "[float32-8192]",
    ),
    one(
        105,
        "scoring: every panel takes the first panel's class weights",
        SCORING,
        "  if (in.class_weight) in.class_weight += panel.begin;\n",
        "",
        BORDERS + "[float32-8192]",
    ),
    one(
        106,
        "scoring folds logits that training would have rounded",
        SCORING,
        "  if (in.type != DType::f32) {\n",
        "  in.type = DType::f32;\n  if (in.type != DType::f32) {\n",
        SCORE + "test_n15_scoring_and_training_agree_at_equal_chunk_shape[bfloat16]",
    ),
    one(
        107,
        "token log-probs are recomputed with fp32 logits in the backward",
        "pyoffline/autograd.py",
        "    linear, (labels, temperature, head), rest = args[:5], args[5:8], args[8:]\n",
        "    linear, (labels, temperature, head), rest = args[:5], args[5:8], args[8:]\n"
        "    rest = [rest[0], 0, *rest[2:]]\n",
        NUMBERS + "test_N10_the_gradient_is_that_of_the_rounded_logits[logps-640-bfloat16-cpu]",
    ),
    one(
        108,
        "two-level dweight: a join overwrites the total",
        LOOP,
        "join = self.out.copy_ if self.count <= CHUNKS_PER_LEVEL else self.out.add_",
        "join = self.out.copy_",
        CHUNKS + "[float32-cpu]",
    ),
    one(
        109,
        "two-level dweight: the accumulator is not cleared after a join",
        LOOP,
        "            join(self.acc)\n            self.first = True\n",
        "            join(self.acc)\n",
        CHUNKS + "[float32-cpu]",
    ),
    one(
        110,
        "two-level dweight: the fp16 scale is not taken off",
        LOOP,
        "not is_one(self.scale):\n                self.out.mul_(self.scale)\n",
        "False:\n                pass\n",
        FORTY,
    ),
    one(
        111,
        "fp16 dlogits are not scaled before they are rounded",
        LOOP,
        "    if dtype != torch.float16:\n        return 1.0\n",
        "    return 1.0\n",
        FORTY,
    ),
    one(
        112,
        "the fp16 scale is not taken off dbias",
        LOOP,
        "            self.dbias *= self.inverse\n",
        "            pass\n",
        FORTY,
    ),
    one(
        113,
        "compacted rows are put back at the front",
        LOOP,
        ".index_copy_(dim, index, x)",
        ".index_copy_(dim, torch.arange(index.numel()), x)",
        NUMBERS_2 + "test_N2_ignored_tokens_are_bitwise_invisible[nan-float32-cpu]",
    ),
    one(
        114,
        "gradients that somebody holds are scaled in place",
        "pyoffline/autograd.py",
        "grad.mul_(factor) if sys.getrefcount(grad) <= PRIVATE else grad * factor",
        "grad.mul_(factor)",
        "tests/test_autograd_context.py::"
        "test_a2_gradients_that_the_caller_of_the_op_holds_are_not_scaled[cpu]",
    ),
    one(
        115,
        "deterministic mode: the last chunk is not padded",
        LOOP,
        "        if plan.padded:\n",
        "        if False:\n",
        NUMBERS_3 + "test_N9_deterministic_mode_runs_every_product_at_one_shape",
    ),
    one(
        116,
        "deterministic mode: the padding is not zeroed",
        LOOP,
        "    padded = x.new_zeros(rows, x.shape[1])\n",
        "    padded = x.new_empty(rows, x.shape[1])\n",
        "tests/test_compile.py::test_a4_every_element_is_written_in_eager[linear_policy_loss-cpu]",
    ),
    one(
        117,
        "metrics from clamped ratios",
        "pyoffline/metrics.py",
        "        ratio = moved.exp()\n",
        "        ratio = moved.clamp(-20.0, 20.0).exp()\n",
        "tests/test_metrics.py::test_n5_metrics_are_their_definitions_over_valid_tokens",
    ),
    one(
        118,
        "metrics are means over ignored positions too",
        "pyoffline/metrics.py",
        "    count = valid.sum().to(logps.dtype).clamp(min=1.0)\n",
        "    count = logps.new_full((), valid.numel())\n",
        "tests/test_metrics.py::test_n5_metrics_are_their_definitions_over_valid_tokens",
    ),
    one(
        119,
        "seq-mean-token-mean divides by the padded length",
        "pyoffline/aggregate.py",
        "denominator = denominator * sizes[unit]",
        "denominator = denominator * mask.shape[-1]",
        AGGREGATE + "test_every_mode_is_its_definition",
    ),
    one(
        120,
        'the mode "constant" leaves empty rows out',
        "pyoffline/aggregate.py",
        '"constant": _Rule("sequences", horizon=True, empty_rows=True)',
        '"constant": _Rule("sequences", horizon=True)',
        AGGREGATE + "test_every_mode_is_its_definition",
    ),
    one(
        121,
        "what a data-parallel host divides by is not undone",
        "pyoffline/aggregate.py",
        "counts.grad_accum * counts.dp_size\n    weights",
        "counts.grad_accum\n    weights",
        AGGREGATE + "test_hosts_that_average_are_undone",
    ),
    one(
        122,
        "advantages: a biased standard deviation",
        "pyoffline/arrays.py",
        "/ (self.size - 1).clamp(min=1)).sqrt()",
        "/ self.size.clamp(min=1)).sqrt()",
        ADVANTAGES + "test_group_estimators_are_their_definitions",
    ),
    one(
        123,
        "leave-one-out keeps the sample in its own baseline",
        "pyoffline/advantages.py",
        "(r - group.mean(r)) * group.size / (group.size - 1).clamp(min=1)",
        "r - group.mean(r)",
        ADVANTAGES + "test_group_estimators_are_their_definitions",
    ),
    one(
        124,
        'reduction="none" on logits ignores the upstream gradient of each token',
        "pyoffline/token_losses.py",
        "coefs * g_loss)\n        dlogits",
        "coefs * g_loss.mean())\n        dlogits",
        AUTOGRAD + "test_a2_upstream_per_token_contiguous_strided_expanded[logits_none-cpu]",
    ),
    one(
        125,
        "the gradient lacks 1/T",
        "csrc/cpu/row_pass.cpp",
        " * args.logit_scale / temperature_of(args, row);",
        " * args.logit_scale;",
        OPTIONS,
    ),
    one(
        126,
        "a token's temperature multiplies that of the head",
        "csrc/cpu/row_driver.h",
        "return args.temperature ? args.temperature[row] : args.uniform_temperature;",
        "return args.uniform_temperature * (args.temperature ? args.temperature[row] : 1.0);",
        NUMBERS + "test_N1_a_tokens_temperature_replaces_that_of_the_head",
    ),
    one(
        127,
        "dhidden keeps the last panel of V only",
        "csrc/cpu/gemm.cpp",
        "v0 += width, beta = 1.0f)",
        "v0 += width)",
        "tests/test_gemm.py::test_against_fp64",
    ),
    one(
        128,
        "dbias keeps the last chunk only",
        "csrc/cpu/dispatch.cpp",
        "accumulate ? out[begin + c] : 0.0",
        "accumulate ? 0.0 : 0.0",
        SHAPES,
    ),
    one(
        129,
        "the softcap's derivative is missing at the label",
        ROWS,
        "zero_safe(factor * label, sums.damp_label)",
        "zero_safe(factor * label, 1.0)",
        OPTIONS,
    ),
    one(
        130,
        "the entropy's gradient has the wrong mean",
        ROWS,
        "zero_safe(b, mean_t);",
        "zero_safe(b, -mean_t);",
        OPTIONS,
    ),
    one(
        131,
        "label smoothing ignores the class weights in its gradient",
        "csrc/cpu/row_pass.cpp",
        "plan.sum_u / static_cast<double>(args.vocab)",
        "1.0",
        "tests/test_cross_entropy.py::test_N1_cross_entropy_is_torchs_for_every_option",
    ),
    one(
        132,
        "default weights divide by all positions",
        "pyoffline/flatten.py",
        "counted / counted.sum().clamp(min=1.0)",
        "counted / max(counted.numel(), 1)",
        NUMBERS_3 + "test_N11_weights_are_the_primitive_and_the_default_is_the_token_mean[cpu]",
    ),
    one(
        133,
        "a packed sequence predicts the first token of the next",
        "pyoffline/aggregate.py",
        "        shifted[..., :-1].masked_fill_(ends, ignore_index)\n",
        "        shifted[..., :-1].masked_fill_(ends & False, ignore_index)\n",
        AGGREGATE + "test_shift_labels_stops_at_packed_borders",
    ),
    one(
        134,
        "the trainer does not shift the columns of its tokens",
        "pyoffline/trainer.py",
        "    if values.shape[:2] != shape:\n        return values\n",
        "    if True:\n        return values\n",
        TRAINER + "test_loss_and_gradients_equal_a_plain_loop[ppo_kl_entropy-1-padded]",
    ),
    one(
        135,
        "a non-finite gradient does not stop the run",
        "pyoffline/trainer.py",
        "        if not math.isfinite(float(norm)):\n",
        "        if False:\n",
        TRAINER + "test_t3_a_non_finite_gradient_stops_before_the_optimiser_step",
    ),
    one(
        136,
        "each evaluation batch is its own mean",
        "pyoffline/trainer.py",
        "        self._add_weights(batches)\n        meter",
        "        for one in batches:\n            self._add_weights([one])\n        meter",
        TRAINER + "test_eval_loss_is_the_loss_of_the_whole_set[1-nll]",
    ),
    one(
        137,
        "LoRA's scale is dropped",
        "pyoffline/flatten.py",
        " * adapter.scale)",
        ")",
        AUTOGRAD + "test_a1_gradients_exactly_where_asked_for_every_subset",
    ),
    one(
        138,
        "a bad label's row is counted among the compacted ones",
        LOOP,
        "at = row if index is None else int(index[row])",
        "at = row",
        "tests/test_errors.py::test_n6_the_row_is_that_of_the_whole_batch_not_of_the_compacted_one",
    ),
    one(
        139,
        "without vendor GEMM: dweight forgets the former chunks",
        "pyoffline/panel_gemm.py",
        "beta=0.0 if first else 1.0",
        "beta=0.0",
        NUMBERS + "test_N1_without_the_vendor_gemm",
    ),
    one(
        140,
        "the fp16 scale is not taken off dweight",
        "pyoffline/cpu.py",
        "            grad.acc.mul_(grad.scale)\n",
        "            pass\n",
        NUMBERS + "test_N1_fp16_under_a_loss_scale_of_2_to_the_16[16-cpu]",
    ),
    one(
        141,
        "the fp16 scale is not taken off the gradient of given logits",
        "pyoffline/autograd.py",
        "apply_upstream(formed[0], g_loss * formed[1], args[0].dtype)",
        "apply_upstream(formed[0], g_loss, args[0].dtype)",
        "tests/test_cross_entropy.py::test_N1_cross_entropy_is_torchs_for_every_option",
    ),
    one(
        142,
        "every row counts as top-1",
        ROWS,
        "out.is_top1 = sums.t_label >= 0.0f;",
        "out.is_top1 = sums.t_label == sums.t_label;",
        "tests/test_reference.py::test_log_sum_p2_and_top1_against_fp64[cpu]",
    ),
)
