// The kernel table in use, for the baseline files of this directory.
#pragma once

#include "kernels.h"

namespace pyoffline {

const Kernels& active_kernels();

}  // namespace pyoffline
