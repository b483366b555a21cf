// row_pass and score_rows as Python calls them: read the keyword arguments, check all of them, then
// run without the GIL. Nothing is written before everything is checked, labels included.
#include "bindings.h"
#include "cpu/dispatch.h"
#include "cpu/score.h"
#include "row_call.h"

namespace pyoffline {

namespace {

// What both entry points of this file read by name, in the order in which errors are found.
void read_rows(RowCall& row, Keywords& keywords, const TensorArg& labels) {
  read_row_arguments(row, keywords);
  keywords.check_all_read();
  row.call.check_overlaps();
  check_labels(row, static_cast<const int64_t*>(labels.data));
}

void row_pass_py(py::object logits, py::object labels, py::kwargs kwargs) {
  RowCall row("row_pass");
  Keywords keywords(row.call, std::move(kwargs));
  read_rows(row, keywords, read_stored_rows(row, keywords, logits, labels));
  if (row.args.rows == 0) return;
  py::gil_scoped_release release;
  row_pass(row.args);
}

DType dtype_arg(const RowCall& row, Keywords& keywords) {
  const std::string name = py::str(keywords.get("logits_dtype"));
  if (name == "float32") return DType::f32;
  if (name == "bfloat16") return DType::bf16;
  if (name == "float16") return DType::f16;
  row.call.fail("logits_dtype", "'float32', 'bfloat16' or 'float16'", name,
                "it is what a logit is rounded to");
}

void score_rows_py(py::object hidden, py::object weight, py::object labels, py::kwargs kwargs) {
  RowCall row("score_rows");
  Keywords keywords(row.call, std::move(kwargs));
  RowArgs& args = row.args;
  args.ignore_index = keywords.integer("ignore_index", -100, INT64_MIN, INT64_MAX);
  args.threads = static_cast<int32_t>(keywords.integer("threads", 1, 1, 1024));
  const int64_t block_rows = keywords.integer("block_rows", 4096, 1, INT32_MAX);
  args.logits_type = dtype_arg(row, keywords);
  const TensorArg x = row.call.input(hidden, "hidden", kLogits, {kAny, kAny}, true);
  const TensorArg w = row.call.input(weight, "weight", x.kind, {kAny, x.shape[1]}, true);
  args.rows = x.shape[0];
  args.vocab = w.shape[0];
  if (args.vocab < 1)
    row.call.fail("weight", "at least one row", shape_text(w.shape, 2), "V must be positive");
  const TensorArg label_arg = row.call.input(labels, "labels", kI64, {args.rows});
  read_rows(row, keywords, label_arg);
  if (args.coefs) row.call.fail("coefs", "None", "a tensor", "no gradient is formed here");
  if (args.rows == 0) return;
  py::gil_scoped_release release;
  score_rows(matrix(x), matrix(w), args, block_rows);
}

constexpr const char* kRowPassDoc =
    R"(row_pass(logits, labels, *, dlogits=None, bias=None, class_weight=None, temperature=None,
softcap=0.0, logit_scale=1.0, uniform_temperature=1.0, ignore_index=-100, grad_scale=1.0, weights=None,
old=None, mu=None, ref=None, adv=None, extras=(), codes=(), hyper=None, coefs=None, loss=None, logps=None,
entropy=None, lse=None, gap=None, log_sum_p2=None, is_top1=None, coefs_out=None, threads=1)

Softmax statistics, objective and gradient of each row of logits [C, V]; docs/internals.md has the contract.)";

constexpr const char* kScoreRowsDoc =
    R"(score_rows(hidden, weight, labels, *, logits_dtype, block_rows=4096, ...)

row_pass without gradient on hidden [N, D] @ weight [V, D].T, each logit rounded to logits_dtype and none of
them stored: the same keywords but dlogits and coefs. At most block_rows rows are multiplied at a time.)";

}  // namespace

void bind_row_pass(py::module_& module) {
  module.def("row_pass", row_pass_py, kRowPassDoc);
  module.def("score_rows", score_rows_py, kScoreRowsDoc);
  module.def(
      "codes",
      [] {
        py::dict codes;
        for (const auto& [name, code] : row_codes()) codes[py::str(name)] = code;
        return codes;
      },
      "name -> code of every objective function that the row pass knows.");
}

}  // namespace pyoffline
