// Readers of the row pass's keyword arguments; see row_call.h.
#include "row_call.h"

#include <cmath>
#include <map>

#include "cpu/dispatch.h"

namespace pyoffline {

namespace {

// Row inputs that a term dereferences; `adv` is optional everywhere (missing means 1).
enum Need : unsigned { kOld = 1, kMu = 2, kRef = 4, kAnchor = 8 };

const std::map<std::string, unsigned>& needs_table() {
  static const std::map<std::string, unsigned> table = {
      {"nll", 0},
      {"weighted_nll", 0},
      {"dft", 0},
      {"prob_power", 0},
      {"luffy", 0},
      {"importance_weighted_sft", kRef},
      {"proximal_sft", kOld},
      {"importance_sampling", kMu},
      {"power_is", kMu},
      {"truncated_is", kMu},
      {"ppo_clip", kOld},
      {"decoupled_ppo", kOld | kMu},
      {"cispo", kOld},
      {"sapo", kOld},
      {"dppo_tv", kOld},
      {"dppo_kl", kOld},
      {"dro", kOld},
      {"asym_re", 0},
      {"topr_token", kMu},
      {"distill_token", kRef},
      {"distill_token_is", kMu | kRef},
      {"kl_k1", kAnchor},
      {"kl_k2", kAnchor},
      {"kl_k3", kAnchor},
      {"kl_k3_is", kOld | kAnchor},
      {"entropy_term", 0},
      {"z_loss", 0},
      {"smoothing", 0},
  };
  return table;
}

const float* read_floats(RowCall& row, Keywords& keywords, const char* name, int64_t count) {
  return static_cast<float*>(row.call.maybe_input(keywords.get(name), name, kF32, {count}).data);
}

float* write_floats(RowCall& row, Keywords& keywords, const char* name) {
  return static_cast<float*>(
      row.call.maybe_output(keywords.get(name), name, kF32, {row.args.rows}).data);
}

void read_logits(RowCall& row, py::handle logits, Keywords& keywords) {
  RowArgs& args = row.args;
  const TensorArg in = row.call.input(logits, "logits", kLogits, {kAny, kAny});
  args.logits = in.data;
  args.logits_type = in.dtype();
  args.logits_stride = in.stride[0];
  args.rows = in.shape[0];
  args.vocab = in.shape[1];
  if (args.vocab < 1)
    row.call.fail("logits", "at least one column", shape_text(in.shape, 2), "V must be positive");
  const TensorArg out =
      row.call.maybe_output(keywords.get("dlogits"), "dlogits", kLogits, {args.rows, args.vocab});
  row.call.allow_in_place("dlogits", "logits");
  args.dlogits = out.data;
  args.dlogits_type = out.dtype();
  args.dlogits_stride = out.stride[0];
}

void read_head(RowCall& row, Keywords& keywords) {
  RowArgs& args = row.args;
  args.bias = read_floats(row, keywords, "bias", args.vocab);
  args.class_weight = read_floats(row, keywords, "class_weight", args.vocab);
  args.temperature = read_floats(row, keywords, "temperature", args.rows);
  args.softcap = keywords.number("softcap", 0.0);
  args.logit_scale = keywords.number("logit_scale", 1.0);
  args.uniform_temperature = keywords.number("uniform_temperature", 1.0);
  args.grad_scale = keywords.number("grad_scale", 1.0);
  if (!(args.softcap >= 0) || std::isinf(args.softcap))
    row.call.fail("softcap", "a finite float of at least 0", std::to_string(args.softcap),
                  "0 means no softcap");
  if (!(args.uniform_temperature > 0) || std::isinf(args.uniform_temperature))
    row.call.fail("uniform_temperature", "a finite float above 0",
                  std::to_string(args.uniform_temperature), "1 means no temperature");
}

void read_inputs(RowCall& row, Keywords& keywords) {
  RowArgs& args = row.args;
  args.weights = read_floats(row, keywords, "weights", args.rows);
  args.old = read_floats(row, keywords, "old", args.rows);
  args.mu = read_floats(row, keywords, "mu", args.rows);
  args.ref = read_floats(row, keywords, "ref", args.rows);
  args.adv = read_floats(row, keywords, "adv", args.rows);
  const py::tuple extras = tuple_arg(row.call, keywords.get("extras"), "extras");
  for (size_t i = 0; i < extras.size(); ++i) {
    const std::string name = "extras[" + std::to_string(i) + "]";
    row.extras.push_back(
        static_cast<float*>(row.call.input(extras[i], name, kF32, {args.rows}).data));
  }
  args.extras = row.extras.data();
  args.n_extras = static_cast<int32_t>(row.extras.size());
  const TensorArg coefs =
      row.call.maybe_input(keywords.get("coefs"), "coefs", kF32, {4, args.rows});
  if (coefs && coefs.stride[0] != args.rows && args.rows > 0)
    row.call.fail("coefs", "contiguous memory", "strides " + shape_text(coefs.stride, 2),
                  "call .contiguous()");
  args.coefs = static_cast<float*>(coefs.data);
}

void read_outputs(RowCall& row, Keywords& keywords) {
  RowArgs& args = row.args;
  args.loss = write_floats(row, keywords, "loss");
  args.logps = write_floats(row, keywords, "logps");
  args.entropy = write_floats(row, keywords, "entropy");
  args.lse = write_floats(row, keywords, "lse");
  args.gap = write_floats(row, keywords, "gap");
  args.log_sum_p2 = write_floats(row, keywords, "log_sum_p2");
  args.is_top1 = static_cast<uint8_t*>(
      row.call.maybe_output(keywords.get("is_top1"), "is_top1", kByte, {args.rows}).data);
  const TensorArg coefs =
      row.call.maybe_output(keywords.get("coefs_out"), "coefs_out", kF32, {4, args.rows});
  if (coefs && coefs.stride[0] != args.rows && args.rows > 0)
    row.call.fail("coefs_out", "contiguous memory", "strides " + shape_text(coefs.stride, 2),
                  "allocate the output with torch.empty");
  args.coefs_out = static_cast<float*>(coefs.data);
}

// Throws unless the rows that the code reads are there.
void check_needs(const RowCall& row, const Term& term, const std::string& code_name) {
  const auto entry = needs_table().find(code_name);
  if (entry == needs_table().end())
    throw std::logic_error("row_pass: objective '" + code_name + "' has no row in needs_table");
  const RowArgs& args = row.args;
  const float* anchors[] = {nullptr, args.ref, args.old, args.mu};
  const char* anchor_names[] = {"an anchor (1 ref, 2 old, 3 mu)", "ref", "old", "mu"};
  auto demand = [&](bool wanted, const float* data, const char* name) {
    if (wanted && !data)
      row.call.fail(name, "a tensor, because " + code_name + " reads it", "None",
                    "pass it or change the objective");
  };
  const unsigned needs = entry->second;
  demand(needs & kOld, args.old, "old");
  demand(needs & kMu, args.mu, "mu");
  demand(needs & kRef, args.ref, "ref");
  demand((needs & kAnchor) || term.anchor, anchors[term.anchor], anchor_names[term.anchor]);
}

void read_terms(RowCall& row, Keywords& keywords) {
  RowArgs& args = row.args;
  const CallArgs& call = row.call;
  const py::tuple codes = tuple_arg(call, keywords.get("codes"), "codes");
  if (codes.size() % 3 != 0)
    call.fail("codes", "triples of (code, gate, anchor)", std::to_string(codes.size()) + " ints",
              "pass a flat list of 3 K ints");
  const int64_t count = static_cast<int64_t>(codes.size() / 3);
  const py::object hyper_object = keywords.get("hyper");
  if (count > 0 && args.coefs)
    call.fail("coefs", "None beside codes", "a tensor", "pass either codes or coefs");
  const CallArgs::HostScope on_the_host(row.call);
  const TensorArg hyper = count > 0 ? row.call.input(hyper_object, "hyper", kF64, {count, 8})
                                    : row.call.maybe_input(hyper_object, "hyper", kF64, {kAny, 8});
  std::map<int64_t, std::string> names;
  for (const auto& [name, code] : row_codes()) names[code] = name;
  for (int64_t k = 0; k < count; ++k) {
    auto part = [&](int64_t i, int64_t low, int64_t high) {
      const std::string name = "codes[" + std::to_string(3 * k + i) + "]";
      return static_cast<int32_t>(int_arg(call, codes[3 * k + i], name, low, high));
    };
    Term term{};
    term.code = part(0, INT32_MIN, INT32_MAX);
    term.gate = part(1, -1, args.n_extras - 1);
    term.anchor = part(2, 0, 3);
    if (!names.count(term.code))
      call.fail("codes", "a code of codes()", std::to_string(term.code), "see _C.codes()");
    const double* values = static_cast<const double*>(hyper.data) + k * hyper.stride[0];
    term.scale = static_cast<float>(values[0]);
    for (int i = 0; i < 6; ++i) term.params[i] = static_cast<float>(values[1 + i]);
    check_needs(row, term, names[term.code]);
    row.terms.push_back(term);
  }
  args.terms = row.terms.data();
  args.n_terms = static_cast<int32_t>(row.terms.size());
  if (args.dlogits && !count && !args.coefs)
    call.fail("codes", "an objective, because dlogits is given", "none", "pass codes or coefs");
}

}  // namespace

const std::vector<std::pair<std::string, int>>& row_codes() { return objective_codes(); }

py::tuple tuple_arg(const CallArgs& call, py::handle object, const std::string& name) {
  if (object.is_none()) return py::tuple();
  if (!PyList_Check(object.ptr()) && !PyTuple_Check(object.ptr()))
    call.fail_type(name, "a list or tuple", object, "pass list(x)");
  PyObject* tuple = PySequence_Tuple(object.ptr());
  if (!tuple) throw py::error_already_set();  // a subclass whose __iter__ raises
  return py::reinterpret_steal<py::tuple>(tuple);
}

void check_labels(RowCall& row, const int64_t* labels) {
  RowArgs& args = row.args;
  const CallArgs& call = row.call;
  if (args.rows) row.labels.assign(labels, labels + args.rows);
  for (int64_t i = 0; i < args.rows; ++i) {
    const int64_t label = row.labels[i];
    if (label == args.ignore_index || (label >= 0 && label < args.vocab)) continue;
    if (args.weights && args.weights[i] == 0.0f) {
      row.labels[i] = args.ignore_index;
      continue;
    }
    throw py::index_error(call.function() + ": labels: expected a value in [0, " +
                          std::to_string(args.vocab) + ") or ignore_index " +
                          std::to_string(args.ignore_index) + ", got " + std::to_string(label) +
                          " at row " + std::to_string(i) + "; nothing was written");
  }
  args.labels = row.labels.data();
}

void read_row_arguments(RowCall& row, Keywords& keywords) {
  read_head(row, keywords);
  read_inputs(row, keywords);
  read_outputs(row, keywords);
  read_terms(row, keywords);
}

TensorArg read_stored_rows(RowCall& row, Keywords& keywords, py::handle logits, py::handle labels) {
  row.args.ignore_index = keywords.integer("ignore_index", -100, INT64_MIN, INT64_MAX);
  row.args.threads = static_cast<int32_t>(keywords.integer("threads", 1, 1, 1024));
  read_logits(row, logits, keywords);
  return row.call.input(labels, "labels", kI64, {row.args.rows});
}

void read_row_call(RowCall& row, py::handle logits, Keywords& keywords) {
  row.args.ignore_index = keywords.integer("ignore_index", -100, INT64_MIN, INT64_MAX);
  read_logits(row, logits, keywords);
  read_row_arguments(row, keywords);
}

}  // namespace pyoffline
