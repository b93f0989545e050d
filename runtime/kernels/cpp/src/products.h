// The three products of a projection with weight [O, I], on blocks: with the weight's rows on the left (y), with the
// weight packed on the right (gradient of x), and between two sets of rows (gradient of the weight).
#pragma once
#include "spread.h"

namespace moeplan::VARIANT {

constexpr int64_t COLUMNS = 288;                  // of a block of sums
constexpr int64_t BLOCK_ROWS = 256;               // of a block of sums
constexpr int64_t LINE = COLUMNS + PANEL;         // floats from one of its rows to the next
// Rows up to which `spread` is faster than packing the weight.
constexpr int64_t SPREAD = MOEPLAN_AMX ? 8 : LANES == 16 ? 64 : sizeof(Real) == sizeof(Op) ? 32 : 20;
// Where values are widened: rows up to which the next part of the weight is asked for while one is multiplied, and the
// size of a part, of which both stay in the second-level cache. With more rows, or float32, it did not pay.
constexpr int64_t FED = LANES == 8 && sizeof(Real) < sizeof(Op) ? 64 : 0, FED_COLUMNS = 256, FED_CHUNK = 96;
constexpr int64_t GROUP = MOEPLAN_AMX ? 32 : 12;  // rows that are read to their end together
constexpr int64_t SMALL = (MOEPLAN_AMX ? 1536 : 768) << 10;  // bytes of an operand that stays in the second-level cache

// Where rows are multiplied with a weight's columns, a block of sums has the more columns the fewer rows an expert has:
// the longer the stretches that are read of the weight, the faster they come.
constexpr int64_t WIDE_COLUMNS = 2048 / sizeof(Op), WIDE_ROWS = 128;
constexpr int64_t block_columns(int64_t rows) {
    return rows <= SPREAD ? 2048 : rows <= FED ? FED_COLUMNS : rows <= WIDE_ROWS ? WIDE_COLUMNS : WIDE_COLUMNS / 2;
}
// Floats from one row of such a block to the next: a power of two would crowd few sets of the caches.
constexpr int64_t block_line(int64_t rows) { return block_columns(rows) + PANEL; }

// Scratch of one thread, and what it has multiplied.
struct Scratch {
    float* sums;    // [BLOCK_ROWS][LINE], or a block of block_columns
    Op* staged;     // [BLOCK_ROWS][CHUNK], a line more where columns are staged as rows
    float* packed;  // panels of WIDE_COLUMNS columns, CHUNK deep
    int64_t multiply_adds = 0;

    void count(int64_t m, int64_t n, int64_t units) { multiply_adds += m * n * units * PAIR; }
};
constexpr int64_t SUMS = most(most(BLOCK_ROWS * LINE, SPREAD * block_line(SPREAD)),
                              most(WIDE_ROWS * block_line(WIDE_ROWS), BLOCK_ROWS * block_line(BLOCK_ROWS)));
constexpr int64_t STAGED = BLOCK_ROWS * (CHUNK + BLOCK), PACKED = WIDE_COLUMNS * CHUNK / PAIR;

// Whether a row's start is enough for the processor to bring the rest in time: so measured on Intel's. On AMD's it was
// faster to ask for whole rows in order than for each row as it is read; starts alone were not tried there.
static inline bool foresees_rows() { return __builtin_cpu_is("intel"); }

// sums [m, n + tail] = w [m, k] times n columns of the panels b from `panel` on, a multiple of 16, and then times
// `tail` rows. Rows of w are read where they lie if they can be.
inline void weight_times_tokens(const Real* w, int64_t m, const Panels& b, int64_t panel, int64_t n, const Op* rows,
                                int64_t tail, Scratch& scratch, float* sums) {
    int64_t k = b.k, chunks = n ? most(1, ceil_div(b.units(), CHUNK_UNITS)) : 0;
    bool small = n * b.units() * 4 <= SMALL;
    // Rows a power of two apart meet in few sets of the caches, where they cannot wait to be used again.
    bool crowded = !small && k * static_cast<int64_t>(sizeof(Real)) % 16384 == 0;
    bool staged = sizeof(Real) != sizeof(Op) || crowded || k % K_STEP != 0 || m % ROW_STEP != 0;
    // Where b stays in the second-level cache, rows are read to their end, a few at a time, once; else in blocks.
    int64_t group = n == 0 ? m : small ? GROUP : BLOCK_ROWS;
    scratch.multiply_adds += m * tail * k;
    for (int64_t r = 0; r < m; r += group) {
        int64_t count = least(group, m - r), next_count = least(group, m - r - count);
        const Real* next = w + (r + count) * k;
        // Rows that are read to their end are asked for while those before them are multiplied, in the order in which
        // they lie: the processor foresees that, and brings more at once than a program can ask for.
        Ahead next_group(next, 0, 1, next_count * k);
        if (foresees_rows()) next_group = Ahead(next, k, next_count, least(START, k));
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            int64_t depth = b.depth(chunk), tall = round_up(count, ROW_STEP);
            const Real* from = w + r * k + chunk * CHUNK;
            // In blocks it is these rows' next chunk, or the first one of the next rows.
            bool last = chunk + 1 == chunks;
            Ahead next_chunk = last ? Ahead(next, k, next_count, least(CHUNK, k))
                                    : Ahead(from + CHUNK, k, count, least(CHUNK, k - (chunk + 1) * CHUNK));
            Ahead* ahead = small ? &next_group : &next_chunk;
            const float* right = b.at(panel, chunk * CHUNK_UNITS);
            float* to = sums + r * LINE;
            scratch.count(tall, n, depth);
            const Op* left = reinterpret_cast<const Op*>(from);
            if (staged) {
                Rows<Real> lying{from, k, nullptr};
                stage_rows(lying, 0, count, least(CHUNK, k - chunk * CHUNK), scratch.staged, CHUNK);
                left = scratch.staged;
            }
            const auto go = [&](auto bring) {
                multiply(left, staged ? CHUNK : k, tall, bring, right, depth * PANEL, n, depth, to, LINE, chunk > 0);
            };
            // Of staged rows, panels after the first read nothing of the weight: each brings some of what is next.
            if (staged && !small) {
                go(PartNext<16>{ahead});
            } else {
                go(AsMuchNext{ahead});
            }
        }
        // The group is near now.
        if (tail) multiply_few(w + r * k, k, count, rows, row_length(k), tail, k, sums + r * LINE + n, LINE);
    }
}

