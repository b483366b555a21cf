// The three GEMMs as Python calls them; gemm.h has what they compute.
#include "bindings.h"
#include "cpu/gemm.h"
#include "cpu/panel.h"
#include "cpu/tile_gemm.h"
#include "cpu/tile_pack.h"

namespace pyoffline {

namespace {

void gemm_logits_py(py::object hidden, py::object weight, py::object out, py::object threads) {
  CallArgs call("gemm_logits");
  const TensorArg x = call.input(hidden, "hidden", kLogits, {kAny, kAny}, true);
  const TensorArg w = call.input(weight, "weight", x.kind, {kAny, x.shape[1]}, true);
  const TensorArg y = call.output(out, "out", kLogits, {x.shape[0], w.shape[0]});
  const int count = threads_arg(call, threads);
  call.check_overlaps();
  py::gil_scoped_release release;
  gemm_logits(matrix(x), matrix(w), matrix(y), count);
}

void gemm_dhidden_py(py::object dlogits, py::object weight, py::object out, py::object threads,
                     py::object kept, py::object is_filled) {
  CallArgs call("gemm_dhidden");
  const TensorArg dz = call.input(dlogits, "dlogits", kLogits, {kAny, kAny}, true);
  const TensorArg w = call.input(weight, "weight", dz.kind, {dz.shape[1], kAny}, true);
  const TensorArg dx = call.output(out, "out", kF32, {dz.shape[0], w.shape[1]});
  const TensorArg room = call.maybe_output(kept, "kept", dz.kind, {kAny});
  const bool filled = bool_arg(call, is_filled, "kept_is_filled");
  const int count = threads_arg(call, threads);
  call.check_overlaps();
  const PackedB packed = {static_cast<uint16_t*>(room.data), room ? room.numel() : 0, filled};
  py::gil_scoped_release release;
  gemm_dhidden(matrix(dz), matrix(w), matrix(dx), count, packed);
}

void gemm_dweight_py(py::object dlogits, py::object hidden, py::object acc, py::object beta,
                     py::object out, py::object out_scale, py::object threads) {
  CallArgs call("gemm_dweight");
  const TensorArg dz = call.input(dlogits, "dlogits", kLogits, {kAny, kAny}, true);
  const TensorArg x = call.input(hidden, "hidden", dz.kind, {dz.shape[0], kAny}, true);
  const TensorArg sums = call.maybe_output(acc, "acc", kF32, {dz.shape[1], x.shape[1]});
  const TensorArg y = call.maybe_output(out, "out", kLogits, {dz.shape[1], x.shape[1]});
  const float factor = static_cast<float>(float_arg(call, beta, "beta"));
  const float scale = static_cast<float>(float_arg(call, out_scale, "out_scale"));
  const int count = threads_arg(call, threads);
  if (!sums && !y) call.fail("acc", "acc or out", "None for both", "pass at least one of them");
  if (!sums && factor != 0)
    call.fail("beta", "0, because acc is None", std::to_string(factor), "pass acc or beta=0.0");
  call.check_overlaps();
  const DWeight dweight = {matrix(sums), factor, matrix(y), scale};
  py::gil_scoped_release release;
  gemm_dweight(matrix(dz), matrix(x), dweight, count);
}

// Whose CPU it is: MKL's packing buffers differ.
const char* cpu_maker() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_is("intel")) return "intel";
  if (__builtin_cpu_is("amd")) return "amd";
#endif
  return "other";
}

py::dict gemm_info_py() {
  const GemmInfo info = gemm_info();
  py::dict dict;
  dict["bf16"] = info.bf16;
  dict["fp16"] = info.f16;
  dict["fp32"] = info.f32;
  dict["tiles"] = info.tiles;
  dict["cpu"] = cpu_maker();
  dict["library"] = info.library;
  dict["missing"] = info.missing;
  dict["panels"] =
      py::dict(py::arg("logits") = kLogitsPanel, py::arg("dhidden") = kDHiddenPanel,
               py::arg("dweight") = kDWeightPanel, py::arg("tile_dhidden") = kTileDHiddenPanel,
               py::arg("turned_rows") = kTurnedRows);
  return dict;
}

}  // namespace

void bind_gemm(py::module_& module) {
  module.def("gemm_logits", gemm_logits_py, py::arg("hidden"), py::arg("weight"), py::arg("out"),
             py::kw_only(), py::arg("threads") = 1,
             "out[C,V] = hidden[C,D] @ weight[V,D].T, fp32 accumulation, one rounding.");
  module.def(
      "gemm_dhidden", gemm_dhidden_py, py::arg("dlogits"), py::arg("weight"), py::arg("out"),
      py::kw_only(), py::arg("threads") = 1, py::arg("kept") = py::none(),
      py::arg("kept_is_filled") = false,
      "out[C,D] float32 = dlogits[C,V] @ weight[V,D]. kept: memory in which the weight stays "
      "packed; kept_is_filled: by an earlier call with this weight.");
  module.def("gemm_dweight", gemm_dweight_py, py::arg("dlogits"), py::arg("hidden"), py::arg("acc"),
             py::kw_only(), py::arg("beta") = 0.0, py::arg("out") = py::none(),
             py::arg("out_scale") = 1.0, py::arg("threads") = 1,
             "acc[V,D] float32 = dlogits.T @ hidden + beta * acc; out = cast(out_scale * acc).");
  module.def("gemm_info", gemm_info_py,
             "Which vendor GEMMs were found (bf16, fp16, fp32), whether bf16 runs on oneDNN's tile "
             "kernel, "
             "in which library, and why not.");
  module.def("tile_gemm_nbytes", tile_gemm_nbytes, py::arg("n"), py::arg("k"), py::arg("threads"),
             "Scratch bytes of a bf16 product with n columns and inner size k on the tile kernel.");
  module.def("set_tile_gemm", set_tile_gemm, py::arg("enabled"),
             "For tests: False pretends that oneDNN's bf16 tile kernel was not found.");
  module.def(
      "set_wide_pack",
      [](bool enabled) { pack_detail::wide_pack() = enabled && pack_detail::cpu_packs_wide(); },
      py::arg("enabled"), "For tests: False packs for the tile kernel without AVX-512.");
  module.def("set_gemm", set_gemm, py::arg("enabled"),
             "For tests: False pretends that no vendor GEMM was found.");
}

}  // namespace pyoffline
