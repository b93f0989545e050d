// Work of a call, divided over threads by tasks that whoever is free takes next.
#pragma once
#include <omp.h>

#include "arena.h"
#include "products.h"

namespace moeplan::VARIANT {

// Runs `body(thread)` on the threads, of the OpenMP pool that torch uses.
template <class Body>
inline void parallel(int64_t threads, Body body) {
    if (threads <= 1) {
        Tiles tiles;
        body(0);
        return;
    }
#pragma omp parallel num_threads(static_cast<int>(threads))
    {
        Tiles tiles;
        body(static_cast<int64_t>(omp_get_thread_num()));
    }
}

inline void wait_for_all() {
#pragma omp barrier
}

// One phase: tasks 0 to `count` - 1, each done once, by any thread. What a task does must not depend on who does it.
// Threads start from both ends. Where tasks go from experts with few rows to those with many, some threads wait for
// memory while others compute, which takes less time than when all do the one and then the other. And two threads do
// not begin to write to one page of new memory together, which both would clear.
struct Phase {
    int64_t taken = 0, front = 0, back = 0;

    template <class Body>
    void run(int64_t count, Body body) {
        bool last = omp_get_thread_num() % 2;
        while (__atomic_fetch_add(&taken, 1, __ATOMIC_RELAXED) < count) {
            int64_t place = __atomic_fetch_add(last ? &back : &front, 1, __ATOMIC_RELAXED);
            body(last ? count - 1 - place : place);
        }
    }
};

// Where in a list from few rows to many the i-th is, of `count`, that a task of every expert takes: from both ends.
inline int64_t from_both_ends(int64_t i, int64_t count) { return i % 2 ? i / 2 : count - 1 - i / 2; }

inline void add_up(const Plan& plan, const Scratch& scratch) {
    __atomic_fetch_add(plan.multiply_adds, scratch.multiply_adds, __ATOMIC_RELAXED);
}

// Columns of a result [rows, width] in a task that takes every expert in order: small enough that every thread gets
// several, large enough that their rows share the packed operand.
inline int64_t task_columns(int64_t width, int64_t threads) {
    return least(BLOCK_ROWS, most(PANEL, round_up(ceil_div(width, 8 * threads), PANEL)));
}

// The same where a task reads columns of a weight, of which long stretches come faster: as wide as a block of sums can
// be, with as many tasks for each thread.
inline int64_t wide_columns(int64_t width, int64_t threads, int64_t block) {
    int64_t each = most(1, ceil_div(width, threads * block));
    return most(PANEL, round_up(ceil_div(width, threads * each), PANEL));
}

// Float32 sums of a result [rows, width] of another type: cleared in one phase, rounded into place in a later one.
// Where the result is float32 it is its own sums.
struct Sums {
    float* values = nullptr;
    Real* result = nullptr;
    int64_t rows = 0, width = 0;
    Phase clearing, rounding;
    static constexpr int64_t ROWS_EACH = 16;

    bool open(void* to, int64_t row_count, int64_t row_width) {
        result = static_cast<Real*>(to);
        rows = row_count;
        width = row_width;
        if (sizeof(Real) == sizeof(float)) {
            values = static_cast<float*>(to);
            return true;
        }
        values = take<float>(rows * width);
        return values != nullptr;
    }
    void clear() {
        clearing.run(ceil_div(rows, ROWS_EACH), [&](int64_t task) {
            int64_t begin = task * ROWS_EACH * width, end = least(task * ROWS_EACH + ROWS_EACH, rows) * width;
            moeplan::clear(values + begin, sizeof(float) * (end - begin));
        });
    }
    void round() {
        if (sizeof(Real) == sizeof(float)) return;
        rounding.run(ceil_div(rows, ROWS_EACH), [&](int64_t task) {
            int64_t end = least(task * ROWS_EACH + ROWS_EACH, rows) * width;
            for (int64_t i = task * ROWS_EACH * width; i < end; i += LANES) {
                store(result + i, load(values + i, end - i), end - i);
            }
        });
    }
};

}  // namespace moeplan::VARIANT
