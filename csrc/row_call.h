// The arguments of one row pass, read from Python keywords and checked: shared by row_pass,
// score_rows, distill_row_pass and the CUDA binding. Nothing is written here. Not here: the checks
// of one tensor (tensor_arg.h).
#pragma once

#include <set>
#include <string>
#include <vector>

#include "tensor_arg.h"

namespace pyoffline {

// Keyword arguments by name; what nobody asked for is an error that names it.
class Keywords {
 public:
  Keywords(const CallArgs& call, py::kwargs kwargs) : call_(call), kwargs_(std::move(kwargs)) {}
  py::object get(const char* name) {
    asked_.insert(name);
    return kwargs_.contains(name) ? py::object(kwargs_[name]) : py::none();
  }
  float number(const char* name, double fallback) {
    py::object value = get(name);
    return static_cast<float>(value.is_none() ? fallback : float_arg(call_, value, name));
  }
  int64_t integer(const char* name, int64_t fallback, int64_t low, int64_t high) {
    py::object value = get(name);
    return value.is_none() ? fallback : int_arg(call_, value, name, low, high);
  }
  void check_all_read() const {
    for (const auto& item : kwargs_) {
      const std::string name = py::str(item.first);
      if (!asked_.count(name))
        throw py::type_error(call_.function() + ": unknown argument '" + name + "'; see help(" +
                             call_.function() + ")");
    }
  }

 private:
  const CallArgs& call_;
  py::kwargs kwargs_;
  std::set<std::string> asked_;
};

// What RowArgs points into: kept for the length of the call.
struct RowCall {
  explicit RowCall(CallArgs arguments) : call(std::move(arguments)) {}
  explicit RowCall(const char* function) : call(function) {}
  CallArgs call;
  RowArgs args{};
  std::vector<int64_t> labels;
  std::vector<const float*> extras;
  std::vector<Term> terms;
};

// logits, dlogits, labels (as given), ignore_index, threads.
TensorArg read_stored_rows(RowCall& row, Keywords& keywords, py::handle logits, py::handle labels);

// The head, the row inputs and outputs, and the program, in the order in which errors are found.
void read_row_arguments(RowCall& row, Keywords& keywords);

// Copies the labels. A bad one becomes ignore_index at a row that is never read; elsewhere it is an
// IndexError that names row and value.
void check_labels(RowCall& row, const int64_t* labels);

// Only a list or tuple: iterating over an array would read whatever its strides say.
py::tuple tuple_arg(const CallArgs& call, py::handle object, const std::string& name);

// Everything but labels, threads and what only one backend knows.
void read_row_call(RowCall& row, py::handle logits, Keywords& keywords);

// name -> code of every objective function that the row pass knows.
const std::vector<std::pair<std::string, int>>& row_codes();

}  // namespace pyoffline
