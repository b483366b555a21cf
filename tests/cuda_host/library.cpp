// The host runner as a shared object for ctypes: one call, and the launch plan.
#include <cstdint>

#include "../../csrc/cuda/scale_elements.h"
#include "host_row_pass.h"

using namespace pyoffline;

extern "C" {

// 0: done, 1: no kernel for these dtypes.
int host_row_pass(const gpu::RowTask* task, const Term* terms, const float* const* extras,
                  int blocks, int threads) {
  gpu::RowTask copy = *task;
  for (int i = 0; i < copy.args.n_terms; ++i) copy.terms[i] = terms[i];
  for (int i = 0; i < copy.args.n_extras; ++i) copy.extras[i] = extras[i];
  return gpu::host_row_pass(copy, blocks, threads) ? 0 : 1;
}

// out: blocks, threads, capacity, bytes of shared memory, resident
void host_plan(int64_t vocab, int64_t item_size, int capability, int64_t shared_bytes,
               int64_t* out) {
  const gpu::RowPlan plan = gpu::plan_row(vocab, item_size, {capability, shared_bytes});
  const int64_t values[5] = {plan.blocks, plan.threads, plan.capacity, plan.shared_bytes,
                             plan.is_resident};
  for (int i = 0; i < 5; ++i) out[i] = values[i];
}

// The share of each of `threads` threads, one after the other; type as in row_args.h.
void host_scale(void* grad, int type, int64_t size, float factor, int64_t threads) {
  for (int64_t thread = 0; thread < threads; ++thread) {
    if (type == 0)
      gpu::scale_elements(static_cast<float*>(grad), size, factor, thread, threads);
    else if (type == 1)
      gpu::scale_elements(static_cast<bf16*>(grad), size, factor, thread, threads);
    else
      gpu::scale_elements(static_cast<f16*>(grad), size, factor, thread, threads);
  }
}

int64_t task_size() { return sizeof(gpu::RowTask); }
}
