// The re-index vector: choices sorted by expert, where each one's rows start, and experts from few rows to many.
#pragma once
#include "common.h"

namespace moeplan {

// ids: [tokens * top_k] of `bytes` 4 or 8 each. Fills `plan` from the arena; BAD_ID puts the offender into `bad`.
Status make_plan(const void* ids, int64_t bytes, int64_t tokens, int64_t top_k, int64_t experts, Plan& plan,
                 int64_t& bad);

}  // namespace moeplan
