// row_pass as Python calls it: reads 25 keyword arguments, checks all of them, then runs without
// the GIL.
//
// Nothing is written before everything is checked, labels included. The labels are checked in a
// copy and the kernel reads that copy, so that another thread that changes them meanwhile cannot
// send an index past the row.
#include "bindings.h"
#include "cpu/dispatch.h"
#include "row_call.h"

namespace pyoffline {

namespace {

// Copies the labels; a bad one at a row that is never read becomes ignore_index, any other is an
// IndexError.
void check_labels(RowCall& row, const int64_t* labels) {
  RowArgs& args = row.args;
  if (args.rows) row.labels.assign(labels, labels + args.rows);
  for (int64_t i = 0; i < args.rows; ++i) {
    const int64_t label = row.labels[i];
    if (label == args.ignore_index || (label >= 0 && label < args.vocab)) continue;
    if (args.weights && args.weights[i] == 0.0f) {
      row.labels[i] = args.ignore_index;
      continue;
    }
    throw py::index_error("row_pass: labels: expected a value in [0, " +
                          std::to_string(args.vocab) + ") or ignore_index " +
                          std::to_string(args.ignore_index) + ", got " + std::to_string(label) +
                          " at row " + std::to_string(i) + "; nothing was written");
  }
  args.labels = row.labels.data();
}

void row_pass_py(py::object logits, py::object labels, py::kwargs kwargs) {
  RowCall row(CallArgs("row_pass"));
  Keywords keywords(row.call, std::move(kwargs));
  row.args.threads = static_cast<int32_t>(keywords.integer("threads", 1, 1, 1024));
  read_row_call(row, logits, keywords);
  const TensorArg label_arg = row.call.input(labels, "labels", kI64, {row.args.rows});
  keywords.check_all_read();
  row.call.check_overlaps();
  check_labels(row, static_cast<const int64_t*>(label_arg.data));
  if (row.args.rows == 0) return;
  py::gil_scoped_release release;
  row_pass(row.args);
}

constexpr const char* kRowPassDoc =
    R"(row_pass(logits, labels, *, dlogits=None, bias=None, class_weight=None, temperature=None,
softcap=0.0, logit_scale=1.0, uniform_temperature=1.0, ignore_index=-100, grad_scale=1.0, weights=None,
old=None, mu=None, ref=None, adv=None, extras=(), codes=(), hyper=None, coefs=None, loss=None, logps=None,
entropy=None, lse=None, gap=None, log_sum_p2=None, is_top1=None, coefs_out=None, threads=1)

Softmax statistics, objective and gradient of each row of logits [C, V]; docs/internals.md has the contract.)";

}  // namespace

void bind_row_pass(py::module_& module) {
  module.def("row_pass", row_pass_py, kRowPassDoc);
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
