// Clusters on small rows for the sanitizers; `race_driver fault` takes the cluster barriers away,
// which ThreadSanitizer must report. tests/cuda_host/sanitize.sh builds it with each of them.
#include <cstdio>
#include <random>

#include "host_row_pass.h"

using namespace pyoffline;
using namespace pyoffline::gpu;

namespace {

// Rows of random bits in exactly sized buffers that start `shift` elements past an aligned address.
template <class T, class Out>
void run_case(int64_t vocab, int blocks, int capacity, int shift, bool is_in_place) {
  const int64_t rows = 3, stride = vocab + 1;
  std::mt19937 rng(static_cast<uint32_t>(vocab * 8 + blocks));
  std::normal_distribution<float> normal;
  std::vector<T> logits(rows * stride + shift);
  for (T& x : logits) narrow(normal(rng), &x);
  std::vector<Out> dlogits(rows * vocab);
  std::vector<float> coefs(4 * rows), stats(3 * rows);
  for (float& x : coefs) x = normal(rng);
  std::vector<int64_t> labels = {0, vocab - 1, vocab / 2}, flag(2);
  RowTask task{};
  RowArgs& args = task.args;
  args.logits = logits.data() + shift;
  args.logits_stride = stride;
  args.dlogits = is_in_place ? static_cast<void*>(logits.data() + shift) : dlogits.data();
  args.dlogits_stride =
      is_in_place ? stride * static_cast<int64_t>(sizeof(T) / sizeof(Out)) : vocab;
  args.rows = rows;
  args.vocab = vocab;
  args.logit_scale = args.uniform_temperature = args.grad_scale = 1.0f;
  args.labels = labels.data();
  args.ignore_index = -100;
  args.coefs = coefs.data();
  args.logps = stats.data();
  args.entropy = stats.data() + rows;
  args.gap = blocks % 2 ? stats.data() + 2 * rows : nullptr;
  task.wants_gap = args.gap;
  task.writes_stats = true;
  task.is_narrowing = is_in_place && sizeof(Out) < sizeof(T);
  task.bad_label = flag.data();
  task.capacity = capacity;
  host_rows<T, Out>(task, blocks, 8);
}

}  // namespace

int main(int argc, char**) {
  is_faulty = argc > 1;
  int cases = 0;
  for (int64_t vocab : {1, 7, 65, 300, 1027}) {
    for (int blocks : {1, 2, 8}) {
      for (int shift : {0, 1}) {
        const bool is_in_place = (vocab + shift) % 2 == 0;
        run_case<float, bf16>(vocab, blocks, 1 << 12, shift, is_in_place);
        run_case<bf16, bf16>(vocab, blocks, 1 << 12, shift, is_in_place);
        cases += 2;
      }
    }
    for (int capacity : {0, 16}) run_case<float, bf16>(vocab, 1, capacity, 1, true), ++cases;
  }
  std::printf("race_driver: %d cases\n", cases);
}