// sums [m, n] = a [m, k] w, w's k rows `ldw` apart, n of its columns, sums' rows `line` apart; rows of a are padded
// (ROW_STEP, row_length).
inline void rows_times_weight(const Op* a, int64_t lda, int64_t m, const Real* w, int64_t ldw, int64_t k, int64_t n,
                              Scratch& scratch, float* sums, int64_t line) {
    if (m <= SPREAD) {
        scratch.multiply_adds += m * n * k;
        return spread(a, lda, m, w, ldw, k, n, sums, line);
    }
    int64_t k0 = 0, tall = round_up(m, ROW_STEP), wide = round_up(n, PANEL), chunk = m <= FED ? FED_CHUNK : CHUNK;
    do {
        int64_t after = k0 + chunk;
        Panels b{scratch.packed, wide / PANEL, least(chunk, k - k0)};
        pack_columns(Rows<Real>{w + k0 * ldw, ldw, nullptr}, 0, 0, n, b, 0);
        scratch.count(tall, wide, b.units());
        const auto go = [&](auto next) {
            multiply(a + k0, lda, tall, next, b.base, b.units() * PANEL, wide, b.units(), sums, line, k0 > 0);
        };
        Ahead part(w + after * ldw, ldw, least(chunk, k - after), n);
        if (m <= FED) {
            go(PartNext<sizeof(Real)>{&part});
        } else {
            go(NothingNext{});
        }
        k0 = after;
    } while (k0 < k);
}

// sums [m, n] = a [m, k] b, both operands ready, b the panels from `panel` on.
inline void rows_times_panels(const Op* a, int64_t lda, int64_t m, const Panels& b, int64_t panel, int64_t n,
                              Scratch& scratch) {
    scratch.count(round_up(m, ROW_STEP), round_up(n, PANEL), b.units());
    int64_t unit = 0;
    do {
        int64_t depth = b.depth(unit / CHUNK_UNITS);
        multiply(a + unit * PAIR, lda, round_up(m, ROW_STEP), NothingNext{}, b.at(panel, unit), depth * PANEL,
                 round_up(n, PANEL), depth, scratch.sums, LINE, unit > 0);
        unit += CHUNK_UNITS;
    } while (unit < b.units());
}

// For each block of up to LANES columns of sums and LANES of its rows, transposed: visit(column, row, count, vector)
// with the sums of one column for `count` rows from `row` on. m rows, `line` apart, n columns.
template <class Visit>
inline void by_column(const float* sums, int64_t m, int64_t n, Visit visit, int64_t line = LINE) {
    for (int64_t c = 0; c < n; c += LANES) {
        int64_t columns = least(LANES, n - c);
        for (int64_t r = 0; r < m; r += LANES) {
            int64_t count = least(LANES, m - r);
            vf t[LANES];
            // Rows past the last one are within the block of sums; what they give is left out by `count`.
#pragma GCC unroll 16
            for (int64_t j = 0; j < LANES; j++) t[j] = load(sums + (r + j) * line + c);
            transpose(t);
            if (columns == LANES) {
#pragma GCC unroll 16
                for (int64_t j = 0; j < LANES; j++) visit(c + j, r, count, t[j]);
            } else {
                for (int64_t j = 0; j < columns; j++) visit(c + j, r, count, t[j]);
            }
        }
    }
}

}  // namespace moeplan::VARIANT
