// Gradients of projections: experts in passes of bounded scratch, and the pieces of work that they share.
#pragma once
#include "passes.h"

namespace moeplan::VARIANT {

constexpr int64_t GRADIENT_ROWS = 128;   // rows of a weight's gradient in a task
constexpr int64_t GRADIENT_COLUMNS = 512;  // columns of a bias's gradient in a task
constexpr int64_t STAGE_EACH = 16;       // rows staged in a task
// Rows of an expert up to which panels of its gradient are summed in registers and written at once, without blocks: with
// AVX2 as many as a chunk has, since there it was faster, or as fast, for any number.
constexpr int64_t FEW_GRADIENT = MOEPLAN_AMX ? 6 : LANES == 16 ? 8 : CHUNK_UNITS;
constexpr int64_t TURNED_GROUP = 32;  // rows of sums that are turned together: whole vectors, and a line or more
static_assert(FEW_GRADIENT <= CHUNK, "a panel of them is read as one piece");

// An expert and its rows, none where it is idle. In its pass its staged rows start at `padded_row`, a multiple of 16,
// and panels along its rows at `depth` times their number of columns.
struct Owner {
    int64_t expert, row, n, padded_row, depth;
    bool many;  // its rows times the weight, by `multiply_many`
};

struct Owners {
    Owner* all = nullptr;      // [experts]
    int64_t* first = nullptr;  // [count + 1] first expert of each pass
    int64_t count = 0, most_rows = 0, most_depth = 0, most_tokens = 0, busy = 0;  // of experts
    bool many = false;  // some expert has many rows
    int64_t columns = 0;  // of a block of sums of a busy expert with as many rows as they have on average

