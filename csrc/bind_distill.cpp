// distill_row_pass as Python calls it: row_pass's arguments, the teacher's, and the divergences.
//
// As in bind_row_pass.cpp nothing is written before everything is checked, and what becomes an
// address (labels, top-k ids) is checked in a copy that the kernel reads.
#include <cmath>
#include <vector>

#include "bindings.h"
#include "cpu/dispatch.h"
#include "distill_args.h"
#include "row_call.h"

namespace pyoffline {

namespace {

struct DistillCall {
  RowCall row{"distill_row_pass"};
  DistillArgs args{};
  std::vector<int64_t> ids;
  std::vector<DivergenceTerm> divergences;
};

void read_teacher(DistillCall& distill, Keywords& keywords) {
  CallArgs& call = distill.row.call;
  const RowArgs& student = distill.row.args;
  RowArgs& teacher = distill.args.teacher;
  const TensorArg in =
      call.maybe_input(keywords.get("teacher"), "teacher", kLogits, {student.rows, student.vocab});
  teacher.logits = in.data;
  teacher.logits_type = in.dtype();
  teacher.logits_stride = in.stride[0];
  teacher.rows = student.rows;
  teacher.vocab = student.vocab;
  teacher.bias = static_cast<float*>(
      call.maybe_input(keywords.get("teacher_bias"), "teacher_bias", kF32, {student.vocab}).data);
  teacher.softcap = keywords.number("teacher_softcap", 0.0);
  teacher.logit_scale = keywords.number("teacher_logit_scale", 1.0);
  teacher.uniform_temperature = keywords.number("teacher_temperature", 1.0);
  if (!(teacher.softcap >= 0) || std::isinf(teacher.softcap))
    call.fail("teacher_softcap", "a finite float of at least 0", std::to_string(teacher.softcap),
              "0 means no softcap");
  if (!(teacher.uniform_temperature > 0) || std::isinf(teacher.uniform_temperature))
    call.fail("teacher_temperature", "a finite float above 0",
              std::to_string(teacher.uniform_temperature), "1 means no temperature");
}

const float* dense_rows(const CallArgs& call, const TensorArg& arg) {
  if (arg && arg.stride[0] != arg.shape[1] && arg.shape[0] > 1 && arg.numel() != 0)
    call.fail(arg.name, "contiguous memory", "strides " + shape_text(arg.stride, 2),
              "call .contiguous()");
  return static_cast<float*>(arg.data);
}

// Returns the ids as they were given; copy_ids checks them.
const int64_t* read_top_k(DistillCall& distill, Keywords& keywords) {
  CallArgs& call = distill.row.call;
  const int64_t rows = distill.row.args.rows, vocab = distill.row.args.vocab;
  const TensorArg ids = call.maybe_input(keywords.get("topk_ids"), "topk_ids", kI64, {rows, kAny});
  const py::object logps = keywords.get("topk_logps"), tail = keywords.get("topk_tail");
  const bool whole = distill.args.teacher.logits != nullptr;
  if (whole == ids.given)
    call.fail("teacher", "either teacher or topk_ids", whole ? "both" : "neither",
              "pass the teacher's logits or its largest log-probs");
  if (!ids) {
    if (!logps.is_none() || !tail.is_none())
      call.fail("topk_ids", "a tensor beside topk_logps and topk_tail", "None", "pass all three");
    return nullptr;
  }
  const int64_t k = ids.shape[1];
  if (k < 1 || k > vocab)
    call.fail("topk_ids", "1 to " + std::to_string(vocab) + " columns", std::to_string(k),
              "k is at most the vocabulary");
  dense_rows(call, ids);
  distill.args.k = k;
  distill.args.topk_logps = dense_rows(call, call.input(logps, "topk_logps", kF32, {rows, k}));
  distill.args.topk_tail = static_cast<float*>(call.input(tail, "topk_tail", kF32, {rows}).data);
  return static_cast<int64_t*>(ids.data);
}

void read_divergences(DistillCall& distill, Keywords& keywords) {
  const CallArgs& call = distill.row.call;
  const py::tuple terms = tuple_arg(call, keywords.get("divergences"), "divergences");
  const int64_t count = static_cast<int64_t>(terms.size() / 2);
  if (terms.size() % 2 != 0 || count < 1 || count > kMaxDivergences)
    call.fail("divergences", "1 to " + std::to_string(kMaxDivergences) + " pairs of (code, gate)",
              std::to_string(terms.size()) + " ints", "pass a flat list of 2 K ints");
  const TensorArg hyper = distill.row.call.input(keywords.get("divergence_hyper"),
                                                 "divergence_hyper", kF64, {count, 2});
  for (int64_t j = 0; j < count; ++j) {
    auto part = [&](int64_t i, int64_t low, int64_t high) {
      const std::string name = "divergences[" + std::to_string(2 * j + i) + "]";
      return static_cast<int32_t>(int_arg(call, terms[2 * j + i], name, low, high));
    };
    DivergenceTerm term{};
    term.code = part(0, forward_kl_code, alpha_divergence_code);
    term.gate = part(1, -1, distill.row.args.n_extras - 1);
    const double* values = static_cast<const double*>(hyper.data) + j * hyper.stride[0];
    term.scale = static_cast<float>(values[0]);
    term.param = values[1];
    distill.divergences.push_back(term);
  }
  distill.args.divergences = distill.divergences.data();
  distill.args.n_divergences = static_cast<int32_t>(count);
}

void read_distill_outputs(DistillCall& distill, Keywords& keywords) {
  CallArgs& call = distill.row.call;
  const int64_t rows = distill.row.args.rows;
  const TensorArg values =
      call.output(keywords.get("values"), "values", kF32, {distill.args.n_divergences, rows});
  if (values.stride[0] != rows && values.shape[0] > 1 && rows > 0)
    call.fail("values", "contiguous memory", "strides " + shape_text(values.stride, 2),
              "allocate the output with torch.empty");
  distill.args.values = static_cast<float*>(values.data);
  distill.args.teacher_entropy = static_cast<float*>(
      call.output(keywords.get("teacher_entropy"), "teacher_entropy", kF32, {rows}).data);
  distill.args.top1_agreement = static_cast<uint8_t*>(
      call.output(keywords.get("top1_agreement"), "top1_agreement", kByte, {rows}).data);
}

// Rows that are never read may hold anything.
void copy_ids(DistillCall& distill, const int64_t* given) {
  const RowArgs& args = distill.row.args;
  const int64_t k = distill.args.k;
  if (!given || !args.rows) return;
  distill.ids.assign(given, given + args.rows * k);
  for (int64_t i = 0; i < args.rows; ++i) {
    if (args.labels[i] == args.ignore_index || (args.weights && args.weights[i] == 0.0f)) continue;
    int64_t before = -1;
    for (int64_t j = 0; j < k; ++j) {
      const int64_t id = distill.ids[i * k + j];
      if (id <= before || id >= args.vocab)
        throw py::index_error("distill_row_pass: topk_ids: expected ascending values in [0, " +
                              std::to_string(args.vocab) + "), got " + std::to_string(id) +
                              " after " + std::to_string(before) + " at row " + std::to_string(i) +
                              "; nothing was written");
      before = id;
    }
  }
  distill.args.topk_ids = distill.ids.data();
}

void distill_row_pass_py(py::object logits, py::object labels, py::kwargs kwargs) {
  DistillCall distill;
  RowCall& row = distill.row;
  Keywords keywords(row.call, std::move(kwargs));
  const TensorArg label_arg = read_stored_rows(row, keywords, logits, labels);
  read_row_arguments(row, keywords);
  if (row.args.class_weight)
    row.call.fail("class_weight", "None", "a tensor", "divergences know no class weights");
  read_teacher(distill, keywords);
  const int64_t* ids = read_top_k(distill, keywords);
  read_divergences(distill, keywords);
  read_distill_outputs(distill, keywords);
  keywords.check_all_read();
  row.call.check_overlaps();
  check_labels(row, static_cast<const int64_t*>(label_arg.data));
  copy_ids(distill, ids);
  if (row.args.rows == 0) return;
  distill.args.row = row.args;
  RowArgs& teacher = distill.args.teacher;
  teacher.labels = row.args.labels;
  teacher.weights = row.args.weights;
  teacher.ignore_index = row.args.ignore_index;
  py::gil_scoped_release release;
  distill_row_pass(distill.args);
}

constexpr const char* kDistillDoc =
    R"(distill_row_pass(logits, labels, *, divergences, divergence_hyper, values, teacher_entropy,
top1_agreement, teacher=None, teacher_bias=None, teacher_softcap=0.0, teacher_logit_scale=1.0,
teacher_temperature=1.0, topk_ids=None, topk_logps=None, topk_tail=None, <the keywords of row_pass>)

row_pass with divergences from a teacher's row added to loss and dlogits; docs/distill.md has the contract.)";

}  // namespace

void bind_distill(py::module_& module) {
  module.def("distill_row_pass", distill_row_pass_py, kDistillDoc);
  module.def(
      "divergence_codes",
      [] {
        py::dict codes;
        codes["forward_kl"] = int(forward_kl_code);
        codes["reverse_kl"] = int(reverse_kl_code);
        codes["jsd"] = int(jsd_code);
        codes["tvd"] = int(tvd_code);
        codes["renyi_divergence"] = int(renyi_divergence_code);
        codes["alpha_divergence"] = int(alpha_divergence_code);
        return codes;
      },
      "name -> code of every divergence that the distillation row pass knows.");
}

}  // namespace pyoffline
