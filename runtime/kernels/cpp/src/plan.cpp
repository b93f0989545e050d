#include "plan.h"

#include <algorithm>

#include "arena.h"

namespace moeplan {
namespace {

template <class Id>
Status sort(const Id* ids, int64_t tokens, int64_t top_k, int64_t experts, Plan& plan, int64_t& bad) {
    int64_t choices = tokens * top_k;
    int64_t* start = take<int64_t>(experts + 2);
    if (start == nullptr) return NO_MEMORY;
    clear(start, sizeof(int64_t) * (experts + 2));
    // Counts lie two places further on, so that filling the rows below moves each start to its own place.
    for (int64_t p = 0; p < choices; p++) {
        int64_t id = ids[p];
        if (id < -1 || id >= experts) {
            bad = id;
            return BAD_ID;
        }
        if (id >= 0) start[id + 2]++;
    }
    for (int64_t e = 0; e < experts; e++) start[e + 2] += start[e + 1];
    int64_t rows = start[experts + 1];
    int32_t* choice = take<int32_t>(rows);
    int32_t* token = take<int32_t>(rows);
    int32_t* order = take<int32_t>(experts);
    if (choice == nullptr || token == nullptr || order == nullptr) return NO_MEMORY;
    int64_t p = 0;
    for (int64_t t = 0; t < tokens; t++) {
        for (int64_t k = 0; k < top_k; k++, p++) {
            if (ids[p] < 0) continue;
            int64_t row = start[ids[p] + 1]++;
            choice[row] = static_cast<int32_t>(p);
            token[row] = static_cast<int32_t>(t);
        }
    }
    for (int64_t e = 0; e < experts; e++) order[e] = static_cast<int32_t>(e);
    std::sort(order, order + experts, [&](int32_t a, int32_t b) {
        int64_t rows_a = start[a + 1] - start[a], rows_b = start[b + 1] - start[b];
        return rows_a != rows_b ? rows_a < rows_b : a < b;
    });
    plan.rows = rows;
    plan.choice = choice;
    plan.token = token;
    plan.start = start;
    plan.order = order;
    return OK;
}

}  // namespace

Status make_plan(const void* ids, int64_t bytes, int64_t tokens, int64_t top_k, int64_t experts, Plan& plan,
                 int64_t& bad) {
    if (bytes == 4) return sort(static_cast<const int32_t*>(ids), tokens, top_k, experts, plan, bad);
    return sort(static_cast<const int64_t*>(ids), tokens, top_k, experts, plan, bad);
}

}  // namespace moeplan