    // `row_units`: units of scratch that a row takes. An expert is never split: its weight's gradient is one sum.
    bool build(const Plan& plan, int64_t experts, int64_t row_units, bool vendor) {
        all = take<Owner>(experts);
        first = take<int64_t>(experts + 1);
        if (!all || !first) return false;
        int64_t made = 0, rows = 0, depth = 0;
        first[0] = 0;
        const auto rows_of = [&](int64_t i) { return plan.start[plan.order[i] + 1] - plan.start[plan.order[i]]; };
        const auto put = [&](int64_t i) {
            int64_t e = plan.order[i], n = rows_of(i);
            Owner& own = all[made++] = {e, plan.start[e], n, rows, depth, vendor && n >= MANY_BACKWARD};
            many |= own.many;
            rows += round_up(n, 16);
            depth += Panels::size(1, n);
            most_rows = most(most_rows, rows);
            most_depth = most(most_depth, depth);
            most_tokens = most(most_tokens, n);
            busy += n > 0;
        };
        divide(experts, [&](int64_t i) { return round_up(rows_of(i), 16) * row_units; }, put, [&] {
            first[++count] = made;
            rows = depth = 0;
        });
        columns = block_columns(ceil_div(plan.rows, most(1, busy)));
        return true;
    }
    int64_t begin(int64_t pass) const { return first[pass]; }
    int64_t experts(int64_t pass) const { return first[pass + 1] - first[pass]; }
    int64_t rows(int64_t pass) const {
        const Owner& last = all[first[pass + 1] - 1];
        return last.padded_row + round_up(last.n, 16);
    }
    // Whose padded row it is.
    const Owner& at(int64_t pass, int64_t padded_row) const {
        int64_t low = first[pass], high = first[pass + 1] - 1;
        while (low < high) {
            int64_t middle = (low + high + 1) / 2;
            if (all[middle].padded_row <= padded_row) {
                low = middle;
            } else {
                high = middle - 1;
            }
        }
        return all[low];
    }
};

// Units of panels of `width` columns whose k runs over the rows of experts with `depth` in all; one expert's start.
inline int64_t column_panels(int64_t depth, int64_t width) { return depth * ceil_div(width, PANEL); }
inline Panels owner_panels(const Owner& owner, float* base, int64_t width) {
    return {base + column_panels(owner.depth, width), ceil_div(width, PANEL), owner.n};
}

// Task: STAGE_EACH rows of a matrix, for the experts of a pass, staged at their padded rows.
inline void stage(const Owners& owners, int64_t pass, int64_t task, const Rows<Real>& rows, int64_t k, Op* staged) {
    const Owner& owner = owners.at(pass, task * STAGE_EACH);
    int64_t r = task * STAGE_EACH - owner.padded_row;
    stage_rows(rows, owner.row + r, least(STAGE_EACH, owner.n - r), k, staged + task * STAGE_EACH * row_length(k),
               row_length(k));
}

// Task: up to COLUMNS columns of an expert's rows, packed along the rows. `width` of a row.
inline void pack_owner(const Owners& owners, int64_t pass, int64_t task, const Rows<Real>& rows, int64_t width,
                       float* panels) {
    int64_t blocks = ceil_div(width, COLUMNS), column = task % blocks * COLUMNS;
    const Owner& owner = owners.all[owners.begin(pass) + task / blocks];
    if (owner.n == 0) return;
    pack_columns(rows, owner.row, column, least(COLUMNS, width - column), owner_panels(owner, panels, width),
                 column / PANEL);
}

// Columns i to i + n of an expert's rows: staged rows times the weight [k, width], or what lies there turned, added to
// the rows of `to`.
inline void input_gradient(const Owner& owner, const int32_t* index, const Op* staged, const Real* weight, bool turned,
                           int64_t k, int64_t i, int64_t n, Scratch& scratch, const Sums& to) {
    int64_t tall = owner.many ? MANY_ROWS : BLOCK_ROWS;
    int64_t wide = owner.many ? MANY_COLUMNS : block_columns(owner.n);
    for (int64_t r = 0; r < owner.n; r += tall) {
        int64_t m = least(tall, owner.n - r);
        const Op* rows = staged + (owner.padded_row + r) * row_length(k);
        for (int64_t c = i; c < i + n; c += wide) {
            int64_t columns = least(wide, i + n - c);
            int64_t line = owner.many ? round_up(columns, PANEL) : block_line(owner.n);
            if (owner.many) {
                multiply_many(Matrix<Op>{rows, row_length(k)}, Matrix<Real>{weight + c, to.width}, m, columns, k, scratch,
                              scratch.sums, line);
            } else if (turned) {
                rows_times_turned(rows, row_length(k), m, weight + c * k, k, k, columns, scratch, scratch.sums, line);
            } else {
                rows_times_weight(rows, row_length(k), m, weight + c, to.width, k, columns, scratch, scratch.sums, line);
            }
            for (int64_t j = 0; j < m; j++) {
                add_row(scratch.sums + j * line, columns, to.values + index[owner.row + r + j] * to.width + c);
            }
        }
    }
}

// Rows of so many values are whole cache lines, which can be written past the caches.
inline bool whole_lines(const void* gradient, int64_t values) {
    return values * sizeof(Real) % 64 == 0 && reinterpret_cast<uintptr_t>(gradient) % 64 == 0;
}

inline void write(Real* to, vf x, int64_t count, bool far) {
    if (far) return stream(to, x);
    if (count >= LANES) return store(to, x);
    store(to, x, count);
}

// A panel of a row.
template <int N>
__attribute__((always_inline)) inline void write_panel(Real* to, const vf (&x)[N], bool far) {
    if constexpr (N == 2) {  // together they take fewer instructions
        if (far) return stream(to, x[0], x[1]);
        store(to, x[0], x[1]);
    } else {
        for (int v = 0; v < N; v++) write(to + v * LANES, x[v], LANES, far);
    }
}

// R rows of a gradient, each panel of which is summed in registers and written at once.
template <int R>
inline void few_gradient(const Op* dy, int64_t ld, int64_t units, const Panels& x, int64_t inputs, Real* out, bool far) {
    for (int64_t i = 0; i < inputs; i += PANEL) {
        const float* from = x.at(i / PANEL, 0);
        vf sums[R][PANEL_VECTORS];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
#pragma GCC unroll 2
            for (int v = 0; v < PANEL_VECTORS; v++) sums[r][v] = zero();
        }
        for (int64_t u = 0; u < units; u++) {
            vf row[PANEL_VECTORS];
#pragma GCC unroll 2
            for (int v = 0; v < PANEL_VECTORS; v++) row[v] = load(from + u * PANEL + v * LANES);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                vf left = broadcast(dy + r * ld + u * PAIR);
#pragma GCC unroll 2
                for (int v = 0; v < PANEL_VECTORS; v++) sums[r][v] = step(sums[r][v], left, row[v]);
            }
        }
        int64_t left = inputs - i;
        if (left >= PANEL) {  // a copy of its own, without conditions
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) write_panel(out + r * inputs + i, sums[r], far);
            continue;
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
#pragma GCC unroll 2
            for (int v = 0; v < PANEL_VECTORS; v++) {
                int64_t at = v * LANES;
                if (at < left) write(out + r * inputs + i + at, sums[r][v], left - at, far);
            }
        }
    }
}

