// Sizes that the bindings, the launch and the kernels agree on. Plain C++.
#pragma once

#include <cstdint>

namespace pyoffline {
namespace gpu {

constexpr int kMaxTerms = 16;  // of a program: they travel as kernel parameters
constexpr int kMaxExtras = 16;

struct DeviceLimits {
  int capability;        // 10 * major + minor
  int64_t shared_bytes;  // of one block, opted in
};

}  // namespace gpu
}  // namespace pyoffline
