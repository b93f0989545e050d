// Weights that lie turned, inputs before outputs: a block of them is turned on its way into a product, never a whole one.
#pragma once
#include "products.h"

namespace moeplan::VARIANT {

// Some rows of a weight [O, I]: I apart from each other, or turned, each a column of what lies there, rows `stride` apart.
struct Lying {
    const Real* base;
    int64_t stride;
    bool turned;
};

// As `weight_times_tokens`: sums [m, n + tail] = w [m, k] times n columns of the panels b, and then times `tail` rows.
inline void turned_times_tokens(const Lying& w, int64_t m, const Panels& b, int64_t panel, int64_t n, const Op* rows,
                                int64_t tail, Scratch& scratch, float* sums) {
    int64_t k = b.k, chunks = n ? most(1, ceil_div(b.units(), CHUNK_UNITS)) : 0, tall = round_up(m, ROW_STEP);
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        int64_t depth = b.depth(chunk), values = least(CHUNK, k - chunk * CHUNK);
        Rows<Real> lying{w.base + chunk * CHUNK * w.stride, w.stride, nullptr};
        stage_columns(lying, 0, values, 0, m, scratch.staged);
        scratch.count(tall, n, depth);
        multiply(scratch.staged, row_length(values), tall, NothingNext{}, b.at(panel, chunk * CHUNK_UNITS), depth * PANEL,
                 n, depth, sums, LINE, chunk > 0);
    }
    if (tail == 0) return;
    // Straight from where it lies, which gives a row for each token.
    constexpr int64_t WIDTH = BLOCK_ROWS + PANEL;
    float by_token[FEW * WIDTH];
    if (k == 0) clear(by_token, sizeof by_token);
    if (k > 0) spread(rows, row_length(k), tail, w.base, w.stride, k, m, by_token, WIDTH);
    scratch.multiply_adds += m * tail * k;
    for (int64_t r = 0; r < m; r++) {
        for (int64_t c = 0; c < tail; c++) sums[r * LINE + n + c] = by_token[c * WIDTH + r];
    }
}

// As `rows_times_weight`: sums [m, n] = a [m, k] w, where column j of w is the row j of what lies there, `ldw` apart.
inline void rows_times_turned(const Op* a, int64_t lda, int64_t m, const Real* w, int64_t ldw, int64_t k, int64_t n,
                              Scratch& scratch, float* sums, int64_t line) {
    int64_t tall = round_up(m, ROW_STEP);
    for (int64_t first = 0; first < n; first += WIDE_COLUMNS) {
        int64_t columns = least(WIDE_COLUMNS, n - first), count = ceil_div(columns, PANEL), k0 = 0;
        do {
            Panels b{scratch.packed, count, least(CHUNK, k - k0)};
            Rows<Real> lying{w + first * ldw + k0, ldw, nullptr};
            for (int64_t p = 0; p < count; p++) pack_rows(lying, p * PANEL, least(PANEL, columns - p * PANEL), b, p);
            scratch.count(tall, count * PANEL, b.units());
            multiply(a + k0, lda, tall, NothingNext{}, b.base, b.units() * PANEL, count * PANEL, b.units(), sums + first,
                     line, k0 > 0);
            k0 += CHUNK;
        } while (k0 < k);
    }
}

}  // namespace moeplan::VARIANT