// n values of a row, from a row of sums.
template <bool FAR>
inline void write_row(Real* to, const float* sums, int64_t n) {
    int64_t c = 0;
    for (; c + PANEL <= n; c += PANEL) {
        vf panel[PANEL_VECTORS];
#pragma GCC unroll 2
        for (int v = 0; v < PANEL_VECTORS; v++) panel[v] = load(sums + c + v * LANES);
        write_panel(to + c, panel, FAR);
    }
    for (; c < n; c += LANES) write(to + c, load(sums + c), n - c, FAR);
}

// Whether stores past the caches to the same columns of neighbouring rows would meet: so measured on AMD's with AVX2,
// where rows half a page apart took up to three times as long.
inline bool rows_meet(int64_t inputs) { return LANES == 8 && inputs * sizeof(Real) % 2048 == 0; }

// Rows o to o + m of an expert's dweight [O, I] = dy^T x: dy's rows through an index, x in panels along its rows. They
// are written to `out`, or, where `turned` is not 0, as columns of a matrix whose rows are so far apart.
// Idle experts' are left as they are: zeros, in memory that nobody had to write.
template <class X>
inline void weight_gradient(const Owner& owner, const Rows<X>& dy, int64_t first_row, int64_t o, int64_t m,
                            const Panels& x, int64_t inputs, Op* staged, Scratch& scratch, Real* out, int64_t turned,
                            bool far) {
    if (owner.n == 0) return;  // zeros, which the memory came with
    int64_t ld = row_length(owner.n);
    stage_columns(dy, first_row, owner.n, o, m, staged);
    if (owner.n <= FEW_GRADIENT && !turned && !(far && rows_meet(inputs))) {
        int64_t units = ceil_div(owner.n, PAIR), r = 0;
        scratch.multiply_adds += m * inputs * units * PAIR;
        for (; r + 4 <= m; r += 4) few_gradient<4>(staged + r * ld, ld, units, x, inputs, out + r * inputs, far);
        for (; r < m; r++) few_gradient<1>(staged + r * ld, ld, units, x, inputs, out + r * inputs, far);
    } else {
        for (int64_t i = 0; i < inputs; i += COLUMNS) {
            int64_t n = least(COLUMNS, inputs - i);
            // So few rows at a time that their sums stay in the first-level cache.
            int64_t group = turned ? TURNED_GROUP : GROUP;
            for (int64_t r0 = 0; r0 < m; r0 += group) {
                int64_t rows = least(group, m - r0);
                rows_times_panels(staged + r0 * ld, ld, rows, x, i / PANEL, n, scratch);
                if (turned) {
                    by_column(scratch.sums, rows, n, [&](int64_t c, int64_t r, int64_t count, vf values) {
                        store(out + (i + c) * turned + r0 + r, values, count);
                    });
                    continue;
                }
                for (int64_t r = 0; r < rows; r++) {
                    Real* to = out + (r0 + r) * inputs + i;
                    const float* from = scratch.sums + r * LINE;
                    far ? write_row<true>(to, from, n) : write_row<false>(to, from, n);
                }
            }
        }
    }
    if (far) _mm_sfence();  // others may read it once this task is done
}

// out[column to column + width] = the sums over n rows, each times weight(row) where `weight` is not null.
template <class X, class Weight>
inline void row_sums(const Rows<X>& rows, int64_t first_row, int64_t n, int64_t column, int64_t width, Weight weight,
                     Real* out) {
    for (int64_t c = column; c < column + width; c += LANES) {
        int64_t count = least(LANES, column + width - c);
        vf total = zero();
        for (int64_t r = first_row; r < first_row + n; r++) {
            vf x = load(rows[r] + c, count);
            if constexpr (__is_same(Weight, decltype(nullptr))) {
                total = total + x;
            } else {
                total = fma(splat(weight(r)), x, total);
            }
        }
        store(out + c, total, count);
    }
}

}  // namespace moeplan::VARIANT
