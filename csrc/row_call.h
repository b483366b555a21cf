// The arguments of one row pass, read from Python keywords and checked: shared by the CPU and the
// CUDA binding. Labels' values are not looked at here, and nothing is written.
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
  CallArgs call;
  RowArgs args{};
  std::vector<int64_t> labels;
  std::vector<const float*> extras;
  std::vector<Term> terms;
};

// Everything but labels, threads and what only one backend knows.
void read_row_call(RowCall& row, py::handle logits, Keywords& keywords);

// name -> code of every objective function that the row pass knows.
const std::vector<std::pair<std::string, int>>& row_codes();

}  // namespace pyoffline
