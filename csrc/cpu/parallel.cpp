// Which process loaded this library: tells parallel_for and the GEMMs that they run in a forked
// child.
#include "parallel.h"

#include <unistd.h>

namespace pyoffline {

namespace {
const pid_t loaded_in = getpid();
}  // namespace

bool in_forked_child() { return getpid() != loaded_in; }

}  // namespace pyoffline
