// Scratch memory of a call: one block of each calling thread, which is kept from call to call up to a limit.
#pragma once
#include "common.h"

namespace moeplan {

// Starts a call: everything that was taken before is given back.
void arena_reset();
// Bytes aligned to a cache line, not cleared; null when memory is out. Valid until the next reset.
void* arena_take(int64_t bytes);
// Ends a call: a block above the limit goes back to the system.
void arena_done();
// Most bytes that were taken at once during this thread's last call.
int64_t arena_used();

template <class X>
static inline X* take(int64_t count) {
    return static_cast<X*>(arena_take(count * static_cast<int64_t>(sizeof(X))));
}

}  // namespace moeplan
