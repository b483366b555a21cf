// Which process loaded this library: parallel_for and the GEMMs ask whether they run in a fork.
#include "parallel.h"

#include <unistd.h>

namespace pyoffline {

namespace {
const pid_t loaded_in = getpid();
}  // namespace

bool in_forked_child() { return getpid() != loaded_in; }

}  // namespace pyoffline
