"""The thirty historical bugs of fused loss kernels (research of public threads), put back into this
code where their counterpart lives.

Numbers and names are the research list's. A bug of code that does not exist here is `not_run` with
the reason; where panels of V or ranks of a data-parallel run stand in for a vocabulary shard, the
note says so. Bugs of our own choosing: `more_mutations.py`.
"""

from mutation_table import Mutation

NUMBERS, NUMBERS_2 = "tests/test_numbers.py::", "tests/test_numbers_2.py::"
NUMBERS_3, SCORE = "tests/test_numbers_3.py::", "tests/test_score_rows.py::"
TRAINER, AUTOGRAD = "tests/test_trainer.py::", "tests/test_autograd.py::"
CHECKPOINT = "tests/test_checkpoint.py::"
FILES = "tests/test_checkpoint_files.py::"

HISTORICAL = (
    Mutation(
        1,
        "dweight accumulated in bf16 across chunks",
        "pyoffline/chunk_loop.py",
        (
            (
                "        self.first = False\n        self.count += 1\n",
                "        self.first = False\n        self.count += 1\n"
                "        if self.acc is not None and not last:\n"
                "            self.acc.copy_(self.acc.to(self.out.dtype))\n",
            ),
        ),
        (NUMBERS + "test_N8_dweight_error_does_not_grow_with_the_number_of_chunks[bfloat16-cpu]",),
    ),
    Mutation(
        2,
        "the tail of V is not masked",
        "csrc/cpu/sweeps.h",
        (
            (
                "const F t = Vec::keep(src.shifted(src.bent(src.y(i, n))), n, -INFINITY);",
                "const F t = src.shifted(src.bent(src.y(i, n)));",
            ),
        ),
        (NUMBERS + "test_N1_logp_of_given_fp32_logits_within_8_eps[wide-33-cpu]",),
    ),
    Mutation(
        3,
        "the sentinel of a label elsewhere is a padded column of the last tile",
        "csrc/cpu/score.cpp",
        (
            (
                "  const int64_t label = args.labels[row] - panel.begin;\n"
                "  const bool has_label = label >= 0 && label < panel.cols;\n",
                "  int64_t label = args.labels[row] - panel.begin;\n"
                "  if (label < 0 || label >= panel.cols) label = panel.cols;\n"
                "  const bool has_label = label < kLogitsPanel;\n",
            ),
        ),
        (
            SCORE
            + "test_every_output_equals_the_row_pass_at_every_border_of_a_panel[mkl-float32-4097]",
        ),
        note="panels of V stand in for the shards of a vocabulary",
    ),
    Mutation(
        4,
        "the identity of the maximum is 0",
        "csrc/cpu/sweeps.h",
        (
            (
                "  const F lowest = Vec::set(-INFINITY);\n  Peak peak = {-INFINITY, 0};\n",
                "  const F lowest = Vec::set(0.0f);\n  Peak peak = {0.0f, 0};\n",
            ),
        ),
        (NUMBERS + "test_N1_a_common_offset_costs_at_most_1e_minus_5[-100.0-cpu]",),
    ),
    Mutation(
        5,
        "logp as z_y - lse",
        "csrc/row_pass.h",
        (
            (
                "const double logp = static_cast<double>(sums.t_label) - out.log_d;",
                "const float z_y = static_cast<float>(sums.m + sums.t_label);\n"
                "  const double logp = z_y - static_cast<float>(sums.m + out.log_d);",
            ),
        ),
        (NUMBERS + "test_N1_a_common_offset_costs_at_most_1e_minus_5[10000.0-cpu]",),
    ),
    Mutation(
        6,
        "p_y is rounded to the logits' dtype before the 1 is taken off",
        "csrc/cpu/sweeps.h",
        (
            (
                "from_float(constants.at_label, typed + label);",
                "const float p = expf(sums.t_label) * constants.from_p;\n"
                "    from_float(to_float(typed[label]) + (constants.at_label - p), typed + label);",
            ),
        ),
        (NUMBERS + "test_N10_confident_rows_keep_p_minus_one[False-bfloat16-cpu]",),
    ),
    Mutation(
        7,
        "bf16 logits in the forward, fp32 logits in the backward",
        "pyoffline/reference.py",
        (
            (
                "    z, slope = transform(logits, rows)\n",
                "    rounded = logits\n"
                "    logits = _EXACT.pop() if _EXACT else logits\n"
                "    z, slope = transform(rounded, rows)\n",
            ),
            (
                "    dz = row_gradient(logp_all, scalars, rows, coefs)\n",
                "    wide = transform(logits[: rounded.shape[0]], rows)[0]\n"
                "    dz = row_gradient(wide - stats.lse[:, None], scalars, rows, coefs)\n",
            ),
            (
                "            out.copy_(F.linear(hidden, call.weight))\n",
                "            _EXACT[:] = [F.linear(hidden.float(), call.weight.float())]\n"
                "            out.copy_(_EXACT[0])\n",
            ),
            (
                "class ReferenceKernels(NoShortcuts):\n",
                "_EXACT = []\n\n\nclass ReferenceKernels(NoShortcuts):\n",
            ),
        ),
        (NUMBERS + "test_N10_the_gradient_is_that_of_the_rounded_logits",),
    ),
    Mutation(
        8,
        "row offsets in 32 bits",
        "csrc/cpu/row_memory.h",
        (
            (
                "         row * args.logits_stride * size_of(args.logits_type);\n",
                "         static_cast<int32_t>(row * args.logits_stride) *\n"
                "             size_of(args.logits_type);\n",
            ),
        ),
        (NUMBERS_3 + "test_N13_rows_past_2_to_the_31_and_32_elements",),
    ),
    Mutation(
        9,
        "labels are not checked before they are used as an index",
        "csrc/row_call.cpp",
        (
            (
                "if (label == args.ignore_index || (label >= 0 && label < args.vocab)) continue;",
                "if (label == label) continue;",
            ),
        ),
        ("tests/test_bindings.py::test_a_bad_label_writes_nothing",),
    ),
    Mutation(
        10,
        "the gradient is written into the caller's logits",
        "pyoffline/cpu.py",
        (
            (
                "dlogits = CpuKernels().empty(source.shape, source.dtype, source.device)",
                "dlogits = source",
            ),
            (
                "    return LogitsResult(loss, out, dlogits, 1.0 / scale)",
                "    dlogits = None if dlogits is None else dlogits.clone()\n"
                "    return LogitsResult(loss, out, dlogits, 1.0 / scale)",
            ),
        ),
        (NUMBERS_3 + "test_N7_views_of_logits[strided-float32-cpu]",),
    ),
    Mutation(
        11,
        "the strides of the upstream gradient are ignored",
        "pyoffline/autograd.py",
        (
            (
                "    return torch.stack([g_logps, g_entropy,",
                "    g_logps = g_logps.as_strided(g_logps.shape, (1,))\n"
                "    return torch.stack([g_logps, g_entropy,",
            ),
        ),
        (AUTOGRAD + "test_a2_upstream_per_token_contiguous_strided_expanded",),
    ),
    Mutation(
        12,
        'reduction="none": dweight is scaled after the sum over tokens',
        "pyoffline/token_losses.py",
        (
            (
                "        formed = ops.linear_coefs(*linear, labels, None, class_weight, scaled,",
                "        scaled = coefs\n"
                "        formed = ops.linear_coefs(*linear, labels, None, class_weight, scaled,",
            ),
            (
                "    live = [formed[i].to(linear[i].dtype) if needs & (1 << i) else None",
                "    by = (g_loss[:, None], g_loss.mean(), g_loss.mean())\n"
                "    live = [(formed[i] * by[i]).to(linear[i].dtype) if needs & (1 << i) else None",
            ),
        ),
        (AUTOGRAD + "test_a2_upstream_per_token_contiguous_strided_expanded[linear_none-cpu]",),
    ),
    Mutation(
        13,
        "nothing is stored for ignored rows",
        "csrc/cpu/row_pass.cpp",
        (("    write_coefs(args, row, Coefs{});\n    zero_dlogits(args, row);\n", ""),),
        ("tests/test_compile.py::test_a4_every_element_is_written_in_eager[policy_loss-cpu]",),
    ),
    Mutation(
        14,
        "a weight of 0 is applied after the exponential",
        "pyoffline/calls.py",
        (("            keep = keep & (self.weights != 0)\n", "            pass\n"),),
        (NUMBERS_2 + "test_N2_ignored_tokens_are_bitwise_invisible[nan-float32-reference]",),
    ),
    Mutation(
        15,
        "a clipped token's gradient is multiplied by its mask",
        "csrc/objectives.h",
        (
            (
                "return {-product(value, adv), live ? -ratio * adv : 0.0f};",
                "return {-product(value, adv), -ratio * adv * (live ? 1.0f : 0.0f)};",
            ),
        ),
        (NUMBERS_2 + "test_N3_an_infinite_log_ratio_is_clipped_or_visible[1.0-cpu]",),
    ),
    Mutation(
        16,
        "a clamp is assigned and never read",
        "pyoffline/objective_math.py",
        (
            (
                '    """-sg(clamp(w, low, high)) A l (TIS-PG)."""\n'
                "    weight = clamp(ops.exp(logp - mu), low, high)\n",
                '    """-sg(clamp(w, low, high)) A l (TIS-PG)."""\n'
                "    weight = ops.exp(logp - mu)\n"
                "    clamped = clamp(weight, low, high)\n",
            ),
        ),
        ("tests/test_objectives.py::test_loss_and_coefficients_equal_autograd_of_the_oracle",),
    ),
    Mutation(
        17,
        "a sequence's ratio as a sum of exponentials",
        "pyoffline/corrections.py",
        (
            (
                "    total = log_w.sum(-1, keepdim=True)\n",
                "    total = torch.where(mask, log_w.exp(), 0.0).sum(-1, keepdim=True).log()\n",
            ),
        ),
        ("tests/test_corrections.py::test_sequence_ratio_is_a_product_not_a_sum_of_exponentials",),
    ),
    Mutation(
        18,
        "NaN old log-probs become 0",
        "pyoffline/flatten.py",
        (
            (
                "    return x.detach().to(dtype).reshape(-1).contiguous()\n",
                "    return torch.nan_to_num(x.detach().to(dtype).reshape(-1).contiguous())\n",
            ),
        ),
        (
            NUMBERS_2
            + "test_N3_a_broken_valid_token_is_seen_and_harms_no_other[nan-old-float32-cpu]",
        ),
    ),
    Mutation(
        19,
        "a minimum that drops NaN",
        "csrc/objectives.h",
        (
            (
                "  return x < low ? low : (x > high ? high : x);\n",
                "  return fminf(fmaxf(x, low), high);\n",
            ),
        ),
        ("tests/test_objectives_cpu.py::test_N3_cpp_and_python_agree_on_nan_and_inf_inputs",),
    ),
    Mutation(
        20,
        "the mean over a rank's own tokens",
        "pyoffline/step_weights.py",
        (("reduce(torch.stack(totals))", "torch.stack(totals)"),),
        (TRAINER + "test_weights_over_ranks_add_up_after_the_host_averages",),
    ),
    Mutation(
        21,
        "divided by the accumulation steps a second time",
        "pyoffline/trainer.py",
        (
            ("accepts_loss_kwargs = True\n", "accepts_loss_kwargs = False\n"),
            ("    loss_is_scaled_for_ga = True\n", "    loss_is_scaled_for_ga = False\n"),
        ),
        (TRAINER + "test_loss_and_gradients_equal_a_plain_loop[nll-2-padded]",),
    ),
    Mutation(
        22,
        "all_reduce without autograd",
        not_run="vocab-parallel: not built (no collective lies inside a differentiated path)",
    ),
    Mutation(
        23,
        "label smoothing's mean over a shard of V",
        "csrc/cpu/score.cpp",
        (
            (
                "stats = finish_stats(fold.total(), args.vocab, plan.sum_u);",
                "stats = finish_stats(fold.total(), std::min(args.vocab, kLogitsPanel), "
                "plan.sum_u);",
            ),
        ),
        (
            SCORE
            + "test_every_output_equals_the_row_pass_at_every_border_of_a_panel[mkl-float32-4097]",
        ),
        note="panels of V stand in for the shards of a vocabulary",
    ),
    Mutation(
        24,
        "a part of the softmax sum is counted more than once",
        "csrc/cpu/row_fold.h",
        (("      empty_ = false;\n      return;\n", "      empty_ = false;\n"),),
        (
            SCORE
            + "test_every_output_equals_the_row_pass_at_every_border_of_a_panel[mkl-float32-37]",
        ),
        note="panels of V stand in for the shards of a vocabulary",
    ),
    Mutation(
        25,
        "launch on the current device instead of the tensor's",
        not_run="gpu: kernels that are launched, and two devices",
    ),
    Mutation(
        26,
        "a weight gradient only if hidden needs one",
        "pyoffline/flatten.py",
        (
            (
                "    if torch.is_grad_enabled():\n        needs = ",
                "    if torch.is_grad_enabled() and flat.requires_grad:\n        needs = ",
            ),
        ),
        (AUTOGRAD + "test_a1_gradients_exactly_where_asked_for_every_subset",),
    ),
    Mutation(
        27,
        "a second backward scales in place",
        "pyoffline/autograd.py",
        (
            (
                "    formed = ctx.grads\n    ctx.grads = None\n    if formed is None:\n"
                "        with torch.no_grad():\n            formed = ops.linear_policy(",
                "    formed = ctx.grads\n    if formed is None:\n"
                "        with torch.no_grad():\n            formed = ops.linear_policy(",
            ),
            (
                "grad.mul_(factor) if sys.getrefcount(grad) <= PRIVATE else grad * factor",
                "grad.mul_(factor)",
            ),
        ),
        (AUTOGRAD + "test_a2_the_first_gradient_is_not_written_by_the_second_backward",),
    ),
    Mutation(
        28,
        "a checkpoint is written in place",
        "pyoffline/run_folder.py",
        (
            (
                '    files = sorted(p for p in partial.rglob("*") if p.is_file())\n',
                "    _remove(final)\n"
                '    files = sorted(p for p in partial.rglob("*") if p.is_file())\n',
            ),
        ),
        (CHECKPOINT + "test_t2_kill_9_at_every_write_leaves_the_newest_complete_one",),
        note="the former folder goes before the new one is complete",
    ),
    Mutation(
        29,
        "an exception while random numbers are restored is swallowed",
        "pyoffline/checkpoint.py",
        (
            (
                "            load_rng(Path(checkpoint_dir), self.args.process_index)\n",
                "            try:\n"
                "                load_rng(Path(checkpoint_dir), self.args.process_index)\n"
                "            except Exception:\n"
                "                pass\n",
            ),
        ),
        (FILES + "test_t2_a_run_does_not_resume_without_its_random_numbers",),
    ),
    Mutation(
        30,
        "the bias gradient lacks one chunk",
        "pyoffline/chunk_loop.py",
        (
            (
                "        if self.dbias is not None:\n            k.column_sum(",
                "        if self.dbias is not None and not last:\n            k.column_sum(",
            ),
        ),
        (NUMBERS + "test_N1_shapes_and_seeds[200-32-33-1-float32-cpu]",),
    ),
)
